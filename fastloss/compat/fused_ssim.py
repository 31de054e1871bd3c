"""fused_ssim's fused_ssim, by :func:`fastloss.ssim_loss`. It needs no fused_ssim.

The loss of Gaussian splatting's trainers, ``(1 - w) * l1_loss(image, gt) + w * (1 - fused_ssim(image, gt))``, is one
pass of ``fastloss.image_loss(gt, image, pixel=(1, 1 - w), ssim=w)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..image import ssim_loss
from ._common import as_theirs


def fused_ssim(img1: Tensor, img2: Tensor, padding: str = "same", train: bool = True) -> Tensor:
    """fused_ssim's function: the mean SSIM of images ``[N, C, H, W]`` in [0, 1], in a window of 11 pixels.

    Args:
        img1: the prediction. As in fused_ssim it alone gets a gradient.
        img2: the target.
        padding: ``"same"``: zeros beyond the border. ``"valid"``: whole windows only.
        train: False: no gradient, and nothing is kept for one.
    """
    assert padding in ("same", "valid")  # the error that fused_ssim has
    with torch.set_grad_enabled(train and torch.is_grad_enabled()):
        return as_theirs(1 - ssim_loss(img2.detach(), img1, padding=padding), img1)


SWAPS = {"fused_ssim.fused_ssim": fused_ssim}
LEFT: dict[str, str] = {}
