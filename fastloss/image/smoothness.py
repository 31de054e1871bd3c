"""Smoothness loss: total variation of an image, edge-aware and second-order forms included."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import Loss, Op, check_not_empty, check_reduction, reduce, result_dtype
from ..core.checks import check_choice, check_same_device, check_tensor, check_weight
from ..core.entry import takes_input_and_target
from ..core.scaled_sum import ScaledSum
from .map_weights import over_weights

DISTANCES = (1, 2, "isotropic", "norm")
P_OF = {"l1": 1, "l2": 2}

# By convention and reduction: over which dimensions (0: N, 1: C) the op's [N, C] sums are added up, and whether each
# direction is then divided by its number of differences. What sums over C alone is a value per image, [N], on which the
# reduction works after that. A convention without "none" is a library's that has none.
_CONVENTIONS: dict[str, dict[str, tuple[tuple[int, ...], bool]]] = {
    "fastloss": {"none": ((1,), True), "mean": ((0, 1), True), "sum": ((1,), True)},
    "basicsr": {"mean": ((0, 1), True), "sum": ((0, 1), False)},
    "kornia": {"mean": ((), True), "sum": ((), False)},
    "torchmetrics": {"none": ((1,), False), "mean": ((1,), False), "sum": ((1,), False)},
    "piq": {"none": ((1,), False), "mean": ((1,), False), "sum": ((1,), False)},
}


class Inputs(NamedTuple):
    """Of the op, which returns the sums of distances of each plane along each direction, ``[N, C, directions]``.

    "l1" and "l2" have one direction per spatial dimension; "isotropic" has one in all.
    """

    image_pred: Tensor  # [N, C, ...], two or three spatial dimensions
    guide: Tensor | None  # [N, G, ...]
    weight: Tensor | None  # [N, C, ...], of any strides
    kind: str  # "l1", "l2" or "isotropic"
    order: int  # of the differences, 1 or 2


class Saved(NamedTuple):
    """Of the weighted mean: what each direction's sum is multiplied by, ``[directions]``."""

    scales: Tensor


class Grads(NamedTuple):
    image_pred: Tensor


def _difference(image: Tensor, dim: int, order: int) -> Tensor:
    """First or second differences along `dim`; empty where the image is too small for one."""
    size = image.shape[dim]
    if size <= order:
        return image.narrow(dim, 0, 0)
    steps = image.narrow(dim, 1, size - 1) - image.narrow(dim, 0, size - 1)
    return steps if order == 1 else _difference(steps, dim, 1)


def _edge_weight(guide: Tensor, dim: int, order: int) -> Tensor:
    """exp(-mean_c |dI|), dI the guide's difference across the `order + 1` pixels that the prediction's spans."""
    size = guide.shape[dim]
    if size <= order:
        return guide.narrow(dim, 0, 0)[:, :1]
    step = guide.narrow(dim, order, size - order) - guide.narrow(dim, 0, size - order)
    return torch.exp(-step.abs().mean(1, keepdim=True))


def _weight_at(weight: Tensor, dim: int, order: int) -> Tensor:
    """The weights of the differences along `dim`: the first pixel's of two, the middle one's of three."""
    size = weight.shape[dim]
    return weight.narrow(dim, min(order - 1, size), max(size - order, 0))


def _root(squares: Tensor) -> Tensor:
    """sqrt with gradient 0 at 0; NaN stays NaN."""
    flat = squares == 0
    return torch.where(flat, torch.zeros_like(squares), torch.where(flat, torch.ones_like(squares), squares).sqrt())


