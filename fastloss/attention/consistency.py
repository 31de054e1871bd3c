"""Attention consistency: divergence of two sets of attention maps, given as probabilities or as logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import Loss, check_not_empty, check_reduction
from ..core.checks import (
    check_choice,
    check_flag,
    check_number,
    check_numbers,
    check_same_device,
    check_same_length,
    check_same_shape,
    check_tensor,
    is_sequence,
)
from ..core.entry import public_function
from .attention_maps import Inputs, attention_maps, averages_heads
from .divergence import METRICS, OF_SCORES, check_mask
from .heads import mean_over_heads

INPUTS = ("probs", "logits", "scores")
SIDES = (None, "a", "b")


@public_function
def attention_consistency_loss(
    a: Tensor | Sequence[Tensor],
    b: Tensor | Sequence[Tensor],
    *,
    inputs: str = "probs",
    metric: str = "js",
    mask: Tensor | None = None,
    temperature: float = 1.0,
    head_mean: bool = False,
    stop_gradient: str | None = None,
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
        "cosine"    1 - <p, q> / (|p| |q|)                          0 of two rows of zeros, 1 if one is

    Args:
        a, b: ``[..., Q, K]`` maps of one shape, usually ``[B, H, Q, K]``, or lists of them, one per layer (each layer
            in a shape of its own). Both may need gradients.
        inputs: ``"probs"``, used as they are (rows are not normalised again); ``"logits"``, put through a softmax,
            -inf logits are keys left out; or ``"scores"``, logits compared as they are, as in TinyBERT: those <= -100,
            which stand for masked keys, count as 0 (and get the gradient 0).
        metric: the divergence, see above; of scores ``"mse"``, ``"l1"`` or ``"cosine"``. ``"kl"`` and ``"sym_kl"`` of
            probabilities are infinite where one is 0 and the other is not, as after attention dropout: ``"js"`` never.
            Of a negative number, which is no probability, these three are NaN.
        mask: broadcastable to the maps (to every layer's), and never expanded in memory: bool, True where the key takes
            part; or floating point, without a gradient, added to logits and scores.
        temperature: of logits, > 0: p = softmax(a / temperature), after a floating-point mask is added.
        head_mean: compare the means over the heads, which are dimension -3 of ``[..., H, Q, K]``; of logits the means
            of their softmax. The mask is then one for all heads. The rows are ``[..., Q]`` without that dimension.
        stop_gradient: the side that is held fixed, ``"a"`` or ``"b"``: nothing is computed for its gradient.
        layer_weights: for lists, one number >= 0 per layer; None is the mean over the layers, 1 / layers each.
        reduction: ``"mean"`` over the rows with at least one key left (0 if there is none), ``"sum"``, or ``"none"``
            for the ``[..., Q]`` rows, which are 0 where every key is masked. Lists: the weighted sum over the layers
            of the mean or sum of each; for ``"none"`` the list of weighted rows.

    Returns:
        float32 (float64 for float64 inputs). The gradient is 0 at probabilities that are exactly 0.

    Raises:
        TypeError: an argument is no floating-point tensor, or the mask is neither bool nor floating point. ValueError:
            shapes, devices, lengths or options do not fit, or ``"mean"`` of an empty batch.

    Source: Lin, "Divergence measures based on the Shannon entropy", IEEE Trans. Inf. Theory 1991 (JS); Liang et al.,
    "R-Drop", NeurIPS 2021 (sym_kl); Wang et al., "MiniLM", NeurIPS 2020 (kl of attention); Jiao et al., "TinyBERT",
    2020 (mse of the scores before the softmax).

    Example:
        >>> round(attention_consistency_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item(), 4)
        0.6931
    """
    check_choice("inputs", inputs, INPUTS)
    check_choice("metric", metric, OF_SCORES if inputs == "scores" else METRICS)
    check_reduction(reduction)
    temperature = check_number("temperature", temperature, 0, open_low=True)
    if inputs != "logits" and temperature != 1:
        raise ValueError(f"temperature: expected 1 for {inputs}, which have no softmax, got {temperature:g}")
    head_mean = check_flag("head_mean", head_mean)
    if stop_gradient not in SIDES:
        check_choice("stop_gradient", stop_gradient, ("a", "b"))
    if alone := isinstance(a, Tensor) and isinstance(b, Tensor):
        if layer_weights is not None:
            raise ValueError("layer_weights: expected None for single maps; it weighs the entries of lists")
        layers, layer_weights = [("a", a, "b", b)], [1.0]
    else:
        layers, layer_weights = _layers(a, b, layer_weights)
    x, y, masks = _checked(layers, mask, inputs, head_mean)
    if stop_gradient == "a":
        x = [t.detach() for t in x]
    elif stop_gradient == "b":
        y = [t.detach() for t in y]
    if head_mean and not (inputs == "logits" and averages_heads(x[0])):
        x, y, masks = mean_over_heads(x, y, masks, inputs, temperature)
        inputs, temperature, head_mean = ("probs" if inputs == "logits" else inputs), 1.0, False
    if reduction == "mean":
        for t in x:
            check_not_empty(t.numel())
    out = attention_maps(*Inputs(x, y, masks, layer_weights, inputs, metric, temperature, reduction, head_mean))
    if reduction != "none":
        return out
    shapes = [(*t.shape[:-3], t.shape[-2]) if head_mean else t.shape[:-1] for t in x]
    rows = [part.view(shape) for part, shape in zip(out.split([math.prod(s) for s in shapes]), shapes, strict=True)]
    return rows[0] if alone else rows


