"""SSIM loss: one minus the structural similarity of two images, at one scale or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import (
    check_choice,
    check_integer,
    check_number,
    check_numbers,
    check_same_shape,
    check_tensor,
    check_weight,
)
from ..core import Loss, Op, check_not_empty, check_reduction, full_precision, reduce, result_dtype
from ..inference import takes_inference_tensors
from ..traced import number

PADDINGS = ("same", "valid")
LARGEST_WINDOW = 11  # of the kernels; larger ones go to the reference
KEEP_GRADIENTS = 8  # of `keep`, see _ssim_fwd
LEVEL_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def _gaussian(window: int, sigma: float, like: Tensor) -> Tensor:
    """The window's taps, rounded once, made on the device: a copy from the host would wait and break CUDA graphs."""
    exact = torch.float32 if like.device.type == "mps" else torch.float64  # mps has no float64
    x = torch.arange(window, device=like.device, dtype=exact) - window // 2
    g = torch.exp(x * x / (-2 * sigma * sigma))
    return (g / g.sum()).to(like.dtype)


def ssim_distances(
    image: Tensor,
    image_pred: Tensor,
    window: int,
    sigma: float,
    same: bool,
    c1: float,
    c2: float,
) -> tuple[Tensor, Tensor]:
    """One minus the luminance and one minus the contrast-structure map, in float32 (float64 for float64).

    Four moments do: means and variances of a = x + y and d = x - y, for mx^2 + my^2 = (ma^2 + md^2) / 2 and
    2 mx my = (ma^2 - md^2) / 2, and likewise for the variances. So nothing cancels where the images are close.
    """
    dtype = result_dtype(image, image_pred)
    x, y = image.to(dtype), image_pred.to(dtype)
    a, d = x + y, x - y
    channels = 4 * x.shape[1]  # all four moments as channels: at least 4 groups, which CUDA never gives to TF32
    g = _gaussian(window, sigma, x)
    pad = window // 2 if same else 0
    with full_precision(x):  # a half-precision convolution would lose the variances
        moments = torch.cat([a, d, a * a, d * d], 1)
        moments = F.conv2d(moments, g.view(1, 1, -1, 1).expand(channels, 1, -1, 1), padding=(pad, 0), groups=channels)
        moments = F.conv2d(moments, g.view(1, 1, 1, -1).expand(channels, 1, 1, -1), padding=(0, pad), groups=channels)
    mean_a, mean_d, square_a, square_d = moments.chunk(4, 1)
    mean_aa, mean_dd = mean_a * mean_a, mean_d * mean_d
    var_a, var_d = square_a - mean_aa, square_d - mean_dd
    return mean_dd / (0.5 * (mean_aa + mean_dd) + c1), var_d / (0.5 * (var_a + var_d) + c2)


def ssim_reference(
    image: Tensor,
    image_pred: Tensor,
    weight: Tensor | None,
    window: int,
    sigma: float,
    same: bool,
    c1: float,
    c2: float,
    structure_only: bool,
    keep: int = 0,
) -> Tensor:
    """The definition: (weighted) sums of 1 - SSIM, or of one minus its contrast-structure term alone, ``[N, C]``."""
    luminance, structure = ssim_distances(image, image_pred, window, sigma, same, c1, c2)
    loss = structure if structure_only else luminance + structure - luminance * structure
    if weight is not None:
        loss = loss * weight.to(loss.dtype)
    return loss.flatten(2).sum(2)


