"""Rows of attention consistency from queries and keys: of whole batches, of grouped heads, of packed sequences."""

from __future__ import annotations

import torch

import fastloss
from tests.conformance.case import Bench, Case, Draw, with_argument, with_options

from .attention import MASK, eager_attention

QK_SHAPES = ((2, 3, 4, 5, 6), (1, 1, 4, 5, 1), (1, 2, 4, 5, 17))
GROUPED_SHAPES = ((2, 4, 2, 1, 5, 3, 8, 5), (1, 2, 1, 2, 4, 7, 3, 3), (1, 6, 2, 3, 40, 70, 16, 20))
# a sequence without keys, one without queries, one of one query
STARTS = {"cu_seqlens_q": torch.tensor([0, 4, 6, 6, 7]), "cu_seqlens_k": torch.tensor([0, 5, 5, 8, 12]).int()}


def two_queries_and_keys(draw: Draw, shape: tuple) -> tuple:
    b, h, q, k, d = shape
    return draw.normal(b, h, q, d), draw.normal(b, h, k, d), draw.normal(b, h, q, d), draw.normal(b, h, k, d)


def grouped(draw: Draw, shape: tuple) -> tuple:
    b, h, g1, g2, q, k, d1, d2 = shape
    return draw.normal(b, h, q, d1), draw.normal(b, g1, k, d1), draw.normal(b, h, q, d2), draw.normal(b, g2, k, d2)


def packed(draw: Draw, shape: tuple) -> tuple:
    h, g, d = shape
    return draw.normal(7, h, d), draw.normal(12, g, d), draw.normal(7, h, d), draw.normal(12, g, d)


def two_long_sequences(draw: Draw, shape: tuple) -> tuple:
    """As in training: the second view is the first and a tenth of noise."""
    one, other = two_queries_and_keys(draw, shape), two_queries_and_keys(draw, shape)
    return (*one[:2], one[0] + 0.1 * other[0], one[1] + 0.1 * other[1])


