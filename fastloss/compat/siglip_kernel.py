"""siglip_kernel's losses (siglip-kernel 0.1), by :func:`fastloss.siglip_loss`. They need no siglip_kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

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


def fused_siglip_plus_loss(
    img_features: Tensor,
    txt_features: Tensor,
    log_temperature: Tensor,
    bias: Tensor,
    img_gid: Tensor | None = None,
    txt_gid: Tensor | None = None,
    symmetric: bool = True,
    soft_label: bool = False,
    chunk_size: int = 0,
    num_groups: int | None = None,
) -> Tensor:
    """siglip_kernel's function: SigLIP with several texts an image, the mean over all N M pairs; float32.

    Args:
        img_features, txt_features: unit embeddings ``[N, D]`` and ``[M, D]``, which are taken as they are.
        log_temperature, bias: as in :func:`fused_siglip_loss`.
        img_gid, txt_gid: integers ``[N]`` and ``[M]``: equal ones are positives. None: the numbers of the rows.
        symmetric, soft_label: as in :func:`fastloss.siglip_loss`.
        chunk_size, num_groups: of siglip_kernel's kernel; they make no difference here.
    """
    images, texts = len(img_features), len(txt_features)
    of_images = torch.arange(images, device=img_features.device) if img_gid is None else img_gid
    of_texts = torch.arange(texts, device=img_features.device) if txt_gid is None else txt_gid
    assert of_images.shape == (images,), f"img_gid must be [{images}], got {tuple(of_images.shape)}"  # its own errors
    assert of_texts.shape == (texts,), f"txt_gid must be [{texts}], got {tuple(of_texts.shape)}"
    loss = siglip_loss(
        img_features, txt_features, logit_scale=log_temperature.exp(), logit_bias=bias, image_groups=of_images,
        text_groups=of_texts, symmetric=symmetric, soft_labels=soft_label, reduction="sum",
    )  # fmt: skip
    return loss / (images * texts)


class SigLIPPlusLoss(nn.Module):
    """siglip_kernel's module: :func:`fused_siglip_plus_loss` of ``(images, texts)``, made unit vectors, with a factor
    and a bias of its own. It returns a dict of the loss, the factor and the number of positive pairs."""

    def __init__(
        self,
        temperature: float = 0.07,
        symmetric: bool = True,
        use_bias: bool = True,
        bias_init: float = 0.0,
        soft_weighting: bool = True,
        soft_label: bool = False,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        if not soft_weighting and not soft_label:
            raise NotImplementedError("soft_weighting: False is for soft_label=True only")
        self.symmetric = symmetric
        self.soft_label = soft_label
        self.chunk_size = chunk_size
        self.logit_scale = nn.Parameter(torch.log(torch.tensor(1.0 / temperature)))
        if use_bias:
            self.logit_bias = nn.Parameter(torch.tensor(float(bias_init)))
        else:
            self.register_buffer("logit_bias", torch.tensor(0.0))

    def forward(
        self, embeddings: tuple[Tensor, Tensor], img_gid: Tensor | None = None, txt_gid: Tensor | None = None
    ) -> dict[str, Tensor]:
        images, texts = (nn.functional.normalize(side, dim=-1) for side in embeddings)
        log_scale = self.logit_scale.clamp(min=math.log(0.01), max=math.log(100.0))
        loss = fused_siglip_plus_loss(
            images, texts, log_scale, self.logit_bias, img_gid, txt_gid, self.symmetric, self.soft_label
        )
        of_images = torch.arange(len(images), device=images.device) if img_gid is None else img_gid
        of_texts = torch.arange(len(texts), device=texts.device) if txt_gid is None else txt_gid
        ordered = of_texts.sort().values
        positives = torch.searchsorted(ordered, of_images, right=True) - torch.searchsorted(ordered, of_images)
        return {"total_loss": loss, "logit_scale": log_scale.exp().detach(), "n_positives": positives.sum()}


SWAPS = {
    "siglip_kernel.fused_siglip_loss": fused_siglip_loss,
    "siglip_kernel.fused_siglip_plus_loss": fused_siglip_plus_loss,
    "siglip_kernel.SigLIPPlusLoss": SigLIPPlusLoss,
}
LEFT = {
    "siglip_kernel.DistributedSigLIPLoss": "passes the texts around the ranks; siglip_loss(group=...) gathers them",
    "siglip_kernel.DistributedSigLIPPlusLoss": "the same",
}