def smoothness_reference(x: Inputs) -> Tensor:
    """The definition: summed distances ``[N, C, directions]``, in float32 (float64 for float64)."""
    guide, weight, kind, order = x.guide, x.weight, x.kind, x.order
    dtype = result_dtype(x.image_pred)
    image = x.image_pred.to(dtype)
    spatial = range(2, image.ndim)
    total: list[Tensor] = []
    squares = torch.zeros_like(image)
    for dim in spatial:
        d = _difference(image, dim, order)
        edge = None if guide is None else _edge_weight(guide.to(dtype), dim, order)
        if weight is not None:  # weights of 0 exclude even NaN, of the image and of the guide, as a product would not
            none = _weight_at(weight, dim, order) == 0
            d, edge = d.masked_fill(none, 0), None if edge is None else torch.where(none, 0, edge)
        if kind == "isotropic":
            d = d if edge is None else d * edge
            missing = image.shape[dim] - d.shape[dim]
            lead = min(order - 1, missing)  # a first difference belongs to its first pixel, a second to its middle one
            squares = squares + F.pad(d * d, [0, 0] * (image.ndim - 1 - dim) + [lead, missing - lead])
            continue
        loss = d.abs() if kind == "l1" else d * d
        loss = loss if edge is None else loss * edge
        loss = loss if weight is None else loss * _weight_at(weight.to(dtype), dim, order)
        total.append(loss.flatten(2).sum(2))
    if kind == "isotropic":
        loss = _root(squares)
        loss = loss if weight is None else loss * weight.to(dtype)
        total.append(loss.flatten(2).sum(2))
    return torch.stack(total, -1)


def _smoothness_fwd(x: Inputs) -> Tensor:
    directions = 1 if x.kind == "isotropic" else x.image_pred.ndim - 2
    return x.image_pred.new_empty((*x.image_pred.shape[:2], directions), dtype=torch.float32)


def _smoothness_bwd(grad: Tensor, x: Inputs) -> Grads:
    return Grads(torch.empty_like(x.image_pred))


_smoothness = Op(
    "smoothness",
    fwd=_smoothness_fwd,
    bwd=_smoothness_bwd,
    reference=smoothness_reference,
    grads=Grads._fields,
    triton="image.kernels.smoothness",
)


_smoothness_total = ScaledSum(
    _smoothness,
    fwd=_smoothness_fwd,
    bwd=_smoothness_bwd,
    reference=smoothness_reference,
    triton="image.kernels.smoothness",
)


def _smoothness_mean_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    directions = 1 if x.kind == "isotropic" else x.image_pred.ndim - 2
    empty = functools.partial(x.image_pred.new_empty, dtype=torch.float32)
    return empty(()), Saved(empty(directions))


def _smoothness_mean_bwd(grad: Tensor, x: Inputs, saved: Saved) -> Grads:
    return Grads(torch.empty_like(x.image_pred))


def _smoothness_mean_reference(x: Inputs) -> Tensor:
    """The means by weight over all images and channels, added up over the directions."""
    return _value(smoothness_reference(x), _counts(x.image_pred, x.weight, x.kind, x.order), (0, 1), 1)


# With weights, for Triton alone: the sums of the weights come from the kernels that make the others.
_smoothness_mean = Op(
    "smoothness_mean",
    fwd=_smoothness_mean_fwd,
    bwd=_smoothness_mean_bwd,
    reference=_smoothness_mean_reference,
    grads=Grads._fields,
    outputs=("out", *Saved._fields),
    triton="image.kernels.smoothness",
)


def _counts(image: Tensor, weight: Tensor | None, kind: str, order: int) -> list[Tensor] | list[int]:
    """How many differences each direction of an image's channel has, or how much weight: then ``[N, C]`` each."""
    if weight is not None:
        return weight_counts(image, weight, kind, order)
    dims = range(2, image.ndim) if kind != "isotropic" else (None,)
    sizes = ([max(size - order, 0) if i == dim else size for i, size in enumerate(image.shape)] for dim in dims)
    return [math.prod(size[2:]) for size in sizes]


def weight_counts(image: Tensor, weight: Tensor, kind: str, order: int) -> list[Tensor]:
    """How much weight the differences of each direction of an image's channel have, ``[N, C]`` each."""
    dims = range(2, image.ndim) if kind != "isotropic" else (None,)
    for dim in (0, 1):  # what is broadcast along images or channels is added up once
        weight = weight.narrow(dim, 0, min(weight.shape[dim], 1)) if weight.stride(dim) == 0 else weight
    here = (weight if dim is None else _weight_at(weight, dim, order) for dim in dims)
    sums = (w.sum(list(range(2, image.ndim)), dtype=result_dtype(image)) for w in here)
    return [total.expand(image.shape[:2]) for total in sums]


