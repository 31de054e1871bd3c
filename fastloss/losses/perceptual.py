"""Distances between two lists of deep features: the multi-layer perceptual distance and the LPIPS head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice, check_number, check_same_device, check_same_length, check_same_shape, check_tensor
from ..core import Loss, check_not_empty, check_reduction, result_dtype
from .perceptual_ops import distance_call

CRITERIA = ("l1", "l2", "charbonnier", "smooth_l1")


def feature_distance(
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    criterion: str = "l1",
    eps: float = 1e-6,
    beta: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Weighted distance between two lists of features, :math:`\sum_i w_i \cdot \mathrm{mean}\,c(f_i - t_i)`.

    Element by element, with d = f - t::

        "l1"            |d|                  (the default)
        "l2"            d^2
        "charbonnier"   sqrt(d^2 + eps^2)
        "smooth_l1"     d^2 / (2 beta) if |d| < beta, else |d| - beta / 2

    Args:
        features: one tensor a layer, any shapes, float16, bfloat16, float32 or float64, all on one device.
        targets: as many tensors of the same shapes. Both lists may need gradients.
        weights: one finite number a layer; None means 1 for each.
        criterion: the distance, see above.
        eps: smoothing of Charbonnier, in units of the features, > 0.
        beta: threshold of smooth L1, in units of the features, > 0.
        reduction: ``"mean"``: the mean over all elements of a layer, times its weight, added over the layers.
            ``"sum"``: the same with the sum over all elements. ``"none"``: one value a sample, ``[N]``, where the
            first dimension of every layer is N: the mean over the elements of that sample in a layer, times its
            weight, added over the layers; its mean over the samples is ``"mean"``.

    Returns:
        float32 (float64 if any feature is float64), whatever the input dtypes: a scalar, or ``[N]`` for ``"none"``.
        The gradient at d = 0 is 0 for every criterion. With ``"l1"`` the kernels keep two bits an element for the
        backward and neither list, and to autograd that gradient depends on the upstream gradient only.

    Raises:
        TypeError: an argument is no list of floating-point tensors, or a weight is no number. ValueError: lengths,
            shapes (the message names the layer), devices or options do not fit, or a mean over no elements.

    Source: Johnson, Alahi, Fei-Fei, "Perceptual losses for real-time style transfer and super-resolution", ECCV 2016
    (l2); the weighted sum of means over layers is what most training code uses, with ``l1``.

    Example:
        >>> features, targets = [torch.ones(2, 4, 8, 8), torch.ones(2, 8, 4, 4)], [torch.zeros(2, 4, 8, 8)] * 2
        >>> feature_distance(features, [targets[0], 0.5 * features[1]], weights=[1.0, 2.0]).item()
        2.0
    """
    _check_layers(features, targets)
    check_choice("criterion", criterion, CRITERIA)
    check_reduction(reduction)
    check_number("eps", eps, 0, open_low=True)
    check_number("beta", beta, 0, open_low=True)
    if reduction == "none":
        _check_samples(features)
    if weights is None:
        weights = [1.0] * len(features)
    _check_weights(features, weights)
    for feature in features:
        empty_batch = reduction == "none" and feature.shape[0] == 0  # has no sample to give a value for
        if reduction != "sum" and not empty_batch:
            check_not_empty(feature.numel())
    parameter = float(beta if criterion == "smooth_l1" else eps)
    op, args = distance_call(features, targets, weights, criterion, parameter, reduction)
    return op(*args)


def _check_weights(features: Sequence[Tensor], weights: Sequence[float]) -> None:
    _check_list("weights", weights, "numbers, one a layer")
    check_same_length("features", features, "weights", weights)
    for i, weight in enumerate(weights):
        check_number(f"weights[{i}]", weight)


def _check_list(name: str, value: Any, of: str = "tensors, one a layer") -> None:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: expected a list of {of}, got {type(value).__name__}")


def _check_layers(features: Any, targets: Any, ndim: int | None = None) -> None:
    """Two lists of as many tensors, layer by layer of one shape, all on one device."""
    _check_list("features", features)
    _check_list("targets", targets)
    check_same_length("features", features, "targets", targets)
    if len(features) == 0:
        raise ValueError("features: expected at least one layer, got an empty list")
    for i, (feature, target) in enumerate(zip(features, targets, strict=True)):
        check_tensor(f"features[{i}]", feature, ndim)
        check_tensor(f"targets[{i}]", target, ndim)
        check_same_device("features[0]", features[0], f"features[{i}]", feature)
        check_same_shape(f"features[{i}]", feature, f"targets[{i}]", target)


def _check_samples(features: Sequence[Tensor]) -> None:
    """Every layer has the samples in its first dimension."""
    for i, feature in enumerate(features):
        if feature.ndim == 0:
            raise ValueError(f"features[{i}]: expected samples in the first dimension, got a 0-D tensor")
        if feature.shape[0] != features[0].shape[0]:
            raise ValueError(
                f"features[{i}]: expected as many samples as features[0], {features[0].shape[0]}, "
                f"got {feature.shape[0]} (shape {tuple(feature.shape)})"
            )


class FeatureDistance(Loss):
    """Module form of :func:`feature_distance`."""

    fn = staticmethod(feature_distance)


