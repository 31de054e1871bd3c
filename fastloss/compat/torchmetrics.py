"""torchmetrics' functional SSIM and total variation (torchmetrics 1.9), by fastloss's losses.

``structural_similarity_index_measure`` pads by reflection: whole windows of images that are reflected at their borders
see the same. Its metric classes and MS-SSIM call functions of its own below these, and are left to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..image import smoothness_loss, ssim_loss
from ._common import NotServed, as_theirs, check_plain, hands_on, reflected, required

_theirs = required("torchmetrics.functional.image")
_REDUCTIONS = {"elementwise_mean": "mean", "sum": "sum", "none": "none", None: "none"}


@hands_on("torchmetrics.functional.image.total_variation", _theirs.total_variation)
def total_variation(img: Tensor, reduction: str | None = "sum") -> Tensor:
    """torchmetrics' function: the sums of absolute differences of each image, in the dtype of `img`."""
    check_plain(img)
    if img.ndim != 4:
        raise NotServed(f"expected images [N, C, H, W], got {tuple(img.shape)}")
    value = smoothness_loss(img, convention="torchmetrics", reduction="none" if reduction is None else reduction)
    return as_theirs(value, img)


@hands_on("torchmetrics.functional.image.structural_similarity_index_measure",
          _theirs.structural_similarity_index_measure)  # fmt: skip
def structural_similarity_index_measure(
    preds: Tensor,
    target: Tensor,
    gaussian_kernel: bool = True,
    sigma: float | Sequence[float] = 1.5,
    kernel_size: int | Sequence[int] = 11,
    reduction: str | None = "elementwise_mean",
    data_range: float | tuple[float, float] | None = None,
    k1: float = 0.01,
    k2: float = 0.03,
    return_full_image: bool = False,
    return_contrast_sensitivity: bool = False,
) -> Tensor:
    """torchmetrics' function: SSIM with reflect padding, its window as wide as `sigma` says; in `preds`' dtype."""
    check_plain(preds, target)
    if preds.ndim != 4 or not gaussian_kernel or return_full_image or return_contrast_sensitivity:
        raise NotServed("volumes, uniform windows, full images and contrasts")
    if reduction not in _REDUCTIONS:
        raise NotServed(f"reduction {reduction!r}")
    sigma_y, sigma_x = _sides(sigma)
    if sigma_y != sigma_x or any(side <= 0 or side % 2 == 0 for side in _sides(kernel_size)):
        raise NotServed(f"sigma {sigma!r}, kernel_size {kernel_size!r}")
    preds, target, span = _range(preds, target.to(preds.dtype), data_range)
    radius = int(3.5 * sigma_y + 0.5)
    value = 1 - ssim_loss(
        reflected(target, radius), reflected(preds, radius), window=2 * radius + 1, sigma=sigma_y,
        data_range=span, padding="valid", k1=k1, k2=k2, reduction="none",
    )  # fmt: skip
    how = _REDUCTIONS[reduction]
    return as_theirs(value if how == "none" else value.sum() if how == "sum" else value.mean(), preds)


def _sides(option: Any) -> tuple[Any, ...]:
    """An option for height and width."""
    if not isinstance(option, Sequence):
        return option, option
    if len(option) != 2:
        raise NotServed(f"expected 2 sides, got {option!r}")
    return tuple(option)


def _range(preds: Tensor, target: Tensor, data_range: Any) -> tuple[Tensor, Tensor, float]:
    """The images, cut to a range (low, high), and its length; without one that of the images."""
    if isinstance(data_range, tuple):
        low, high = data_range
        return preds.clamp(low, high), target.clamp(low, high), high - low
    if data_range is not None:
        return preds, target, data_range
    if torch.is_grad_enabled() and (preds.requires_grad or target.requires_grad):
        raise NotServed("data_range: None gives its gradient to the largest and smallest pixel")
    spans = [image.amax() - image.amin() for image in (preds, target)]
    return preds, target, max(span.item() for span in spans)


SWAPS = {
    "torchmetrics.functional.image.total_variation": total_variation,
    "torchmetrics.functional.image.structural_similarity_index_measure": structural_similarity_index_measure,
}
LEFT = {
    "torchmetrics.functional.image.multiscale_structural_similarity_index_measure": "means over channels before the "
    "product of the levels",
    "torchmetrics.image.StructuralSimilarityIndexMeasure": "metric classes call torchmetrics' own update functions",
    "torchmetrics.image.TotalVariation": "metric classes call torchmetrics' own update functions",
}
