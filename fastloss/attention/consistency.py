"""Attention consistency: divergence of two sets of attention maps, given as probabilities or as logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import Loss, check_reduction
from ..core.checks import (
    check_choice,
    check_numbers,
    check_same_length,
    check_same_shape,
    check_tensor,
    is_sequence,
)
from ..core.entry import public_function
from .divergence import METRICS, attention_reference, check_mask, reduce_rows

INPUTS = ("probs", "logits")


@public_function
def attention_consistency_loss(
    a: Tensor | Sequence[Tensor],
    b: Tensor | Sequence[Tensor],
    *,
    inputs: str = "probs",
    metric: str = "js",
    mask: Tensor | None = None,
    layer_weights: Sequence[float] | None = None,
    reduction: str = "mean",
) -> Tensor | list[Tensor]:
    r"""Divergence of two sets of attention distributions, row by row, for one input seen twice.

    Two views of one input (dropout, augmentation, a student and its teacher) should attend alike. With p and q the
    distributions over the K keys in one row of `a` and of `b`, natural logarithms, and 0 log 0 = 0::

        "js"        KL(p|m) / 2 + KL(q|m) / 2, m = (p + q) / 2      symmetric, from 0 to log 2 (the default)
        "kl"        KL(p|q) = sum_k p_k log(p_k / q_k)              `a` is the teacher, as in distillation
        "sym_kl"    KL(p|q) / 2 + KL(q|p) / 2                       R-Drop
        "mse"       mean_k (p_k - q_k)^2
        "l1"        mean_k |p_k - q_k|

    Args:
        a, b: ``[..., Q, K]`` maps of one shape, usually ``[B, H, Q, K]``, or lists of them, one per layer (each layer
            in a shape of its own). Both may need gradients; detach the one that should not move.
        inputs: ``"probs"``, used as they are (rows are not normalised again), or ``"logits"``, put through a softmax;
            -inf logits are keys left out.
        metric: the divergence, see above; always between probabilities. ``"kl"`` and ``"sym_kl"`` of probabilities
            are infinite where one is 0 and the other is not, as after attention dropout: ``"js"`` never is.
        mask: bool, broadcastable to the maps (to every layer's), True where the key takes part.
        layer_weights: for lists, one number >= 0 per layer; None is the mean over the layers, 1 / layers each.
        reduction: ``"mean"`` over the rows with at least one key left (0 if there is none), ``"sum"``, or ``"none"``
            for the ``[..., Q]`` rows, which are 0 where every key is masked. Lists: the weighted sum over the layers
            of the mean or sum of each; for ``"none"`` the list of weighted rows.

    Returns:
        float32 (float64 for float64 inputs). The gradient is 0 at probabilities that are exactly 0.

    Raises:
        TypeError: an argument is no floating-point tensor, or the mask is not bool. ValueError: shapes, devices,
            lengths or options do not fit, or ``"mean"`` of an empty batch.

    Source: Lin, "Divergence measures based on the Shannon entropy", IEEE Trans. Inf. Theory 1991 (JS); Liang et al.,
    "R-Drop", NeurIPS 2021 (sym_kl); Wang et al., "MiniLM", NeurIPS 2020 (kl of attention); Jiao et al., "TinyBERT",
    2020 (mse of attention, there of the scores before the softmax).

    Example:
        >>> round(attention_consistency_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item(), 4)
        0.6931
    """
    check_choice("inputs", inputs, INPUTS)
    check_choice("metric", metric, METRICS)
    check_reduction(reduction)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if layer_weights is not None:
            raise ValueError("layer_weights: expected None for single maps; it weighs the entries of lists")
        return _one_map("a", a, "b", b, mask, inputs, metric, reduction)
    a, b = _two_lists(a, b)
    check_same_length("a", a, "b", b)
    if len(a) == 0:
        raise ValueError("a: expected at least one layer, got an empty list")
    if layer_weights is None:
        layer_weights = [1 / len(a)] * len(a)
    layer_weights = check_numbers("layer_weights", layer_weights, 0, of="numbers, one a layer")
    check_same_length("a", a, "layer_weights", layer_weights)
    layers = []
    for i, (x, y, weight) in enumerate(zip(a, b, layer_weights, strict=True)):
        layers.append(weight * _one_map(f"a[{i}]", x, f"b[{i}]", y, mask, inputs, metric, reduction))
    return layers if reduction == "none" else torch.stack(layers).sum()


def _two_lists(a: Any, b: Any) -> tuple[list[Tensor], list[Tensor]]:
    for name, value in sorted({"a": a, "b": b}.items(), key=lambda item: isinstance(item[1], Tensor)):
        if not is_sequence(value):
            raise TypeError(f"{name}: expected two tensors or two lists of them, got {type(value).__name__} for {name}")
    return list(a), list(b)


def _one_map(
    name_a: str, a: Tensor, name_b: str, b: Tensor, mask: Tensor | None, inputs: str, metric: str, reduction: str
) -> Tensor:
    check_tensor(name_a, a)
    check_tensor(name_b, b)
    check_same_shape(name_a, a, name_b, b)
    if a.ndim < 2 or a.shape[-1] == 0:
        raise ValueError(f"{name_a}: expected [..., Q, K] with K >= 1, got shape {tuple(a.shape)}")
    check_mask(mask, a.shape, a)
    values, rows = attention_reference(a, b, mask, inputs, metric)
    return reduce_rows(values, rows, reduction)


class AttentionConsistencyLoss(Loss):
    """Module form of :func:`attention_consistency_loss`."""

    fn = staticmethod(attention_consistency_loss)