def _unit(x: Tensor, eps: float) -> Tensor:
    """x / (|x| + eps) over channels; 0 with zero gradient where |x| is 0 (sqrt alone would give NaN there)."""
    square = (x * x).sum(dim=1, keepdim=True)
    zero = square == 0
    norm = square.masked_fill(zero, 1.0).sqrt()
    return (x / (norm + eps)).masked_fill(zero, 0.0)


def lpips_reference(
    features: list[Tensor],
    targets: list[Tensor],
    lin_weights: list[Tensor] | None,
    size: list[int] | None,
    eps: float,
) -> Tensor:
    """The definition: the distance of each sample, or the maps of the layers brought to `size` and added."""
    dtype = result_dtype(*features, *targets)
    total = features[0].new_zeros((), dtype=dtype)
    for i, (feature, target) in enumerate(zip(features, targets, strict=True)):
        d = _unit(feature.to(dtype), eps) - _unit(target.to(dtype), eps)
        distance = d * d
        if lin_weights is not None:
            distance = distance * lin_weights[i].to(dtype).reshape(1, -1, 1, 1)
        distance = distance.sum(dim=1, keepdim=True)
        if size is None:
            total = total + distance.mean(dim=(1, 2, 3))
        else:
            total = total + F.interpolate(distance, size=size, mode="bilinear", align_corners=False)
    return total


def lpips_distance(
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    lin_weights: Sequence[Tensor] | None,
    *,
    spatial: bool = False,
    size: tuple[int, int] | None = None,
    eps: float = 1e-10,
) -> Tensor:
    r"""The LPIPS head: weighted squared distance of features normalised over channels, added up over the layers.

    With :math:`u = f / (\lVert f \rVert_2 + \mathrm{eps})` over the channels of each pixel, v likewise from t::

        distance_n = sum_i mean_{h,w} sum_c lin_i[c] (u_i - v_i)^2

    Args:
        features: one tensor ``[N,C_i,H_i,W_i]`` a layer, float16, bfloat16, float32 or float64, all on one device.
        targets: as many tensors of the same shapes.
        lin_weights: one tensor a layer, ``[C_i]`` or lpips' own ``[1,C_i,1,1]``; None means 1 for every channel (what
            ``lpips.LPIPS(lpips=False)`` does). All three lists may need gradients.
        spatial: return the map instead: the map of each layer, bilinearly resized (``align_corners=False``), added.
        size: (height, width) of that map; None means the size of the first layer. lpips gives the size of the image:
            pass ``image.shape[2:]`` for the same.
        eps: added to the norm, outside its square root, as lpips has it; > 0.

    Returns:
        float32 (float64 if any feature is float64), whatever the input dtypes: ``[N]``, or ``[N,1,H,W]`` with
        `spatial`. A pixel whose channels are all 0 counts with u = 0, as in lpips, and gets the gradient 0 (lpips:
        NaN).

    Raises:
        TypeError: an argument is no list of floating-point tensors. ValueError: lengths, shapes (the message names
            the layer), devices or options do not fit, or a layer has no pixels.

    Source: Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric", CVPR 2018; the
    ``lpips`` package, version 0.1.4, whose convention for eps this is.

    Example:
        >>> x, y = torch.tensor([3.0, 0.0]).view(1, 2, 1, 1), torch.tensor([0.0, 2.0]).view(1, 2, 1, 1)
        >>> lpips_distance([x], [y], [torch.tensor([1.0, 0.5])])
        tensor([1.5000])
    """
    _check_layers(features, targets, 4)
    _check_samples(features)
    check_number("eps", eps, 0, open_low=True)
    if lin_weights is not None:
        _check_lin_weights(features, lin_weights)
    for i, feature in enumerate(features):
        if feature.shape[2] * feature.shape[3] == 0:
            raise ValueError(f"features[{i}]: expected at least one pixel, got shape {tuple(feature.shape)}")
    wanted: list[int] | None = None
    if spatial:
        wanted = list(features[0].shape[2:]) if size is None else _checked_size(size)
    elif size is not None:
        raise ValueError(f"size: only a map has a size; pass spatial=True with it, got size={size!r} alone")
    return lpips_reference(
        list(features),
        list(targets),
        None if lin_weights is None else list(lin_weights),
        wanted,
        float(eps),
    )


def _check_lin_weights(features: Sequence[Tensor], lin_weights: Any) -> None:
    _check_list("lin_weights", lin_weights)
    check_same_length("features", features, "lin_weights", lin_weights)
    for i, (feature, lin) in enumerate(zip(features, lin_weights, strict=True)):
        check_tensor(f"lin_weights[{i}]", lin)
        check_same_device(f"features[{i}]", feature, f"lin_weights[{i}]", lin)
        channels = feature.shape[1]
        if tuple(lin.shape) not in ((channels,), (1, channels, 1, 1)):
            raise ValueError(
                f"lin_weights[{i}]: expected shape ({channels},) or (1, {channels}, 1, 1) for the {channels} channels "
                f"of features[{i}], got {tuple(lin.shape)}"
            )


def _checked_size(size: Any) -> list[int]:
    good = isinstance(size, (list, tuple)) and len(size) == 2
    if not good or any(isinstance(s, bool) or not isinstance(s, (int, torch.SymInt)) or s < 1 for s in size):
        raise ValueError(f"size: expected (height, width), two whole numbers >= 1, got {size!r}")
    return list(size)


class LPIPSDistance(Loss):
    """Module form of :func:`lpips_distance`."""

    fn = staticmethod(lpips_distance)
