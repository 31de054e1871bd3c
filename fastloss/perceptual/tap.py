"""The tap: a distance of deep features taken inside a network, whose gradient joins that of the layers behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import Op, full_precision
from ..core.entry import public_function
from ..core.traced import changes
from .feature_distance import Inputs, LayerInputs, feature_distance_call


class _Tap(torch.autograd.Function):
    """(feature, target) -> (feature, distance); one kernel adds both gradients of the feature."""

    @staticmethod
    def forward(ctx: Any, feature: Tensor, target: Tensor, op: Op, options: tuple) -> tuple[Tensor, Tensor]:
        out = op.fwd(*Inputs([feature], [target], *options))
        keeps_signs = not isinstance(out, Tensor)
        distance, *saved = out if keeps_signs else (out, feature, target)
        ctx.save_for_backward(*saved)
        ctx.op, ctx.options, ctx.keeps_signs = op, options, keeps_signs
        ctx.set_materialize_grads(False)
        return feature.view_as(feature), distance

    @staticmethod
    def backward(ctx: Any, behind: Tensor | None, grad: Tensor | None) -> tuple:
        if grad is None:
            return behind, None, None, None
        needs_feature, needs_target = ctx.needs_input_grad[:2]
        together = needs_feature and behind is not None and not torch.is_grad_enabled()  # else autograd sees two terms
        incoming = [behind] if together else []
        if ctx.keeps_signs:
            (signs,) = ctx.saved_tensors
            x = Inputs([], [], *ctx.options)
            args: tuple = (signs, incoming, *LayerInputs(x.weights, x.layout, x.dtype, x.reduction))
        else:
            feature, target = ctx.saved_tensors
            args = (*Inputs([feature], [target], *ctx.options), incoming)
        made = ctx.op.bwd(grad, *args, needs_feature, needs_target)
        of_feature = made[0] if needs_feature else None
        if of_feature is not None and behind is not None and not together:
            of_feature = of_feature + behind
        return of_feature, made[-1] if needs_target else None, None, None


@public_function
def tap(
    feature: Tensor,
    target: Tensor,
    *,
    weight: float = 1.0,
    criterion: str = "l1",
    eps: float = 1e-6,
    beta: float = 1.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    r"""A layer's feature handed on, and its distance to a target: ``feature, loss = tap(feature, target)``.

    For a network that one runs oneself, layer by layer: go on with the feature that is returned. The value is that of
    ``feature_distance([feature], [target], weights=[weight], ...)``. The gradient that arrives from the layers behind
    and that of the distance are added in the pass that makes the latter: one gradient is written where autograd would
    write one, read both and write their sum, which spares a read and a write of the feature for every tap.

    Args:
        feature: any shape, float16, bfloat16, float32 or float64.
        target: of the same shape. Both may need gradients.
        weight: finite number that the distance is multiplied with.
        criterion, eps, beta, reduction: see :func:`feature_distance`.

    Returns:
        (the feature, the distance), float32 (float64 if an input is float64) the latter. The first is `feature`
        itself or a view of it, which needs a gradient if `feature` does; autograd lets nobody write into it: put no
        in-place layer behind it.

    Raises:
        TypeError, ValueError: as :func:`feature_distance`.

    Example:
        >>> feature, loss = tap(torch.ones(1, 2, 4, 4), torch.zeros(1, 2, 4, 4), weight=0.5)
        >>> loss.item()
        0.5
    """
    op, x = feature_distance_call(
        [feature], [target], weights=[weight], criterion=criterion, eps=eps, beta=beta, reduction=reduction
    )
    untouched = not feature.requires_grad or feature.dtype != target.dtype
    if untouched or op.backend(*x) == "reference" or changes(weight) or changes(x.parameter):
        return feature, op(*x)
    _, _, *options = x
    with full_precision(feature):
        return _Tap.apply(feature, target, op, tuple(options))
