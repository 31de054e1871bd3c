"""SSIM loss: one minus the structural similarity of two images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import Loss, Op, check_not_empty, check_reduction, reduce, result_dtype, transformed
from ..core.checks import check_choice, check_flag, check_weight
from ..core.entry import takes_input_and_target
from .map_weights import over_weights
from .ssim_checks import (
    PADDINGS,
    REDUCTIONS,
    SSIM_HINTS,
    Constants,
    NegativeImages,
    check_axes,
    check_constants,
    check_pair,
    check_window_fits,
    reflected,
)
from .ssim_reference import Axis, Inputs, ssim_reference
from .ssim_volume import general_ssim

LARGEST_WINDOW = 11  # of the kernels; larger ones go to the reference
KEEP_GRADIENTS = 8  # of `keep`, see Saved
LARGE_WEIGHT = 1e25  # the sum of as many smaller ones as memory holds fits float32


class Saved(NamedTuple):
    """What `keep` asks for, of which gradients: 1 image, 2 image_pred, 3 both, 0 none.

    With KEEP_GRADIENTS, the gradients of the sums themselves, each in the order of its image's memory if that is
    channels_last; else the partial derivatives of the map.
    """

    kept: Tensor


class Grads(NamedTuple):
    image: Tensor
    image_pred: Tensor


class Needs(NamedTuple):
    image: bool
    image_pred: bool


def _ssim_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    images, channels, height, width = x.image.shape
    count, cut = (x.keep & 1) + (x.keep >> 1 & 1), 0 if x.same else x.window - 1
    kept: tuple[int, ...] = (0,)
    if x.keep & KEEP_GRADIENTS:
        kept = (count, x.image.numel())
    elif x.keep:
        kept = (2 + count, height - cut, images * channels * (width - cut))
    out = x.image.new_empty(x.image.shape[:2], dtype=torch.float32)
    return out, Saved(x.image.new_empty(kept, dtype=torch.float32))


def _ssim_bwd(grad: Tensor, saved: Saved, x: Inputs, needs: Needs) -> Grads:
    none = x.image.new_empty(0)
    return Grads(
        image=torch.empty_like(x.image) if needs.image else none,
        image_pred=torch.empty_like(x.image_pred) if needs.image_pred else none,
    )


def _why_not(x: Inputs) -> str | None:
    if x.window > LARGEST_WINDOW:
        return f"the kernels take windows of up to {LARGEST_WINDOW} pixels, not {x.window}"
    dtypes = x.image.dtype, x.image_pred.dtype
    return None if len(set(dtypes)) == 1 else f"the kernels take images of one dtype, not {dtypes[0]} and {dtypes[1]}"


_ssim = Op(
    "ssim",
    fwd=_ssim_fwd,
    bwd=_ssim_bwd,
    reference=ssim_reference,
    grads=Grads._fields,
    outputs=("out", *Saved._fields),
    triton="image.kernels.ssim",
    declines=_why_not,
)


def _sums(image: Tensor, image_pred: Tensor, *options: Any) -> Tensor:
    """The op; the forward keeps what the backward needs: the CPU kernels the gradients, the others partials."""
    keep = int(image.requires_grad) + 2 * int(image_pred.requires_grad) if torch.is_grad_enabled() else 0
    if keep and _ssim.backend(image, image_pred, *options) == "cpp":
        keep += KEEP_GRADIENTS
    return _ssim(image, image_pred, *options, keep)


def ssim_sums(
    image: Tensor, image_pred: Tensor, weight: Tensor | None, axes: Sequence[Axis], constants: Constants,
    structure_only: bool,
) -> Tensor:  # fmt: skip
    """Sums ``[N, C]`` of one minus SSIM: of images with one window for both axes by their own op, else in general."""
    if len(axes) == 2 and axes[0] == axes[1]:
        return _sums(image, image_pred, weight, *axes[0], *constants, structure_only)
    return general_ssim(image, image_pred, weight, axes, constants, structure_only, as_map=False)


def no_sums(image: Tensor, image_pred: Tensor, dtype: torch.dtype) -> Tensor:
    """Of empty images: 0 for each, within the graph."""
    return (image * image_pred).to(dtype).flatten(1).sum(1)


def map_weight(weight: Tensor, image: Tensor, cuts: Sequence[int]) -> Tensor:
    """The weights of the SSIM map, of the image's rank: broadcast over its sides, but not over batch and channels."""
    check_weight("weight", weight, "image", image)
    weight = weight.reshape((1,) * (image.ndim - weight.ndim) + weight.shape).expand(-1, -1, *image.shape[2:])
    inner = [slice(cut, side - cut) for side, cut in zip(image.shape[2:], cuts, strict=True)]
    weight = weight[(slice(None), slice(None), *inner)]
    if weight.dtype in (torch.bool, torch.float16) or weight.numel() == 0:
        return weight
    largest = weight.amax()  # a mean is the same with weights by the largest one; their sum must fit float32
    looks = weight.device.type == "cpu" and type(weight) is Tensor and not torch.compiler.is_compiling()
    if looks and not transformed() and largest.item() < LARGE_WEIGHT:
        return weight
    return weight * torch.where(largest < LARGE_WEIGHT, 1.0, 1 / largest)