def _ssim_fwd(
    image: Tensor,
    image_pred: Tensor,
    weight: Tensor | None,
    window: int,
    sigma: float,
    same: bool,
    c1: float,
    c2: float,
    structure_only: bool,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """`keep`: what the backward is to find, for which gradients: 1 image, 2 image_pred, 3 both, 0 none.

    With KEEP_GRADIENTS, the gradients of the sums themselves, each in the order of its image's memory if that is
    channels_last; else the partial derivatives of the map.
    """
    images, channels, height, width = image.shape
    count, cut = (keep & 1) + (keep >> 1 & 1), 0 if same else window - 1
    partials = (2 + count, height - cut, images * channels * (width - cut)) if keep else (0,)
    return (
        image.new_empty(image.shape[:2], dtype=torch.float32),
        image.new_empty((count, image.numel()) if keep & KEEP_GRADIENTS else partials, dtype=torch.float32),
    )


def _ssim_bwd(
    grad: Tensor,
    kept: Tensor,
    image: Tensor,
    image_pred: Tensor,
    weight: Tensor | None,
    window: int,
    sigma: float,
    same: bool,
    c1: float,
    c2: float,
    structure_only: bool,
    keep: int,
    needs_image: bool,
    needs_image_pred: bool,
) -> tuple[Tensor, Tensor]:
    none = image.new_empty(0)
    return (
        torch.empty_like(image) if needs_image else none,
        torch.empty_like(image_pred) if needs_image_pred else none,
    )


def _kernels_take(
    image: Tensor,
    image_pred: Tensor,
    weight: Tensor | None,
    window: int,
    sigma: float,
    same: bool,
    c1: float,
    c2: float,
    structure_only: bool,
    keep: int = 0,
) -> bool:
    return window <= LARGEST_WINDOW and image.dtype == image_pred.dtype


_ssim = Op(
    "ssim",
    fwd=_ssim_fwd,
    bwd=_ssim_bwd,
    reference=ssim_reference,
    grads=("image", "image_pred"),
    outputs=("out", "kept"),
    triton="ssim",
    takes=_kernels_take,
)


def _sums(image: Tensor, image_pred: Tensor, *options: Any) -> Tensor:
    """The op; the forward keeps what the backward needs: the CPU kernels the gradients, the others partials."""
    keep = int(image.requires_grad) + 2 * int(image_pred.requires_grad) if torch.is_grad_enabled() else 0
    if keep and _ssim.backend(image, image_pred, *options) == "cpp":
        keep += KEEP_GRADIENTS
    return _ssim(image, image_pred, *options, keep)


@takes_inference_tensors
def ssim_loss(
    image: Tensor,
    image_pred: Tensor,
    *,
    window: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
    padding: str = "same",
    k1: float = 0.01,
    k2: float = 0.03,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""One minus the mean structural similarity (SSIM) of a target image and a predicted one.

    With Gaussian-weighted local means, variances and covariance, :math:`C_i = (k_i \cdot range)^2`::

        SSIM = (2 mx my + C1) (2 sxy + C2) / ((mx^2 + my^2 + C1) (sx^2 + sy^2 + C2)),    loss = 1 - mean SSIM

    Args:
        image: target ``[N, C, H, W]``, any floating-point dtype, values in a range `data_range` long.
        image_pred: prediction of the same shape. Both may need gradients.
        window: side of the Gaussian window in pixels, odd. Above 11 the reference runs instead of the kernels.
        sigma: its standard deviation in pixels, > 0.
        data_range: largest value minus smallest that images can have (1 for [0, 1], 2 for [-1, 1]), > 0.
        padding: ``"same"`` pads with zeros, SSIM at every pixel (as fused-ssim); ``"valid"`` takes whole windows only
            (as pytorch-msssim), at least one must fit.
        k1, k2: stabilisers, > 0.
        weight: non-negative weights of the SSIM map, broadcastable to `image` (``"valid"`` uses its centre), no
            gradient. Means become weighted sum / sum of weights, 0 if that is 0. The windows themselves are not cut.
        reduction: ``"mean"`` over the batch, ``"none"`` per image ``[N]``, or ``"sum"`` of these.

    Returns:
        float32 (float64 for float64 inputs), in [0, 2]: a scalar, or ``[N]``. Constant images have finite gradients.

    Raises:
        TypeError: an argument is no floating-point tensor. ValueError: shapes, devices or options do not fit (even
            window, window larger than a ``"valid"`` image), `weight` requires a gradient, or ``"mean"`` of an empty
            batch.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity", TIP 2004.

    Example:
        >>> ssim_loss(torch.ones(1, 3, 16, 16), torch.ones(1, 3, 16, 16)).item()
        0.0
    """
    _check_pair(image, image_pred)
    window, sigma, same, c1, c2 = check_ssim_options(window, sigma, data_range, padding, k1, k2)
    check_reduction(reduction)
    if not same:
        check_window_fits(image, window, 1)
    if reduction == "mean":
        check_not_empty(image.numel())
    cut = 0 if same else window // 2
    height, width = image.shape[2] - 2 * cut, image.shape[3] - 2 * cut
    if weight is not None:
        check_weight("weight", weight, "image", image)
        weight = weight.expand(image.shape)[:, :, cut : cut + height, cut : cut + width]
    if image.numel() == 0:
        sums = (image * image_pred).to(result_dtype(image, image_pred)).flatten(1).sum(1)
    else:
        sums = _sums(image, image_pred, weight, window, sigma, same, c1, c2, False).sum(1)
    if weight is None:
        return reduce(sums / max(image.shape[1] * height * width, 1), reduction)
    counts = weight.to(sums.dtype).flatten(1).sum(1)
    if reduction == "mean":
        sums, counts = sums.sum(), counts.sum()
    values = sums / torch.where(counts == 0, torch.ones_like(counts), counts)
    return values if reduction == "mean" else reduce(values, reduction)


class SSIMLoss(Loss):
    """Module form of :func:`ssim_loss`."""

    fn = staticmethod(ssim_loss)


def _power(base: Tensor, exponent: float) -> Tensor:
    """max(base, 0) ** exponent with gradient 0 where base <= 0; NaN stays NaN."""
    low = base <= 0
    powers = torch.where(low, torch.ones_like(base), base).pow(number(exponent, base))
    return torch.where(low, torch.zeros_like(base), powers)


@takes_inference_tensors
def ms_ssim_loss(
    image: Tensor,
    image_pred: Tensor,
    *,
    window: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
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
        image: target ``[N, C, H, W]``, any floating-point dtype, values in a range `data_range` long.
        image_pred: prediction of the same shape. Both may need gradients.
        window, sigma, data_range, k1, k2: as in :func:`ssim_loss`, at every level.
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
    _check_pair(image, image_pred)
    window, sigma, same, c1, c2 = check_ssim_options(window, sigma, data_range, padding, k1, k2)
    check_reduction(reduction)
    level_weights = check_numbers("level_weights", level_weights, 0)
    if not level_weights:
        raise ValueError("level_weights: expected at least one number, got none")
    if not same:
        check_window_fits(image, window, len(level_weights))
    dtype = result_dtype(image, image_pred)
    if image.numel() == 0:
        return reduce((image * image_pred).to(dtype).flatten(1).sum(1), reduction)
    x, y = image, image_pred
    score = torch.ones(x.shape[:2], dtype=dtype, device=x.device)
    last = len(level_weights) - 1
    for level, w in enumerate(level_weights):
        cut = 0 if same else window - 1
        count = (x.shape[2] - cut) * (x.shape[3] - cut)
        sums = _sums(x, y, None, window, sigma, same, c1, c2, level < last)
        score = score * _power(1 - sums / count, w)
        if level < last:
            x, y = x.to(dtype), y.to(dtype)
            odd = (x.shape[2] % 2, x.shape[3] % 2)
            x, y = F.avg_pool2d(x, 2, padding=odd), F.avg_pool2d(y, 2, padding=odd)
    return reduce(1 - score.mean(1), reduction)


class MSSSIMLoss(Loss):
    """Module form of :func:`ms_ssim_loss`."""

    fn = staticmethod(ms_ssim_loss)


def _check_pair(image: Tensor, image_pred: Tensor) -> None:
    check_tensor("image", image, 4)
    check_tensor("image_pred", image_pred, 4)
    check_same_shape("image", image, "image_pred", image_pred)


def check_ssim_options(
    window: int, sigma: float, data_range: float, padding: str, k1: float, k2: float
) -> tuple[int, float, bool, float, float]:
    """Window and sigma, whether the padding is "same", and the two stabilising constants."""
    window = check_integer("window", window, 1, wanted="an odd integer")
    if window % 2 == 0:
        raise ValueError(f"window: expected an odd integer >= 1, got {window}")
    numbers = {"sigma": sigma, "data_range": data_range, "k1": k1, "k2": k2}
    sigma, data_range, k1, k2 = (check_number(name, value, 0, open_low=True) for name, value in numbers.items())
    check_choice("padding", padding, PADDINGS)
    return window, sigma, padding == "same", (k1 * data_range) ** 2, (k2 * data_range) ** 2


def check_window_fits(image: Tensor, window: int, levels: int) -> None:
    """Every halving rounds up, so the last of `levels` is ceil(side / 2**(levels - 1)) pixels."""
    height, width = (-(-side // 2 ** (levels - 1)) for side in image.shape[2:])
    if min(height, width) < window:
        where = "" if levels == 1 else f", which is {height} x {width} at level {levels}"
        raise ValueError(
            f"window: expected at most the image's sides with padding='valid', got {window} for images of "
            f"{image.shape[2]} x {image.shape[3]} pixels{where}; use padding='same' or a smaller window"
        )