def _layers(a: Any, b: Any, weights: Any) -> tuple[list[tuple[str, Tensor, str, Tensor]], list[float]]:
    """(name, map, name, map) of each layer, and its weight."""
    a, b = _two_lists(a, b)
    check_same_length("a", a, "b", b)
    if len(a) == 0:
        raise ValueError("a: expected at least one layer, got an empty list")
    if weights is None:
        weights = [1 / len(a)] * len(a)
    weights = check_numbers("layer_weights", weights, 0, of="numbers, one a layer")
    check_same_length("a", a, "layer_weights", weights)
    return [(f"a[{i}]", x, f"b[{i}]", y) for i, (x, y) in enumerate(zip(a, b, strict=True))], weights


def _two_lists(a: Any, b: Any) -> tuple[list[Tensor], list[Tensor]]:
    for name, value in sorted({"a": a, "b": b}.items(), key=lambda item: isinstance(item[1], Tensor)):
        if not is_sequence(value):
            raise TypeError(f"{name}: expected two tensors or two lists of them, got {type(value).__name__} for {name}")
    return list(a), list(b)


def _checked(
    layers: list[tuple[str, Tensor, str, Tensor]], mask: Tensor | None, inputs: str, head_mean: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Both sides in one dtype, and the mask of each layer, if there is one, as a view in its shape."""
    x, y, masks = [], [], []
    least = 3 if head_mean else 2
    for name_a, a, name_b, b in layers:
        check_tensor(name_a, a)
        check_tensor(name_b, b)
        check_same_shape(name_a, a, name_b, b)
        check_same_device("the first layer", layers[0][1], name_a, a)
        if a.ndim < least or a.shape[-1] == 0:
            wanted = "[..., H, Q, K]" if head_mean else "[..., Q, K]"
            raise ValueError(f"{name_a}: expected {wanted} with K >= 1, got shape {tuple(a.shape)}")
        if head_mean and a.shape[-3] == 0:
            raise ValueError(f"{name_a}: expected at least one head, got shape {tuple(a.shape)}")
        check_mask(mask, a.shape, a, additive=inputs != "probs")
        if mask is not None:
            if head_mean and mask.ndim >= 3 and mask.shape[-3] != 1:
                raise ValueError(f"mask: expected one for all heads with head_mean, got shape {tuple(mask.shape)}")
            masks.append(mask.expand(a.shape))
        x.append(a)
        y.append(b)
    dtype = layers[0][1].dtype
    for t in (*x, *y):
        dtype = torch.promote_types(dtype, t.dtype)
    return [t.to(dtype) for t in x], [t.to(dtype) for t in y], masks


class AttentionConsistencyLoss(Loss):
    """Module form of :func:`attention_consistency_loss`."""

    fn = staticmethod(attention_consistency_loss)