@takes_input_and_target(planned=True)
def smoothness_loss(
    image_pred: Tensor,
    *,
    p: int | str = 1,
    order: int = 1,
    guide: Tensor | None = None,
    weight: Tensor | None = None,
    convention: str = "fastloss",
    reduction: str = "mean",
) -> Tensor:
    r"""Differences of neighbouring pixels (total variation) of an image or a volume.

    With :math:`d_y, d_x` the differences along each spatial dimension, per channel::

        1 or "l1"       mean |d_y|  + mean |d_x|      (the default)
        2 or "l2"       mean d_y^2  + mean d_x^2
        "isotropic"     mean sqrt(d_y^2 + d_x^2) over all pixels; a difference that would leave the image is 0
        "norm"          sqrt(mean d_y^2 + mean d_x^2): one root per value

    Each direction has its own mean. A direction without differences (an image one pixel wide) contributes 0.

    Args:
        image_pred: ``[N, C, H, W]`` or ``[N, C, D, H, W]``, any floating-point dtype, any value range. As a keyword
            also `input`.
        p: the distance, see above.
        order: 1, ``x[i+1] - x[i]``; 2, ``x[i+1] - 2 x[i] + x[i-1]`` (no mixed terms), which leaves ramps alone.
        guide: image of the same batch and size, any number of channels, no gradient. Edge-aware: each difference
            counts ``exp(-mean_c |dI|)``, dI the guide's difference between the outermost of its pixels.
        weight: non-negative weights, or a mask (bool, True counts 1), broadcastable to `image_pred`, no gradient. A
            difference has the weight of its first pixel (`order` 2: its middle one), and means become weighted sum /
            sum of weights: 0 if that is 0, NaN if it is beyond float32, 3.4e38. A weight of 0 excludes the difference,
            and that of the guide: NaN in a pixel whose every difference has weight 0 has no effect, on the value or
            on a gradient, which is 0.
        convention: whose normalisation. ``"none"``, ``"mean"`` and ``"sum"`` then give::

                "fastloss"      [N], each image's means | means over the batch      | sum of the [N]
                "basicsr"       not offered             | means over the batch      | sum of all differences
                "kornia"        not offered             | [N, C], means per channel | [N, C], sums per channel
                "torchmetrics"  [N], each image's sums  | mean of the [N]           | sum of the [N]
                "piq"           the same as "torchmetrics" (its l1, l2_squared and l2 are p = 1, 2 and "norm")
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, see `convention`.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or the shape above. The gradient of flat regions is 0 for
        every distance.

    Raises:
        TypeError: an argument is no floating-point tensor. ValueError: shapes, devices or options do not fit,
            `guide` or `weight` requires a gradient, or ``"mean"`` of an empty batch.

    Source: Rudin, Osher and Fatemi, "Nonlinear total variation based noise removal algorithms", Physica D 1992;
    edge-aware: Godard et al., "Digging into self-supervised monocular depth estimation", ICCV 2019 (as kornia's
    ``inverse_depth_smoothness_loss``); weights: BasicSR's ``WeightedTVLoss``.

    Example:
        >>> smoothness_loss(torch.arange(16.0).reshape(1, 1, 4, 4)).item()
        5.0
    """
    convention = check_choice("convention", convention, _CONVENTIONS)
    check_reduction(reduction)
    if reduction not in _CONVENTIONS[convention]:
        raise ValueError(f"reduction: {convention!r} has 'mean' and 'sum', got {reduction!r}")
    p, order = check_distance(p, order)
    kind, weight = smoothness_kind(image_pred, p, order, guide, weight)
    if reduction == "mean":
        check_not_empty(image_pred.numel())
    over, mean = _CONVENTIONS[convention][reduction]
    x = Inputs(image_pred, guide, weight, kind, order)
    backend = _smoothness.backend(*x)
    if backend == "triton" and p != "norm" and weight is not None and mean and over == (0, 1):
        return _smoothness_mean(*x, backend=backend)
    if over and reduction != "none" and weight is None and p != "norm" and backend == "triton":
        return _smoothness_total(*x, _factors(image_pred, kind, order, mean, reduction), backend=backend)
    sums = _smoothness(*x, backend=backend)
    value = _value(sums, _counts(image_pred, weight, kind, order) if mean else None, over, p)
    return reduce(value, reduction) if over == (1,) else value


