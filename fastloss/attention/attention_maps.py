"""The divergence of attention maps as an op: all rows of all layers, with the reduction and the gradients.

The forward reads both maps once and keeps a few numbers of each row, from which the backward goes over the elements in
any order. Of layers with as many keys, kernels take the whole list in one launch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import Op
from ..core.backends import is_interpreting
from .divergence import attention_reference, reduce_rows
from .heads import mean_over_heads

TEMPERATURES = (1e-18, 1e18)  # of the kernels, which multiply with the inverse


class Inputs(NamedTuple):
    """Of the op, which returns one number, or the weighted rows of all layers, one layer after the other."""

    a: list[Tensor]  # [..., Q, K] a layer, K >= 1, all of one dtype
    b: list[Tensor]
    masks: list[Tensor]  # none, or one a layer, expanded to its shape: bool, or floating point, which is added
    weights: list[float]  # one a layer
    inputs: str  # "probs", "logits" or "scores"
    metric: str
    temperature: float  # of logits
    reduction: str
    head_mean: bool  # of logits: compare the means of the softmaxes over dimension -3, of which rows have one less


class Saved(NamedTuple):
    statistics: Tensor  # [statistics_of(...), rows of all layers] float32
    scales: Tensor  # [layers] float32: 1, or for a mean 1 / rows that count


class Needs(NamedTuple):
    """The backward returns the gradients of the needed lists, one after the other."""

    a: bool
    b: bool


class Statistics(NamedTuple):
    """Of a row of logits, in this order: p_k = exp(a_k / temperature - peak_a - log_a), q of b."""

    peak_a: int = 0
    log_a: int = 1  # of the sum of exponentials; "cosine": of the root of the sum of their squares
    peak_b: int = 2
    log_b: int = 3
    inner_a: int = 4  # what the softmax subtracts from the slopes: sum_k p_k slope_k; "cosine": the row's value
    inner_b: int = 5
    scale: int = 6  # 0 where the row does not count; "mse", "l1": 1 / keys that take part


class CosineStatistics(NamedTuple):
    """Of a row of probabilities or scores."""

    length_a: int = 0  # |a|
    length_b: int = 1
    value: int = 2


def statistics_of(inputs: str, metric: str, head_mean: bool = False) -> int:
    """How many numbers of a row are kept. Of distances of probabilities element by element: their scale."""
    if inputs == "logits" and not head_mean:
        return len(Statistics())
    return len(CosineStatistics()) if metric == "cosine" else 1 if metric in ("mse", "l1") else 0


def rows_of(maps: list[Tensor], head_mean: bool = False) -> list[int]:
    """Rows of each layer."""
    return [math.prod(t.shape[:-3]) * t.shape[-2] if head_mean else math.prod(t.shape[:-1]) for t in maps]


def attention_maps_reference(x: Inputs) -> Tensor:
    """The definition."""
    if x.head_mean:
        means = mean_over_heads(x.a, x.b, x.masks, x.inputs, x.temperature)
        return attention_maps_reference(Inputs(*means, x.weights, "probs", x.metric, 1.0, x.reduction, False))
    layers = []
    for i, (a, b, weight) in enumerate(zip(x.a, x.b, x.weights, strict=True)):
        mask = x.masks[i] if x.masks else None
        values, rows = attention_reference(a, b, mask, x.inputs, x.metric, x.temperature)
        layers.append(weight * reduce_rows(values, rows, x.reduction))
    if x.reduction == "none":
        return torch.cat([layer.flatten() for layer in layers])
    return torch.stack(layers).sum()


def _maps_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    first, rows = x.a[0], sum(rows_of(x.a, x.head_mean))
    out = first.new_empty((rows,) if x.reduction == "none" else (), dtype=torch.float32)
    statistics = first.new_empty((statistics_of(x.inputs, x.metric, x.head_mean), rows), dtype=torch.float32)
    return out, Saved(statistics, first.new_empty((len(x.a),), dtype=torch.float32))


def _maps_bwd(grad: Tensor, saved: Saved, x: Inputs, needs: Needs) -> list[Tensor]:
    sides = (x.a if needs.a else []) + (x.b if needs.b else [])
    return [t.new_empty(t.shape) for t in sides]


def averages_heads(like: Tensor) -> bool:
    """Whether the op itself averages the heads of logits: the kernels of GPUs take means that have been made."""
    return like.device.type == "cpu" and not is_interpreting()


def _why_not(x: Inputs) -> str | None:
    if x.head_mean and not averages_heads(x.a[0]):
        return "the kernels of GPUs take maps whose heads have been averaged"
    if TEMPERATURES[0] <= x.temperature <= TEMPERATURES[1]:
        return None
    return f"the kernels take temperatures from {TEMPERATURES[0]:g} to {TEMPERATURES[1]:g}, not {x.temperature:g}"


attention_maps = Op(
    "attention_maps",
    fwd=_maps_fwd,
    bwd=_maps_bwd,
    reference=attention_maps_reference,
    grads=Needs._fields,
    outputs=("out", *Saved._fields),
    triton="attention.kernels.attention_maps",
    declines=_why_not,
)
