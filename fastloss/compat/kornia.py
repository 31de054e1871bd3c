"""kornia's total variation, SSIM of images and volumes, PSNR and edge-aware smoothness (0.9), by fastloss's losses.

kornia's SSIM pads by reflection: whole windows of images that are reflected at their borders see the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
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
_MS_SSIMLoss: Any = _theirs.MS_SSIMLoss
_SSIM3DLoss: Any = _theirs.SSIM3DLoss
_SSIM: Any = _metrics.SSIM
_SSIM3D: Any = _metrics.SSIM3D


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


def _distance(
    img1: Tensor, img2: Tensor, window_size: int, max_val: float, eps: float, padding: str, ndim: int, reduction: str
) -> Tensor:
    """1 - SSIM of images or volumes: its mean, or its map.

    kornia's `eps`, which it adds to the denominator, is left out where it could take at most 2e-5 from SSIM (1.1e-5 of
    black images at the defaults, nothing that float32 shows elsewhere).
    """
    check_plain(img1, img2)
    if img1.ndim != ndim or not isinstance(max_val, float):
        raise NotServed(f"images {tuple(img1.shape)}, max_val {max_val!r}")
    if not 0 <= eps <= _LARGEST_BIAS * _C1 * _C2 * max_val**4:
        raise NotServed(f"eps: {eps!r} for images up to {max_val!r}")
    where = str(padding).lower()
    if where not in ("same", "valid") or img1.shape != img2.shape:
        raise NotServed(f"padding {padding!r}, images {tuple(img1.shape)} and {tuple(img2.shape)}")
    how = "reflect" if where == "same" else "valid"
    options: dict[str, Any] = {"window": window_size, "sigma": _SIGMA, "data_range": max_val, "padding": how}
    return losses.ssim_loss(img2, img1, reduction=reduction, **options)


def _loss(
    img1: Tensor, img2: Tensor, window_size: int, max_val: float, eps: float, reduction: str, padding: str, ndim: int
) -> Tensor:
    """(1 - SSIM) / 2: the mean or the sum over all pixels, or the map, which is cut to [0, 1]."""
    if reduction not in ("mean", "sum", "none"):
        raise NotServed(f"reduction {reduction!r}")
    how = "map" if reduction == "none" else "mean"
    loss = _distance(img1, img2, window_size, max_val, eps, padding, ndim, how) / 2
    if reduction == "none":
        loss = loss.clamp(0, 1)
    if reduction == "sum":
        cut = 0 if padding.lower() == "same" else 1 - window_size
        loss = loss * math.prod((*img1.shape[:2], *(side + cut for side in img1.shape[2:])))
    return as_theirs(loss, img1, img2)


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
    """kornia's function, (1 - SSIM) / 2: the mean or the sum over all pixels, or its map; without its `eps`."""
    return _loss(img1, img2, window_size, max_val, eps, reduction, padding, 4)


class SSIMLoss(_SSIMLoss):
    """kornia's module, see :func:`ssim_loss`."""

    def forward(self, img1: Tensor, img2: Tensor) -> Tensor:
        return ssim_loss(img1, img2, self.window_size, self.max_val, self.eps, self.reduction, self.padding)


@hands_on("kornia.losses.ssim3d_loss", _theirs.ssim3d_loss)
def ssim3d_loss(
    img1: Tensor,
    img2: Tensor,
    window_size: int,
    max_val: float = 1.0,
    eps: float = 1e-12,
    reduction: str = "mean",
    padding: str = "same",
) -> Tensor:
    """kornia's function: :func:`ssim_loss` of volumes ``[B, C, D, H, W]``."""
    return _loss(img1, img2, window_size, max_val, eps, reduction, padding, 5)


class SSIM3DLoss(_SSIM3DLoss):
    """kornia's module, see :func:`ssim3d_loss`."""

    def forward(self, img1: Tensor, img2: Tensor) -> Tensor:
        return ssim3d_loss(img1, img2, self.window_size, self.max_val, self.eps, self.reduction, self.padding)


@hands_on("kornia.metrics.ssim", _metrics.ssim)
def ssim(
    img1: Tensor, img2: Tensor, window_size: int, max_val: float = 1.0, eps: float = 1e-12, padding: str = "same"
) -> Tensor:
    """kornia's function: the map of SSIM, without its `eps`."""
    return as_theirs(1 - _distance(img1, img2, window_size, max_val, eps, padding, 4, "map"), img1, img2)


class SSIM(_SSIM):
    """kornia's module, see :func:`ssim`."""

    def forward(self, img1: Tensor, img2: Tensor) -> Tensor:
        return ssim(img1, img2, self.window_size, self.max_val, self.eps, self.padding)


