"""Rows of attention consistency: of maps, of lists of them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

import fastloss
from tests.conformance.case import Bench, Case, Draw, with_argument, with_options

METRICS = ("js", "kl", "sym_kl", "mse", "l1", "cosine")
MAP_SHAPES = ((2, 3, 4, 5), (1, 1, 1, 1), (3, 7), (1, 2, 9, 33))
MASKED_SHAPES = ((2, 3, 4, 5), (4, 5), (1, 1, 4, 5))
# a row of all keys, of some, of one, and of none
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()

ADDED = torch.tensor([[0.0, 0.5, -1.0, -200.0, 2.0]])


def two_logits(draw: Draw, shape: tuple) -> tuple:
    """Rows far apart, a quarter of the logits equal: float64 eager is the oracle, and loses close rows to rounding."""
    a, b = draw.normal(*shape), draw.normal(*shape)
    return a, torch.where(draw.uniform(*shape) > 0.25, 1.5 * b, a)


def two_maps(draw: Draw, shape: tuple) -> tuple:
    return tuple(x.softmax(-1) for x in two_logits(draw, shape))


def eager_attention(a, b, inputs="probs", metric="js", mask=None, temperature=1.0, head_mean=False,
                    stop_gradient=None, reduction="mean"):  # fmt: skip
    if stop_gradient is not None:
        a, b = (a.detach(), b) if stop_gradient == "a" else (a, b.detach())
    if mask is not None and mask.is_floating_point():
        a, b, mask = a + mask, b + mask, None
    keep = torch.ones_like(a, dtype=torch.bool) if mask is None else mask.expand_as(a)
    if inputs == "logits":
        a, b = ((x / temperature).masked_fill(~keep, -1e4).softmax(-1) for x in (a, b))
    if inputs == "scores":
        a, b = (torch.where(x <= -1e2, torch.zeros_like(x), x) for x in (a, b))
    if head_mean:
        a, b, keep = a.mean(-3), b.mean(-3), keep[..., 0, :, :]
    counted = keep.any(-1)
    # 1 where masked: log 1 = 0, so that autograd has no 0 * inf to make NaN of
    p, q = a.masked_fill(~keep, 1), b.masked_fill(~keep, 1)

    def kl(p, q):
        return F.kl_div(q.log(), p, reduction="none").sum(-1)

    if metric == "js":
        rows = 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2)
    elif metric in ("kl", "sym_kl"):
        rows = kl(p, q) if metric == "kl" else 0.5 * kl(p, q) + 0.5 * kl(q, p)
    elif metric == "cosine":
        rows = 1 - F.cosine_similarity(a.masked_fill(~keep, 0), b.masked_fill(~keep, 0), dim=-1)
    else:
        d = (a - b).masked_fill(~keep, 0)
        rows = (d.abs() if metric == "l1" else d * d).sum(-1) / keep.sum(-1).clamp(min=1)
    if reduction == "mean":
        return rows[counted].mean()
    rows = rows * counted
    return rows.sum() if reduction == "sum" else rows


def eager_layers(a, b, layer_weights=None, reduction="mean", **options):
    weights = layer_weights or [1 / len(a)] * len(a)
    return sum(w * eager_attention(x, y, reduction=reduction, **options) for w, x, y in zip(weights, a, b, strict=True))


def two_lists(draw: Draw, shape: tuple) -> tuple:
    layers = [two_maps(draw, shape), two_maps(draw, (2, *shape[1:]))]
    return [a for a, _ in layers], [b for _, b in layers]


def maps_bytes(shape: tuple, itemsize: int, mode: str) -> int:
    """One read of both maps forward; backward another, and the write of the gradient of one."""
    return math.prod(shape) * itemsize * {"forward": 2, "backward": 3, "both": 5}[mode]


ATTENTION_CASES = [
    Case(
        "attention_consistency_loss",
        fastloss.attention_consistency_loss,
        two_maps,
        eager_attention,
        shapes=MAP_SHAPES,
        options=[{"metric": m} for m in METRICS],
        bad=[
            ("shape", with_argument(1, lambda t: t[..., :-1]), ValueError, "b: expected the shape of a"),
            (
                "rank",
                lambda args, options: ((args[0][0, 0, 0], args[1][0, 0, 0]), options),
                ValueError,
                "a: expected [..., Q, K] with K >= 1",
            ),
            ("list and tensor", with_argument(1, lambda t: [t]), TypeError, "a: expected two tensors or two lists"),
            ("inputs", with_options(inputs="weights"), ValueError, "inputs: expected one of"),
            ("metric", with_options(metric="l2"), ValueError, "metric: expected one of"),
            ("scores", with_options(inputs="scores"), ValueError, "metric: expected one of ('mse', 'l1', 'cosine')"),
            ("temperature", with_options(temperature=2.0), ValueError, "temperature: expected 1 for probs, which have"),
            ("no temperature", with_options(inputs="logits", temperature=0), ValueError, "temperature: expected a"),
            ("side", with_options(stop_gradient="q"), ValueError, "stop_gradient: expected one of ('a', 'b')"),
            ("flag", with_options(head_mean=1), TypeError, "head_mean: expected True or False"),
            (
                "no heads",
                lambda args, options: ((args[0][0, 0], args[1][0, 0]), options | {"head_mean": True}),
                ValueError,
                "a: expected [..., H, Q, K] with K >= 1",
            ),
            (
                "mask a head",
                with_options(mask=MASK.expand(3, 4, 5), head_mean=True),
                ValueError,
                "mask: expected one for all heads with head_mean",
            ),
            (
                "learned mask",
                with_options(mask=torch.ones(4, 5, requires_grad=True), inputs="logits"),
                ValueError,
                "mask: no gradient is provided",
            ),
            ("mask", with_options(mask=torch.ones(4, 5)), TypeError, "mask: expected a bool tensor"),
            ("mask shape", with_options(mask=MASK[:, :3]), ValueError, "mask: expected a shape that broadcasts"),
            ("weights", with_options(layer_weights=[1.0]), ValueError, "layer_weights: expected None for single maps"),
            ("empty", lambda args, options: ((args[0][:0], args[1][:0]), options), ValueError, "mean of an empty"),
            ("reduction", with_options(reduction="avg"), ValueError, "reduction: expected one of"),
        ],
        bench=Bench(
            shapes=[(8, 8, 512, 512)],
            cost=maps_bytes,
            options=[{"metric": m} for m in ("js", "kl", "mse")],
            cuda_shapes=[(8, 12, 1024, 1024)],
        ),
        module=fastloss.AttentionConsistencyLoss,
    ),
    Case(
        "attention_consistency_loss of logits",
        fastloss.attention_consistency_loss,
        two_logits,
        eager_attention,
        shapes=MAP_SHAPES,
        options=[{"inputs": "logits", "metric": m} for m in METRICS],
    ),
    Case(
        "attention_consistency_loss with a mask",
        fastloss.attention_consistency_loss,
        two_logits,
        eager_attention,
        shapes=MASKED_SHAPES,
        options=[{"inputs": "logits", "metric": m, "mask": MASK} for m in METRICS],
    ),
    Case(
        "attention_consistency_loss with options",
        fastloss.attention_consistency_loss,
        two_logits,
        eager_attention,
        shapes=MASKED_SHAPES[::2],
        options=[
            {"inputs": "scores", "metric": "mse", "mask": ADDED},
            {"inputs": "logits", "metric": "js", "mask": ADDED, "temperature": 1.5},
            {"inputs": "logits", "metric": "kl", "mask": MASK, "temperature": 0.5, "head_mean": True},
            {"inputs": "scores", "metric": "cosine", "head_mean": True},
        ],
    ),
    Case(
        "attention_consistency_loss of layers",
        fastloss.attention_consistency_loss,
        two_lists,
        eager_layers,
        shapes=MAP_SHAPES,
        options=[{"metric": "sym_kl"}, {"layer_weights": [0.5, 2.0], "metric": "mse"}],
        reductions=("mean", "sum"),
        bad=[
            ("length", with_argument(1, lambda t: t[:1]), ValueError, "b: expected as many entries as a, 2, got 1"),
            ("no layer", lambda args, options: (([], []), options), ValueError, "a: expected at least one layer"),
            ("entry", with_argument(0, lambda t: [t[0], 1.0]), TypeError, "a[1]: expected a tensor, got float"),
            ("weights", with_options(layer_weights=[1.0]), ValueError, "layer_weights: expected as many entries as a"),
            ("weight", with_options(layer_weights=[1.0, -1.0]), ValueError, "layer_weights[1]: expected a finite"),
        ],
    ),
]