@takes_input_and_target(hints=SSIM_HINTS, planned=True)
def ssim_loss(
    image: Tensor,
    image_pred: Tensor,
    *,
    window: int | Sequence[int] = 11,
    sigma: float | Sequence[float] = 1.5,
    data_range: float | Sequence[float] = 1.0,
    padding: str = "same",
    k1: float = 0.01,
    k2: float = 0.03,
    weight: Tensor | None = None,
    reduction: str = "mean",
    luminance: bool = True,
) -> Tensor:
    r"""One minus the mean structural similarity (SSIM) of a target image and a predicted one.

    Where the window leaves the image it sees zeros, ``padding="same"``, as in fused-ssim and the first SSIM losses for
    PyTorch. Other libraries have other defaults: pytorch-msssim takes whole windows only (here ``padding="valid"``),
    kornia and torchmetrics reflect the image (``padding="reflect"``).

    With Gaussian-weighted local means, variances and covariance, :math:`C_i = (k_i \cdot range)^2`::

        SSIM = (2 mx my + C1) (2 sxy + C2) / ((mx^2 + my^2 + C1) (sx^2 + sy^2 + C2)),    loss = 1 - mean SSIM

    Args:
        image: target ``[N, C, H, W]``, or volumes ``[N, C, D, H, W]``, any floating-point dtype, values in
            `data_range`. As a keyword also `target`.
        image_pred: prediction of the same shape. Both may need gradients. As a keyword also `input`, torch's name.
        window: side of the Gaussian window in pixels, odd, at most 65535, or one for each axis, ``(H, W)`` or
            ``(D, H, W)``. Above 11 the reference runs instead of the kernels. Of a window of one pixel (1, or a `sigma`
            below 0.166) only the luminance term is left.
        sigma: its standard deviation in pixels, > 0, or one for each axis.
        data_range: ``(low, high)``, the least and the largest value that images can have: SSIM is that of the images
            minus `low`, in a range of high - low. Or a number > 0, for images from 0 up to it. **Images in [-1, 1]
            need** ``data_range=(-1, 1)``: with 2 an image and its negative would count as nearly alike, since SSIM
            takes the means of images for positive. (The first call on the CPU looks, and warns of values below 0.)
        padding: ``"same"`` pads with zeros, with (low, high) with `low`: SSIM at every pixel. ``"valid"`` takes whole
            windows only, at least one must fit. ``"reflect"`` pads with the image's own pixels, the outermost not
            repeated, as ``F.pad(mode="reflect")`` does, in copies of the images: sides longer than half a window.
        k1, k2: stabilisers, > 0. (k range)^2 must lie between 1e-36 and 1e36 (1e-289 and 1e289 in float64).
        weight: non-negative weights of the SSIM map, or a mask (bool, True counts 1), broadcastable to `image`
            (``"valid"`` uses its centre), no gradient. Means become weighted sum / sum of weights, 0 if that is 0. A
            weight of 0 excludes: what the map is there, even NaN, has no effect on the value or a gradient. The windows
            themselves are not cut: they see pixels up to half a window from a weighted one.
        reduction: ``"mean"`` over the batch, ``"none"`` per image ``[N]``, ``"sum"`` of these, or ``"map"``: one minus
            SSIM at every pixel, of the image's shape (with ``"valid"`` that of the whole windows), without `weight`.
        luminance: False leaves the first factor out, so that contrast and structure are compared alone.

    Returns:
        float32 (float64 for float64 inputs), in [0, 2]: a scalar, ``[N]`` or a map. Constant images have finite
        gradients. Volumes, windows that differ from axis to axis, and maps have C++ kernels; on a GPU PyTorch's
        operators compute them, large volumes slab by slab.
        Images far from 0 keep their digits: what their pixels have in common is subtracted before it is squared
        (images of 1000 to 1001 with a data_range of 1 have a relative error below 1e-3, as those from 0 to 1).

    Raises:
        TypeError: an argument is no floating-point tensor. ValueError: shapes, devices or options do not fit (even
            window, window larger than a ``"valid"`` image, low >= high), `weight` requires a gradient or comes with
            ``"map"``, or ``"mean"`` of an empty batch.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity", TIP 2004.

    Example:
        >>> ssim_loss(torch.ones(1, 3, 16, 16), torch.ones(1, 3, 16, 16)).item()
        0.0
    """
    check_pair(image, image_pred)
    dtype = result_dtype(image, image_pred)
    check_choice("padding", padding, (*PADDINGS, "reflect"))
    axes = check_axes(window, sigma, padding == "same", image)
    constants = check_constants(data_range, k1, k2, dtype)
    check_reduction(reduction, REDUCTIONS)
    luminance = check_flag("luminance", luminance)
    if padding == "valid":
        check_window_fits(image, axes)
    if reduction == "mean":
        check_not_empty(image.numel())
    if reduction == "map" and weight is not None:
        raise ValueError("weight: a map is not weighted; multiply it, or use another reduction")
    NegativeImages.warn_once(image, data_range)
    cuts = [axis.window // 2 if padding == "valid" else 0 for axis in axes]
    mine = None if weight is None else map_weight(weight, image, cuts)
    shape = *image.shape[:2], *(side - 2 * cut for side, cut in zip(image.shape[2:], cuts, strict=True))
    if padding == "reflect":
        image, image_pred = reflected(image, axes), reflected(image_pred, axes)
    if reduction == "map":
        if image.numel() == 0:
            return (image * image_pred).to(dtype).sum() + image.new_zeros(shape, dtype=dtype)
        return general_ssim(image, image_pred, None, axes, constants, not luminance, as_map=True)
    if image.numel() == 0:
        sums = no_sums(image, image_pred, dtype)
    else:
        spread = None if mine is None else mine.expand(shape)
        sums = ssim_sums(image, image_pred, spread, axes, constants, not luminance).sum(1)
    if mine is None:
        return reduce(sums / max(math.prod(shape[1:]), 1), reduction)
    counts = mine.flatten(1).sum(1, dtype=dtype) * (image.shape[1] // max(mine.shape[1], 1))
    if reduction == "mean":
        counts = counts.expand(image.shape[0])
        sums, counts = sums.sum(), counts.sum()
    values = over_weights(sums, counts)
    return values if reduction == "mean" else reduce(values, reduction)


class SSIMLoss(Loss):
    """Module form of :func:`ssim_loss`."""

    fn = staticmethod(ssim_loss)