@hands_on("kornia.metrics.ssim3d", _metrics.ssim3d)
def ssim3d(
    img1: Tensor, img2: Tensor, window_size: int, max_val: float = 1.0, eps: float = 1e-12, padding: str = "same"
) -> Tensor:
    """kornia's function: the map of SSIM of volumes ``[B, C, D, H, W]``, without its `eps`."""
    return as_theirs(1 - _distance(img1, img2, window_size, max_val, eps, padding, 5, "map"), img1, img2)


class SSIM3D(_SSIM3D):
    """kornia's module, see :func:`ssim3d`."""

    def forward(self, img1: Tensor, img2: Tensor) -> Tensor:
        return ssim3d(img1, img2, self.window_size, self.max_val, self.eps, self.padding)


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


class MS_SSIMLoss(_MS_SSIMLoss):
    """kornia's module: SSIM's terms under Gaussians of several widths at full size, and blurred absolute differences.

    Each Gaussian is filtered along one axis at a time, where kornia's window has two: 66 products for 1089.
    """

    def __init__(self, sigmas: Any = (0.5, 1.0, 2.0, 4.0, 8.0), *args: Any, **options: Any) -> None:
        super().__init__(sigmas, *args, **options)
        self._sigmas = tuple(sigmas)

    @hands_on("kornia.losses.MS_SSIMLoss", _MS_SSIMLoss.forward)
    def forward(self, img1: Tensor, img2: Tensor) -> Tensor:
        check_plain(img1, img2)
        if img1.ndim != 4 or img1.shape != img2.shape or self.reduction not in ("mean", "sum", "none"):
            raise NotServed(f"images {tuple(img1.shape)} and {tuple(img2.shape)}, reduction {self.reduction!r}")
        if not self.DR > 0 or not self.C1 > 0 or not self.C2 > 0 or img1.numel() == 0:
            raise NotServed(f"data_range {self.DR!r}, constants {self.C1!r}, {self.C2!r}")
        window, dtype = (
            2 * self.pad + 1,
            torch.promote_types(torch.promote_types(img1.dtype, img2.dtype), torch.float32),
        )
        x, y = img1.to(dtype), img2.to(dtype)
        options = {"k1": self.C1**0.5 / self.DR, "k2": self.C2**0.5 / self.DR, "data_range": self.DR}
        similar: Any = 1
        for i, sigma in enumerate(self._sigmas):
            last = i == len(self._sigmas) - 1
            loss = losses.ssim_loss(y, x, window=window, sigma=sigma, reduction="map", luminance=last, **options)
            similar = similar * (1 - loss)
        blurred = (x - y).abs().mean(1, keepdim=True)
        taps = self._fspecial_gauss_1d(window, self._sigmas[-1], x.device, dtype)
        blurred = F.conv2d(blurred, taps.view(1, 1, -1, 1), padding=(self.pad, 0))
        blurred = F.conv2d(blurred, taps.view(1, 1, 1, -1), padding=(0, self.pad)).squeeze(1)
        loss = self.alpha * (1 - similar.mean(1)) + (1 - self.alpha) * blurred / self.DR
        loss = self.compensation * loss
        return as_theirs(loss if self.reduction == "none" else getattr(loss, self.reduction)(), img1, img2)


SWAPS = {
    "kornia.losses.total_variation": total_variation,
    "kornia.losses.TotalVariation": TotalVariation,
    "kornia.losses.ssim_loss": ssim_loss,
    "kornia.losses.SSIMLoss": SSIMLoss,
    "kornia.losses.ssim3d_loss": ssim3d_loss,
    "kornia.losses.SSIM3DLoss": SSIM3DLoss,
    "kornia.losses.MS_SSIMLoss": MS_SSIMLoss,
    "kornia.metrics.ssim": ssim,
    "kornia.metrics.SSIM": SSIM,
    "kornia.metrics.ssim3d": ssim3d,
    "kornia.metrics.SSIM3D": SSIM3D,
    "kornia.metrics.psnr": psnr,
    "kornia.losses.psnr_loss": psnr_loss,
    "kornia.losses.PSNRLoss": PSNRLoss,
    "kornia.losses.inverse_depth_smoothness_loss": inverse_depth_smoothness_loss,
    "kornia.losses.InverseDepthSmoothnessLoss": InverseDepthSmoothnessLoss,
}
LEFT = {"kornia.losses.charbonnier_loss": "sqrt(d^2 + 1) - 1 would lose the digits of small d as a difference"}