def eager_qk(q1, k1, q2, k2, metric="kl", scale=None, mask=None, causal=False, reduction="mean",
             temperature=1.0):  # fmt: skip
    maps = []
    for q, k in ((q1, k1), (q2, k2)):
        k = torch.repeat_interleave(k, q.shape[1] // k.shape[1], dim=1)
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        maps.append(torch.einsum("bhqd,bhkd->bhqk", q, k) * factor / temperature)
    if causal:
        lower = torch.ones(maps[0].shape[-2:], device=q1.device).tril().bool()
        mask = lower if mask is None else mask & lower
    return eager_attention(*maps, inputs="logits", metric=metric, mask=mask, reduction=reduction)


def eager_packed(q1, k1, q2, k2, cu_seqlens_q=None, cu_seqlens_k=None, reduction="mean", **options):
    """One sequence after the other."""
    rows, keys = [], (cu_seqlens_k[1:] - cu_seqlens_k[:-1]).tolist()
    queries = (cu_seqlens_q[1:] - cu_seqlens_q[:-1]).tolist()
    sides = [t.split(queries if t.shape[0] == q1.shape[0] else keys) for t in (q1, k1, q2, k2)]
    for parts, count in zip(zip(*sides, strict=True), keys, strict=True):
        if count == 0:
            rows.append(sum(p.sum() for p in parts) * 0 + parts[0].new_zeros(parts[0].shape[1::-1]))
            continue
        sequence = (p.transpose(0, 1)[None] for p in parts)
        rows.append(eager_qk(*sequence, reduction="none", **options)[0])
    values = torch.cat(rows, 1)
    if reduction == "none":
        return values
    counted = q1.shape[1] * sum(n for n, count in zip(queries, keys, strict=True) if count)
    return values.sum() / counted if reduction == "mean" else values.sum()


def flops(shape: tuple, itemsize: int, mode: str) -> int:
    """Products alone: two of the forward; the backward makes them again and four more."""
    b, h, q, k, d = shape
    return 2 * b * h * q * k * d * {"fwd": 2, "bwd": 6}.get(mode, 8)


ATTENTION_QK_CASES = [
    Case(
        "attention_consistency_from_qk",
        fastloss.attention_consistency_from_qk,
        two_queries_and_keys,
        eager_qk,
        shapes=QK_SHAPES,
        options=[
            {"metric": "kl"},
            {"metric": "sym_kl"},
            {"metric": "js", "scale": 0.3},
            {"metric": "kl", "causal": True},
            {"metric": "sym_kl", "mask": MASK},
            {"metric": "js", "mask": MASK, "causal": True},
            {"metric": "js", "temperature": 0.5},
        ],
        grads=(0, 1, 2, 3),
        bad=[
            ("rank", with_argument(0, lambda t: t[0]), ValueError, "q1: expected a 4-D tensor"),
            ("batch", with_argument(3, lambda t: t[:1]), ValueError, "k2: expected the batch of q1"),
            ("heads", with_argument(2, lambda t: t[:, :1]), ValueError, "q2: expected the heads of q1"),
            ("keys' heads", with_argument(1, lambda t: t[:, :2]), ValueError, "k1: expected a number of heads that"),
            ("width", with_argument(1, lambda t: t[..., :-1]), ValueError, "k1: expected the last dimension of q1"),
            ("queries", with_argument(2, lambda t: t[..., 1:, :]), ValueError, "q2: expected as many rows as q1"),
            ("keys", with_argument(3, lambda t: t[..., 1:, :]), ValueError, "k2: expected as many rows as k1"),
            ("metric", with_options(metric="mse"), ValueError, "metric: expected one of"),
            ("scale", with_options(scale=float("nan")), ValueError, "scale: expected a finite number, got nan"),
            ("temperature", with_options(temperature=0), ValueError, "temperature: expected a finite number > 0"),
            ("view", with_options(stop_gradient="q1"), ValueError, "stop_gradient: expected one of"),
            ("mask", with_options(mask=torch.ones(4, 5)), TypeError, "mask: expected a bool tensor"),
            ("mask shape", with_options(mask=MASK[:, :3]), ValueError, "mask: expected a shape that broadcasts"),
            ("starts", with_options(**STARTS), ValueError, "q1: expected a 3-D tensor"),
        ],
        bench=Bench(
            shapes=((1, 4, 2048, 2048, 64),),
            cuda_shapes=((8, 12, 1024, 1024, 64), (8, 12, 1024, 1024, 128)),
            cost=flops,
            unit="flops",
            options=({"metric": "kl"}, {"metric": "js"}, {"metric": "kl", "causal": True}),
            all_grads=True,
            make=two_long_sequences,
        ),
        module=fastloss.AttentionConsistencyFromQK,
    ),
    Case(
        "attention_consistency_from_qk of grouped heads",
        fastloss.attention_consistency_from_qk,
        grouped,
        eager_qk,
        shapes=GROUPED_SHAPES,
        options=[{"metric": "kl"}, {"metric": "js", "causal": True}],
        grads=(0, 1, 2, 3),
    ),
    Case(
        "attention_consistency_from_qk of packed sequences",
        fastloss.attention_consistency_from_qk,
        packed,
        eager_packed,
        shapes=((2, 1, 6), (1, 1, 1), (3, 3, 17)),
        options=[STARTS | {"metric": "sym_kl"}, STARTS | {"metric": "kl", "causal": True}],
        grads=(0, 1, 2, 3),
        bad=[
            ("one alone", with_options(cu_seqlens_k=None), ValueError, "cu_seqlens_k: expected it with the other"),
            ("rank", with_argument(0, lambda t: t[0]), ValueError, "q1: expected a 3-D tensor"),
            ("list", with_options(cu_seqlens_q=[0, 7]), TypeError, "cu_seqlens_q: expected an int32 or int64 tensor"),
            (
                "end",
                with_options(cu_seqlens_q=torch.tensor([0, 4, 6, 6, 8])),
                ValueError,
                "cu_seqlens_q: expected star",
            ),
            ("fall", with_options(cu_seqlens_k=torch.tensor([0, 9, 5, 8, 12])), ValueError, "cu_seqlens_k: expected"),
            ("count", with_options(cu_seqlens_k=torch.tensor([0, 12])), ValueError, "cu_seqlens_k: expected as many"),
            ("shape", with_options(cu_seqlens_k=torch.tensor(12)), ValueError, "cu_seqlens_k: expected shape"),
            ("mask", with_options(mask=MASK), ValueError, "mask: expected None with cu_seqlens"),
        ],
    ),
]
