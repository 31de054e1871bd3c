"""The ops of `feature_distance`: one call forward and one backward for a whole list of layers.

L1 is an op of its own. Its gradient is a sign, so it keeps two bits an element and neither list of features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..core import Op, result_dtype

GROUP = 32  # elements whose signs share two words: a bit of the first where d > 0, of the second where d < 0


def feature_distance_reference(
    features: list[Tensor],
    targets: list[Tensor],
    scales: list[float],
    criterion: str,
    parameter: float,
    per_sample: bool,
) -> Tensor:
    """The definition: sum of c(f - t) over the elements of each layer times its scale, added up over the layers.

    One number, or one for each sample. The scales hold the layer weights and the denominators of the means.
    """
    dtype = result_dtype(*features, *targets)
    total = features[0].new_zeros(features[0].shape[:1] if per_sample else (), dtype=dtype)
    for feature, target, scale in zip(features, targets, scales, strict=True):
        d = feature.to(dtype) - target.to(dtype)
        if criterion == "l1":
            loss = d.abs()
        elif criterion == "l2":
            loss = d * d
        elif criterion == "charbonnier":
            loss = (d * d + parameter * parameter).sqrt()
        else:  # smooth L1 with beta = parameter: both branches are finite, so where() leaks no NaN gradient
            a = d.abs()
            loss = torch.where(a < parameter, 0.5 / parameter * d * d, a - 0.5 * parameter)
        if not per_sample:
            loss = loss.sum()
        elif loss.ndim > 1:
            loss = loss.sum(dim=list(range(1, loss.ndim)))
        total = torch.add(total, loss, alpha=scale)  # scale * loss has a float64 tangent in forward-mode AD
    return total


def layer_scales(features: Sequence[Tensor], weights: Sequence[float], reduction: str) -> list[float]:
    """What the sum over the elements of each layer is multiplied with: its weight over what the mean divides by."""
    scales = []
    for feature, weight in zip(features, weights, strict=True):
        count = 1
        if reduction == "mean":
            count = feature.numel()
        elif reduction == "none" and feature.shape[0] > 0:  # an empty batch has no sample to give a value for
            count = feature.numel() // feature.shape[0]
        scales.append(weight / count)
    return scales


def layout_of(features: Sequence[Tensor], targets: Sequence[Tensor], reduction: str) -> list[int]:
    """Of each layer its rank, its sizes, and the strides in which kernels read it and write its gradients.

    They are the strides of the features where the targets have the same ones, and row-major ones else, for which the
    kernels make copies. With one value a sample, the samples come first in memory too.
    """
    layout: list[int] = []
    for feature, target in zip(features, targets, strict=True):
        shape, own = feature.shape, feature.stride()
        strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
        plain = feature.is_contiguous() and target.is_contiguous()
        if not plain and own == target.stride() and _walkable(shape, own, reduction == "none"):
            strides = list(own)
        layout += [len(shape), *shape, *strides]
    return layout


def _walkable(shape: Sequence[int], strides: Sequence[int], samples_first: bool) -> bool:
    """The tensor fills its memory without gaps or overlaps."""
    order = sorted((d for d in range(len(shape)) if shape[d] != 1), key=lambda d: -strides[d])
    if samples_first and order and shape[0] != 1 and order[0] != 0:
        return False
    expected = 1
    for d in reversed(order):
        if strides[d] != expected:
            return False
        expected *= shape[d]
    return True


def _layers(layout: list[int]) -> Iterator[tuple[list[int], list[int]]]:
    """(sizes, strides) of each layer."""
    at = 0
    while at < len(layout):
        rank = layout[at]
        yield layout[at + 1 : at + 1 + rank], layout[at + 1 + rank : at + 1 + 2 * rank]
        at += 1 + 2 * rank


def _rows(shape: list[int], reduction: str) -> tuple[int, int]:
    """How many sums a layer has, and of how many elements. Each row of signs starts with a new group."""
    rows = shape[0] if reduction == "none" else 1
    return rows, math.prod(shape[1:] if reduction == "none" else shape)


def _sign_words(layout: list[int], reduction: str) -> int:
    words = 0
    for shape, _ in _layers(layout):
        rows, length = _rows(shape, reduction)
        words += rows * ((length + GROUP - 1) // GROUP) * 2
    return words


def _l1_reference(
    features: list[Tensor],
    targets: list[Tensor],
    weights: list[float],
    layout: list[int],
    dtype: torch.dtype,
    reduction: str,
) -> Tensor:
    scales = layer_scales(features, weights, reduction)
    return feature_distance_reference(features, targets, scales, "l1", 1.0, reduction == "none")


def _l1_fwd(
    features: list[Tensor],
    targets: list[Tensor],
    weights: list[float],
    layout: list[int],
    dtype: torch.dtype,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    out = features[0].new_empty(features[0].shape[:1] if reduction == "none" else (), dtype=torch.float32)
    return out, features[0].new_empty((_sign_words(layout, reduction),), dtype=torch.int32)


def _l1_bwd(
    grad: Tensor,
    signs: Tensor,
    weights: list[float],
    layout: list[int],
    dtype: torch.dtype,
    reduction: str,
    needs_features: bool,
    needs_targets: bool,
) -> list[Tensor]:
    sides = int(needs_features) + int(needs_targets)
    return [grad.new_empty_strided(*layer, dtype=dtype) for _ in range(sides) for layer in _layers(layout)]


def _l1_bwd_reference(
    grad: Tensor,
    signs: Tensor,
    weights: list[float],
    layout: list[int],
    dtype: torch.dtype,
    reduction: str,
    needs_features: bool,
    needs_targets: bool,
) -> list[Tensor]:
    bits = (signs.view(-1, 2, 1) >> torch.arange(GROUP, device=signs.device)) & 1
    values, at, gradients = (bits[:, 0] - bits[:, 1]).to(grad.dtype), 0, []
    for (shape, strides), weight in zip(_layers(layout), weights, strict=True):
        rows, length = _rows(shape, reduction)
        groups = (length + GROUP - 1) // GROUP
        sign = values[at : at + rows * groups].reshape(rows, groups * GROUP)[:, :length]
        at += rows * groups
        scale = weight / {"mean": max(length, 1), "none": max(length, 1), "sum": 1}[reduction]
        gradient = (grad.reshape(-1, 1) * scale * sign).reshape(-1)
        gradients.append(gradient.as_strided(shape, strides).to(dtype))
    return (gradients if needs_features else []) + ([-g for g in gradients] if needs_targets else [])


def _distance_reference(
    features: list[Tensor],
    targets: list[Tensor],
    weights: list[float],
    layout: list[int],
    criterion: str,
    parameter: float,
    reduction: str,
) -> Tensor:
    scales = layer_scales(features, weights, reduction)
    return feature_distance_reference(features, targets, scales, criterion, parameter, reduction == "none")


def _distance_fwd(
    features: list[Tensor],
    targets: list[Tensor],
    weights: list[float],
    layout: list[int],
    criterion: str,
    parameter: float,
    reduction: str,
) -> Tensor:
    return features[0].new_empty(features[0].shape[:1] if reduction == "none" else (), dtype=torch.float32)


def _distance_bwd(
    grad: Tensor,
    features: list[Tensor],
    targets: list[Tensor],
    weights: list[float],
    layout: list[int],
    criterion: str,
    parameter: float,
    reduction: str,
    needs_features: bool,
    needs_targets: bool,
) -> list[Tensor]:
    sides = int(needs_features) + int(needs_targets)
    dtype = features[0].dtype
    return [grad.new_empty_strided(*layer, dtype=dtype) for _ in range(sides) for layer in _layers(layout)]


_l1 = Op(
    "feature_l1",
    fwd=_l1_fwd,
    bwd=_l1_bwd,
    reference=_l1_reference,
    grads=("features", "targets"),
    outputs=("out", "signs"),
    bwd_reference=_l1_bwd_reference,
)
_distance = Op(
    "feature_distance",
    fwd=_distance_fwd,
    bwd=_distance_bwd,
    reference=_distance_reference,
    grads=("features", "targets"),
)


def distance(
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[float],
    criterion: str,
    parameter: float,
    reduction: str,
) -> Tensor:
    """Checked arguments to the op that fits; all layers in the dtype to which theirs promote."""
    dtype = features[0].dtype
    for t in (*features, *targets):
        dtype = torch.promote_types(dtype, t.dtype)
    features, targets = [f.to(dtype) for f in features], [t.to(dtype) for t in targets]
    layout, factors = layout_of(features, targets, reduction), [float(w) for w in weights]
    if criterion == "l1":
        return _l1(features, targets, factors, layout, dtype, reduction)
    return _distance(features, targets, factors, layout, criterion, parameter, reduction)
