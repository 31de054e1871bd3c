"""kornia.losses: total variation, SSIM, PSNR and edge-aware smoothness (kornia 0.9), by fastloss's losses.

kornia's SSIM pads by reflection: whole windows of images that are reflected at their borders see the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import image as losses
from ._common import NotServed, as_theirs, check_plain, hands_on, required

_theirs, _metrics = required("kornia.losses"), required("kornia.metrics")
_C1, _C2, _SIGMA = 0.01**2, 0.03**2, 1.5  # of its SSIM, in units of max_val
_LARGEST_BIAS = 2e-5  # what its eps may take from SSIM, at most, where the drop-in leaves it out
_TotalVariation: Any = _theirs.TotalVariation
_SSIMLoss: Any = _theirs.SSIMLoss
_PSNRLoss: Any = _theirs.PSNRLoss
_InverseDepthSmoothnessLoss: Any = _theirs.InverseDepthSmoothnessLoss


@hands_on("kornia.losses.total_variation", _theirs.total_variation)
def total_variation(img: Tensor, reduction: str = "sum") -> Tensor:
    """kornia's function: absolute differences of each plane of ``[*, H, W]``, their sums or means; shape ``[*]``."""
    check_plain(img)
    if img.ndim < 2 or img.numel() == 0:
        raise NotServed(f"expected images [*, H, W], got {tuple(img.shape)}")
    planes = img.reshape(1, -1, *img.shape[-2:])
    value = losses.smoothness_loss(planes, convention="kornia", reduction=reduction)
    return as_theirs(value.reshape(img.shape[:-2]), img)


class TotalVariation(_TotalVariation):
    """kornia's module: the sums of :func:`total_variation`."""

    def forward(self, img: Tensor) -> Tensor:
        return total_variation(img)


@hands_on("kornia.losses.ssim_loss", _theirs.ssim_loss)
def ssim_loss(
    img1: Tensor,
    img2: Tensor,
    window_size: int,
    max_val: float = 1.0,
    eps: float = 1e-12,
    reduction: str = "mean",
    padding: str = "same",
) -> Tensor:
    """kornia's function, (1 - SSIM) / 2: the mean or the sum over all pixels; its map is kornia's own.

    kornia's `eps`, which it adds to the denominator, is left out where it could take at most 2e-5 from SSIM (1.1e-5 of
    black images at the defaults, nothing that float32 shows elsewhere).
    """
    check_plain(img1, img2)
    if img1.ndim != 4 or not isinstance(max_val, float) or reduction not in ("mean", "sum"):
        raise NotServed(f"images {tuple(img1.shape)}, max_val {max_val!r}, reduction {reduction!r}")
    if not 0 <= eps <= _LARGEST_BIAS * _C1 * _C2 * max_val**4:
        raise NotServed(f"eps: {eps!r} for images up to {max_val!r}")
    where = str(padding).lower()
    if where not in ("same", "valid") or img1.shape != img2.shape:
        raise NotServed(f"padding {padding!r}, images {tuple(img1.shape)} and {tuple(img2.shape)}")
    how = "reflect" if where == "same" else "valid"
    loss = losses.ssim_loss(img2, img1, window=window_size, sigma=_SIGMA, data_range=max_val, padding=how) / 2
    if reduction == "sum":
        cut = 0 if where == "same" else 1 - window_size
        loss = loss * (img1.shape[0] * img1.shape[1] * (img1.shape[2] + cut) * (img1.shape[3] + cut))
    return as_theirs(loss, img1, img2)


class SSIMLoss(_SSIMLoss):
    """kornia's module, see :func:`ssim_loss`."""

    def forward(self, img1: Tensor, img2: Tensor) -> Tensor:
        return ssim_loss(img1, img2, self.window_size, self.max_val, self.eps, self.reduction, self.padding)


@hands_on("kornia.metrics.psnr", _metrics.psnr)
def psnr(image: Tensor, target: Tensor, max_val: float) -> Tensor:
    """kornia's function: 10 log10(max_val^2 / the mean squared error), one number for the batch."""
    check_plain(image, target)
    if image.dtype != target.dtype or isinstance(max_val, Tensor):
        raise NotServed(f"images of {image.dtype} and {target.dtype}, max_val {type(max_val).__name__}")
    return as_theirs(10.0 * torch.log10(max_val**2 / losses.pixel_loss(target, image)), image)


@hands_on("kornia.losses.psnr_loss", _theirs.psnr_loss)
def psnr_loss(image: Tensor, target: Tensor, max_val: float) -> Tensor:
    """kornia's function: minus :func:`psnr`."""
    return -psnr(image, target, max_val)


class PSNRLoss(_PSNRLoss):
    """kornia's module, see :func:`psnr_loss`."""

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        return psnr_loss(image, target, self.max_val)


@hands_on("kornia.losses.inverse_depth_smoothness_loss", _theirs.inverse_depth_smoothness_loss)
def inverse_depth_smoothness_loss(idepth: Tensor, image: Tensor) -> Tensor:
    """kornia's function: absolute differences of `idepth`, less where `image` has edges; the image gets no gradient
    here, and kornia's own code where it needs one."""
    check_plain(idepth, image)
    if idepth.ndim != 4 or idepth.dtype != image.dtype or 1 in idepth.shape[2:]:
        raise NotServed(f"inverse depths {tuple(idepth.shape)} of {idepth.dtype}, images of {image.dtype}")
    if torch.is_grad_enabled() and image.requires_grad:
        raise NotServed("image: it needs a gradient")
    return as_theirs(losses.smoothness_loss(idepth, guide=image.detach()), idepth)


class InverseDepthSmoothnessLoss(_InverseDepthSmoothnessLoss):
    """kornia's module, see :func:`inverse_depth_smoothness_loss`."""

    def forward(self, idepth: Tensor, image: Tensor) -> Tensor:
        return inverse_depth_smoothness_loss(idepth, image)


SWAPS = {
    "kornia.losses.total_variation": total_variation,
    "kornia.losses.TotalVariation": TotalVariation,
    "kornia.losses.ssim_loss": ssim_loss,
    "kornia.losses.SSIMLoss": SSIMLoss,
    "kornia.metrics.psnr": psnr,
    "kornia.losses.psnr_loss": psnr_loss,
    "kornia.losses.PSNRLoss": PSNRLoss,
    "kornia.losses.inverse_depth_smoothness_loss": inverse_depth_smoothness_loss,
    "kornia.losses.InverseDepthSmoothnessLoss": InverseDepthSmoothnessLoss,
}
LEFT = {
    "kornia.losses.MS_SSIMLoss": "another loss: Gaussians of five widths at full size, and L1",
    "kornia.losses.charbonnier_loss": "sqrt(d^2 + 1) - 1 would lose the digits of small d as a difference",
    "kornia.losses.SSIM3DLoss": "volumes",
    "kornia.metrics.ssim": "a map",
}
