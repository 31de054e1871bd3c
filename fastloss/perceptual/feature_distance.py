"""The distance of two lists of deep features: the multi-layer perceptual loss.

Its ops serve a whole list of layers in one call forward and one backward. L1 is an op of its own. Its gradient is a
sign, so it keeps two bits an element and neither list of features. All else the two share: arguments, reference,
shapes. A difference of NaN has the gradient NaN in both, whatever the criterion: a loss scaler must see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import Loss, Op, check_not_empty, check_reduction, result_dtype
from ..core.checks import check_choice, check_number
from ..core.entry import public_function
from ..core.traced import changes, filled
from .checks import check_layers, check_samples, check_weights
from .layer_layout import layers_of, layout_of, rows_of, sign_count

PARAMETERS = (1e-18, 1e18)  # of eps and beta: their squares are normal float32 numbers

CRITERIA = ("l1", "l2", "charbonnier", "smooth_l1")


class Inputs(NamedTuple):
    """Of both ops: a list of layers, any shapes, in one dtype."""

    features: list[Tensor]
    targets: list[Tensor]
    weights: list[float]  # one a layer
    layout: list[int]  # see layer_layout.py
    dtype: torch.dtype
    criterion: str
    parameter: float  # eps or beta
    reduction: str


class LayerInputs(NamedTuple):
    """What the backward of L1 takes of them, and so all that is kept: no features."""

    weights: list[float]
    layout: list[int]
    dtype: torch.dtype
    reduction: str


class Saved(NamedTuple):
    """By L1."""

    signs: Tensor  # int32, two bits an element


class Needs(NamedTuple):
    """The backward returns the gradients of the needed lists, one after the other."""

    features: bool
    targets: bool


def feature_distance_reference(x: Inputs) -> Tensor:
    """The definition: sum of c(f - t) over the elements of each layer times its scale, added up over the layers.

    One number, or one for each sample.
    """
    returned, per_sample = result_dtype(*x.features, *x.targets), x.reduction == "none"
    dtype = returned if _fits_float32(x.criterion, x.parameter) else torch.float64
    scales = layer_scales(x.features, x.weights, x.reduction)
    total = x.features[0].new_zeros(x.features[0].shape[:1] if per_sample else (), dtype=dtype)
    for feature, target, scale in zip(x.features, x.targets, scales, strict=True):
        loss = _elementwise(feature.to(dtype), target.to(dtype), x.criterion, x.parameter)
        if not per_sample:
            loss = loss.sum()
        elif loss.ndim > 1:
            loss = loss.sum(dim=list(range(1, loss.ndim)))
        if changes(scale):
            total = total + scale * loss
        else:
            total = torch.add(total, loss, alpha=scale)  # scale * loss has a float64 tangent in forward-mode AD
    return total.to(returned)


def _elementwise(feature: Tensor, target: Tensor, criterion: str, p: float) -> Tensor:
    """c(d), with gradients at infinities and NaN too: torch's own |d| has the slope 0 where d is NaN."""
    d = feature - target
    if criterion == "l2":
        return d * d
    if criterion == "charbonnier":
        return torch.hypot(d, filled((), p, d.dtype, d.device))
    fixed = d.detach()
    if criterion == "l1":
        return d * torch.where(fixed == fixed, fixed.sign(), fixed)
    inside = ~(fixed.abs() >= p)  # NaN too; each branch is finite, with its gradient, where it is not chosen
    near = torch.where(inside, d, 0.0)
    return torch.where(inside, 0.5 * near * (near / p), d * fixed.sign() - 0.5 * p)


def _fits_float32(criterion: str, parameter: float) -> bool:
    return criterion not in ("charbonnier", "smooth_l1") or PARAMETERS[0] <= parameter <= PARAMETERS[1]


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


def _gradients(grad: Tensor, x: Inputs | LayerInputs, needs: Needs) -> list[Tensor]:
    return [grad.new_empty_strided(*layer, dtype=x.dtype) for _ in range(sum(needs)) for layer in layers_of(x.layout)]


def _distance_fwd(x: Inputs) -> Tensor:
    first = x.features[0]
    return first.new_empty(first.shape[:1] if x.reduction == "none" else (), dtype=torch.float32)