def _factors(image: Tensor, kind: str, order: int, mean: bool, reduction: str) -> list[float]:
    """How much each direction's sum over all images and channels counts, where the value is one number."""
    images, channels = image.shape[:2]
    planes = (channels if mean else 1) * (images if reduction == "mean" else 1)
    counts = [int(count) for count in _counts(image, None, kind, order)]  # no weights, hence no tensors
    return [1 / max(planes * (count if mean else 1), 1) for count in counts]


def check_distance(p: Any, order: Any) -> tuple[int | str, int]:
    p = check_choice("p", p, (*DISTANCES, *P_OF))
    return P_OF.get(p, p), check_choice("order", order, (1, 2))


def smoothness_kind(
    image_pred: Tensor, p: int | str, order: int, guide: Tensor | None, weight: Tensor | None
) -> tuple[str, Tensor | None]:
    """The kernels' name of the distance, and the weight as they take it, after checks of all the arguments."""
    check_tensor("image_pred", image_pred, (4, 5))
    if guide is not None:
        _check_guide(guide, image_pred)
    if weight is not None:
        check_weight("weight", weight, "image_pred", image_pred)
        weight = weight.expand(image_pred.shape)
    return "isotropic" if p == "isotropic" else "l1" if p == 1 else "l2", weight


def smoothness_counts(image_pred: Tensor, weight: Tensor | None, p: int | str, order: int) -> list[Tensor | int]:
    """How many differences each direction has over all images and channels, or how much weight."""
    check_not_empty(image_pred.numel())
    planes = image_pred.shape[0] * image_pred.shape[1]
    counts = _counts(image_pred, weight, "isotropic" if p == "isotropic" else "l2", order)
    return [count.sum() if isinstance(count, Tensor) else count * planes for count in counts]


def smoothness_mean(sums: Tensor, counts: list[Tensor | int], p: int | str) -> Tensor:
    """The loss from the sums of each direction over all images and channels, ``[directions]``."""
    return _value(sums, counts, (), p)


def _value(sums: Tensor, counts: Sequence[Tensor | int | None] | None, over: tuple[int, ...], p: int | str) -> Tensor:
    """The directions' sums, or means, over the dimensions `over`, added; then the root if p is "norm"."""
    each = sums.unbind(-1)
    terms = [_normalised(*pair, over) for pair in zip(each, counts or [None] * len(each), strict=True)]
    value = terms[0] if len(terms) == 1 else torch.stack(terms).sum(0)
    return _root(value) if p == "norm" else value


def _normalised(total: Tensor, count: Tensor | int | None, over: tuple[int, ...]) -> Tensor:
    """Sums, or means, of the ``[N, C]`` sums over the dimensions `over`; 0 where there is nothing to count."""
    shape = total.shape
    total = total.sum(over) if over else total
    if count is None:
        return total
    if not isinstance(count, Tensor):
        return total / max(count * math.prod([shape[dim] for dim in over]), 1)
    return over_weights(total, count.sum(over) if over else count)


def _check_guide(guide: Tensor, image: Tensor) -> None:
    check_tensor("guide", guide, image.ndim)
    check_same_device("image_pred", image, "guide", guide)
    if guide.shape[0] != image.shape[0] or guide.shape[2:] != image.shape[2:] or guide.shape[1] == 0:
        raise ValueError(
            f"guide: expected the batch and size of image_pred, {tuple(image.shape)}, got {tuple(guide.shape)}"
        )
    if guide.requires_grad:
        raise ValueError("guide: no gradient is provided for it; pass guide.detach()")


class SmoothnessLoss(Loss):
    """Module form of :func:`smoothness_loss`."""

    fn = staticmethod(smoothness_loss)
