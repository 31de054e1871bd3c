"""MS-SSIM loss: structural similarity at several scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import Loss, check_not_empty, check_reduction, reduce, result_dtype
from ..core.checks import check_choice, check_numbers
from ..core.entry import takes_input_and_target
from ..core.traced import number
from .ssim import no_sums, ssim_sums
from .ssim_checks import (
    PADDINGS,
    SSIM_HINTS,
    NegativeImages,
    check_axes,
    check_constants,
    check_pair,
    check_window_fits,
)
from .ssim_reference import Axis

LEVEL_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
ODD_SIDES = ("zeros", "repeat", "drop")


def _power(base: Tensor, exponent: float) -> Tensor:
    """max(base, 0) ** exponent with gradient 0 where base <= 0; NaN stays NaN."""
    low = base <= 0
    powers = torch.where(low, torch.ones_like(base), base).pow(number(exponent, base))
    return torch.where(low, torch.zeros_like(base), powers)


def halved(image: Tensor, odd_sides: str) -> Tensor:
    """Means of 2x2 pixels, or 2x2x2; `odd_sides` as in :func:`ms_ssim_loss`."""
    pool = F.avg_pool2d if image.ndim == 4 else F.avg_pool3d
    odd = [side % 2 for side in image.shape[2:]]
    if odd_sides == "repeat" and any(odd):
        image = F.pad(image, [1, 0] * len(odd), mode="replicate")
    return pool(image, 2, padding=odd if odd_sides == "zeros" else 0)


def _check_sizes(image: Tensor, axes: Sequence[Axis], odd_sides: str, levels: int) -> None:
    """That the last level has pixels left, and room for "valid" windows."""
    sides = list(image.shape[2:])
    for _ in range(levels - 1):
        more = {"zeros": [side % 2 for side in sides], "drop": [0] * len(sides)}
        more["repeat"] = [max(more["zeros"])] * len(sides)
        sides = [(side + one) // 2 for side, one in zip(sides, more[odd_sides], strict=True)]
    if not axes[0].same:
        check_window_fits(image, axes, sides, levels)
    elif min(sides) < 1 and image.numel() > 0:
        raise ValueError(f"level_weights: {levels} levels leave nothing of images of {tuple(image.shape[2:])} pixels")


@takes_input_and_target(hints=SSIM_HINTS)
def ms_ssim_loss(
    image: Tensor,
    image_pred: Tensor,
    *,
    window: int | Sequence[int] = 11,
    sigma: float | Sequence[float] = 1.5,
    data_range: float | Sequence[float] = 1.0,
    padding: str = "valid",
    k1: float = 0.01,
    k2: float = 0.03,
    level_weights: Sequence[float] = LEVEL_WEIGHTS,
    odd_sides: str = "zeros",
    reduction: str = "mean",
) -> Tensor:
    r"""One minus the multi-scale structural similarity (MS-SSIM) of a target image and a predicted one.

    Per image and channel, with the mean contrast-structure :math:`cs_l` of each level and the mean SSIM of the last,
    each level half the size of the one before (means of 2x2 pixels, of volumes 2x2x2; `odd_sides`)::

        loss = 1 - mean_c prod_l max(cs_l, 0)^w_l * max(ssim_last, 0)^w_last

    Args:
        image: target ``[N, C, H, W]``, or volumes ``[N, C, D, H, W]``, any floating-point dtype, values in
            `data_range`. As a keyword also `target`.
        image_pred: prediction of the same shape. Both may need gradients. As a keyword also `input`, torch's name.
        window, sigma, data_range, k1, k2: as in :func:`ssim_loss`, at every level. Images far from 0 (from 100 times
            their range on) need (low, high), which is subtracted before the levels are made: means of 2x2 pixels in
            float32 lose digits that no level can find again.
        padding: ``"valid"`` (the default, as pytorch-msssim: the window must fit into the last level, so that 11
            pixels and five levels need sides of more than 160 pixels) or ``"same"`` (zeros, any size).
        level_weights: exponent of each level, finest first, >= 0; its length is the number of levels.
        odd_sides: what a halving does with an odd side. ``"zeros"``, as pytorch-msssim: a row of zeros before the first
            one counts. ``"repeat"``, as piq: the first row counts twice (with any odd side in all of them; the last of
            an even one is then left out). ``"drop"``, as torchmetrics: the last row is left out.
        reduction: ``"mean"`` over the batch, ``"none"`` per image ``[N]``, or ``"sum"`` of these.

    Returns:
        float32 (float64 for float64 inputs), in [0, 1]: a scalar, or ``[N]``. A level whose mean is not positive makes
        the loss of that channel 1, with gradient 0.

    Raises:
        TypeError: an argument is no floating-point tensor. ValueError: shapes, devices or options do not fit, or
            ``"mean"`` of an empty batch.

    Source: Wang, Simoncelli and Bovik, "Multi-scale structural similarity for image quality assessment", Asilomar 2003.

    Example:
        >>> ms_ssim_loss(torch.ones(1, 1, 176, 176), torch.ones(1, 1, 176, 176)).item()
        0.0
    """
    check_pair(image, image_pred)
    dtype = result_dtype(image, image_pred)
    check_choice("padding", padding, PADDINGS)
    axes = check_axes(window, sigma, padding == "same", image)
    constants = check_constants(data_range, k1, k2, dtype)
    check_choice("odd_sides", odd_sides, ODD_SIDES)
    check_reduction(reduction)
    level_weights = check_numbers("level_weights", level_weights, 0)
    if not level_weights:
        raise ValueError("level_weights: expected at least one number, got none")
    _check_sizes(image, axes, odd_sides, len(level_weights))
    if reduction == "mean":
        check_not_empty(image.numel())
    if image.numel() == 0:
        return reduce(no_sums(image, image_pred, dtype), reduction)
    NegativeImages.warn_once(image, data_range)
    x, y = image, image_pred
    if constants.low:  # before the means, which would be rounded as numbers of its size
        x, y, constants = x.to(dtype) - constants.low, y.to(dtype) - constants.low, constants._replace(low=0.0)
    score = torch.ones(x.shape[:2], dtype=dtype, device=x.device)
    last = len(level_weights) - 1
    for level, w in enumerate(level_weights):
        count = 1
        for side, axis in zip(x.shape[2:], axes, strict=True):
            count *= side if axis.same else side - axis.window + 1
        sums = ssim_sums(x, y, None, axes, constants, level < last)
        score = score * _power(1 - sums / count, w)
        if level < last:
            x, y = halved(x.to(dtype), odd_sides), halved(y.to(dtype), odd_sides)
    return reduce(1 - score.mean(1), reduction)


class MSSSIMLoss(Loss):
    """Module form of :func:`ms_ssim_loss`."""

    fn = staticmethod(ms_ssim_loss)
