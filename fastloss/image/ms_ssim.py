"""MS-SSIM loss: structural similarity at several scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import Loss, check_not_empty, check_reduction, reduce, result_dtype
from ..core.checks import check_numbers
from ..core.entry import takes_input_and_target
from ..core.traced import number
from .ssim import _no_sums, _sums
from .ssim_checks import SSIM_HINTS, NegativeImages, check_pair, check_ssim_options, check_window_fits

LEVEL_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def _power(base: Tensor, exponent: float) -> Tensor:
    """max(base, 0) ** exponent with gradient 0 where base <= 0; NaN stays NaN."""
    low = base <= 0
    powers = torch.where(low, torch.ones_like(base), base).pow(number(exponent, base))
    return torch.where(low, torch.zeros_like(base), powers)


@takes_input_and_target(hints=SSIM_HINTS)
def ms_ssim_loss(
    image: Tensor,
    image_pred: Tensor,
    *,
    window: int = 11,
    sigma: float = 1.5,
    data_range: float | Sequence[float] = 1.0,
    padding: str = "valid",
    k1: float = 0.01,
    k2: float = 0.03,
    level_weights: Sequence[float] = LEVEL_WEIGHTS,
    reduction: str = "mean",
) -> Tensor:
    r"""One minus the multi-scale structural similarity (MS-SSIM) of a target image and a predicted one.

    Per image and channel, with the mean contrast-structure :math:`cs_l` of each level and the mean SSIM of the last,
    each level half the size of the one before (2x2 means, zero-padded where a side is odd)::

        loss = 1 - mean_c prod_l max(cs_l, 0)^w_l * max(ssim_last, 0)^w_last

    Args:
        image: target ``[N, C, H, W]``, any floating-point dtype, values in `data_range`. As a keyword also `target`.
        image_pred: prediction of the same shape. Both may need gradients. As a keyword also `input`, torch's name.
        window, sigma, data_range, k1, k2: as in :func:`ssim_loss`, at every level. Images far from 0 (from 100 times
            their range on) need (low, high), which is subtracted before the levels are made: means of 2x2 pixels in
            float32 lose digits that no level can find again.
        padding: ``"valid"`` (the default, as pytorch-msssim: the window must fit into the last level, so that 11
            pixels and five levels need sides of more than 160 pixels) or ``"same"`` (zeros, any size).
        level_weights: exponent of each level, finest first, >= 0; its length is the number of levels.
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
    window, sigma, same, c1, c2, low = check_ssim_options(window, sigma, data_range, padding, k1, k2, dtype)
    check_reduction(reduction)
    level_weights = check_numbers("level_weights", level_weights, 0)
    if not level_weights:
        raise ValueError("level_weights: expected at least one number, got none")
    if not same:
        check_window_fits(image, window, len(level_weights))
    if reduction == "mean":
        check_not_empty(image.numel())
    if image.numel() == 0:
        return reduce(_no_sums(image, image_pred, dtype), reduction)
    NegativeImages.warn_once(image, data_range)
    x, y = image, image_pred
    if low:  # before the means, which would be rounded as numbers of its size
        x, y, low = x.to(dtype) - low, y.to(dtype) - low, 0.0
    score = torch.ones(x.shape[:2], dtype=dtype, device=x.device)
    last = len(level_weights) - 1
    for level, w in enumerate(level_weights):
        cut = 0 if same else window - 1
        count = (x.shape[2] - cut) * (x.shape[3] - cut)
        sums = _sums(x, y, None, window, sigma, same, c1, c2, low, level < last)
        score = score * _power(1 - sums / count, w)
        if level < last:
            x, y = x.to(dtype), y.to(dtype)
            odd = (x.shape[2] % 2, x.shape[3] % 2)
            x, y = F.avg_pool2d(x, 2, padding=odd), F.avg_pool2d(y, 2, padding=odd)
    return reduce(1 - score.mean(1), reduction)


class MSSSIMLoss(Loss):
    """Module form of :func:`ms_ssim_loss`."""

    fn = staticmethod(ms_ssim_loss)