def _why_not(x: Inputs) -> str | None:
    if _fits_float32(x.criterion, x.parameter):
        return None
    return f"the square of {x.parameter:g}, eps or beta, is no normal float32 number"


def _distance_bwd(grad: Tensor, x: Inputs, incoming: list[Tensor], needs: Needs) -> list[Tensor]:
    return _gradients(grad, x, needs)


def _l1_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    signs = x.features[0].new_empty((sign_count(x.layout, x.reduction),), dtype=torch.int32)
    return _distance_fwd(x), Saved(signs)


def _l1_bwd(grad: Tensor, saved: Saved, incoming: list[Tensor], x: LayerInputs, needs: Needs) -> list[Tensor]:
    return _gradients(grad, x, needs)


def _l1_bwd_reference(grad: Tensor, saved: Saved, incoming: list[Tensor], x: LayerInputs, needs: Needs) -> list[Tensor]:
    """The signs, which the kernel gives as the gradient of a plain sum, times what they are multiplied with."""
    mean = x.reduction != "sum"
    counts = [max(rows_of(shape, x.reduction)[1], 1) if mean else 1 for shape, _ in layers_of(x.layout)]
    ones = torch.ones_like(grad.detach())
    plain = x._replace(weights=[float(n) for n in counts])
    signs = _l1.bwd(ones, *saved, [], *plain, *Needs(True, False))
    gradients = []
    for sign, weight, count in zip(signs, x.weights, counts, strict=True):
        upstream = grad.reshape(-1, *[1] * (sign.ndim - 1)) if x.reduction == "none" else grad
        gradients.append((upstream * (weight / count) * sign).to(x.dtype))
    return (gradients if needs.features else []) + ([-g for g in gradients] if needs.targets else [])


_l1 = Op(
    "feature_l1",
    fwd=_l1_fwd,
    bwd=_l1_bwd,
    reference=feature_distance_reference,
    grads=Needs._fields,
    outputs=("out", *Saved._fields),
    triton="perceptual.kernels.feature_distance",
    bwd_reference=_l1_bwd_reference,
)


_distance = Op(
    "feature_distance",
    fwd=_distance_fwd,
    bwd=_distance_bwd,
    reference=feature_distance_reference,
    grads=Needs._fields,
    triton="perceptual.kernels.feature_distance",
    declines=_why_not,
)


def distance_call(
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[float],
    criterion: str,
    parameter: float,
    reduction: str,
) -> tuple[Op, Inputs]:
    """The op that checked arguments go to, and its arguments: all layers in the dtype to which theirs promote."""
    dtype = features[0].dtype
    for t in (*features, *targets):
        dtype = torch.promote_types(dtype, t.dtype)
    features, targets = [f.to(dtype) for f in features], [t.to(dtype) for t in targets]
    layout, numbers = layout_of(features, targets, reduction), [float(w) for w in weights]
    op = _l1 if criterion == "l1" else _distance
    return op, Inputs(features, targets, numbers, layout, dtype, criterion, parameter, reduction)


@public_function
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
    op, x = feature_distance_call(
        features, targets, weights=weights, criterion=criterion, eps=eps, beta=beta, reduction=reduction
    )
    return op(*x)


def feature_distance_call(
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    weights: Sequence[float] | None,
    criterion: str,
    eps: float,
    beta: float,
    reduction: str,
) -> tuple[Op, Inputs]:
    """The op that computes a `feature_distance`, and its arguments; raises where they do not fit."""
    features, targets = check_layers(features, targets)
    check_choice("criterion", criterion, CRITERIA)
    check_reduction(reduction)
    eps, beta = check_number("eps", eps, 0, open_low=True), check_number("beta", beta, 0, open_low=True)
    if reduction == "none":
        check_samples(features)
    if weights is None:
        weights = [1.0] * len(features)
    weights = check_weights(features, weights)
    for feature in features:
        empty_batch = reduction == "none" and feature.shape[0] == 0  # has no sample to give a value for
        if reduction != "sum" and not empty_batch:
            check_not_empty(feature.numel())
    parameter = beta if criterion == "smooth_l1" else eps
    return distance_call(features, targets, weights, criterion, parameter, reduction)


class FeatureDistance(Loss):
    """Module form of :func:`feature_distance`."""

    fn = staticmethod(feature_distance)
