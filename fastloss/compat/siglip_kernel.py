"""siglip_kernel's fused_siglip_loss (siglip-kernel 0.1), by :func:`fastloss.siglip_loss`. It needs no siglip_kernel."""

from __future__ import annotations

from torch import Tensor

from ..contrastive import siglip_loss
from ._common import as_theirs


def fused_siglip_loss(
    img_features: Tensor,
    txt_features: Tensor,
    log_temperature: Tensor,
    bias: Tensor,
    use_fp8: bool = False,
    backend: str = "auto",
) -> Tensor:
    """siglip_kernel's function: SigLIP's loss of unit embeddings ``[B, D]``, in the dtype of `img_features`.

    Args:
        img_features, txt_features: unit embeddings, which are taken as they are.
        log_temperature: the logarithm of the factor of the similarities; its gradient is that of the logarithm.
        bias: added to every similarity.
        use_fp8, backend: siglip_kernel's choice of a kernel. They make no difference here: fastloss chooses its own,
            and never multiplies in 8 bits.
    """
    loss = siglip_loss(img_features, txt_features, logit_scale=log_temperature.exp(), logit_bias=bias)
    return as_theirs(loss, img_features)


SWAPS = {"siglip_kernel.fused_siglip_loss": fused_siglip_loss}
LEFT = {"siglip_kernel.fused_siglip_plus_loss": "no drop-in yet"}
