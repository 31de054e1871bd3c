"""Triton kernels of attention consistency from queries and keys: no map in memory, no atomics.

The forward has a program for each tile of queries of a head, which goes through the keys once (js: twice) with running
sums. The backward makes the tiles of logits again: once for each tile of queries, whose gradients it adds up over the
keys, and once for each tile of keys, over the queries of all heads that share them. Formulas: ../attention_qk.py.

FLOPs per head, of products: forward 4 Q K d (js 8), backward 8 Q K d for the queries and as much for the keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.launch import AotCase, on_device
from ..attention_qk import STATISTICS, Grads, Inputs, Needs, Saved
from .attention_qk_configs import FORWARD, OF_KEYS, OF_QUERIES, Tile, tile_of
from .attention_qk_gradients import Out, Upstream, _attention_qk_keys_kernel, _attention_qk_queries_kernel
from .attention_qk_tile import (
    JS,
    KL,
    LOG2E,
    SIZES,
    SYM_KL,
    Left,
    Sizes,
    TileConstants,
    View,
    add_tile,
    divergence,
    head_of,
    inside,
    js_terms,
    keys_of,
    place_of,
    product,
    rows_of,
)

METRICS = {"kl": KL.value, "sym_kl": SYM_KL.value, "js": JS.value}
COUNT = tl.constexpr(STATISTICS)
BLOCK = 1024  # of partial sums


@triton.jit
def _logits(q1, k1, q2, k2, one, two):
    """Both tiles in units of log 2, and their difference in natural ones."""
    a = product(q1, k1) * one.scale
    b = product(q2, k2) * two.scale
    return a * LOG2E, b * LOG2E, a - b


@triton.jit(do_not_specialize=[*SIZES, "programs"])
def _attention_qk_fwd_kernel(
    one,  # View
    two,
    left,  # Left, its spans those of queries
    values_ptr,  # (rows,) float32, or None
    partials_ptr,  # (2, programs) float32: sums of the values, and how many rows count
    statistics_ptr,  # (rows, STATISTICS) float32
    heads,
    queries,
    keys,
    programs,
    TILE: tl.constexpr,  # TileConstants
):
    BM: tl.constexpr = TILE.queries
    BN: tl.constexpr = TILE.keys
    METRIC: tl.constexpr = TILE.metric
    sizes = Sizes(heads, queries, keys)
    tiles = tl.cdiv(sizes.queries, BM)
    place = place_of(tiles, sizes.heads)
    query0 = (tiles - 1 - place.tile) * BM  # of causal rows the longest first
    q1_ptr, k1_ptr = head_of(one, place.batch, place.head)
    q2_ptr, k2_ptr = head_of(two, place.batch, place.head)
    q1 = rows_of(q1_ptr, query0, sizes.queries, one.q_row, one.dim, BM, TILE.dim1, TILE.whole1)
    q2 = rows_of(q2_ptr, query0, sizes.queries, two.q_row, two.dim, BM, TILE.dim2, TILE.whole2)
    query = query0 + tl.arange(0, BM)
    loop = keys_of(left, query0, sizes, TILE)
    lowest = tl.full((BM,), float("-inf"), tl.float32)
    none = tl.zeros((BM,), tl.float32)
    state = (lowest, none, lowest, none, none, none, none, none)
    for key0 in range(loop.begin, loop.end, BN):
        k1 = rows_of(k1_ptr, key0, sizes.keys, one.k_row, one.dim, BN, TILE.dim1, TILE.whole1)
        k2 = rows_of(k2_ptr, key0, sizes.keys, two.k_row, two.dim, BN, TILE.dim2, TILE.whole2)
        a, b, d = _logits(q1, k1, q2, k2, one, two)
        if TILE.partial:
            special = (key0 + BN > sizes.keys) | (left.spans is not None) | (left.mask is not None)
            if TILE.causal:
                special |= key0 + BN > query0 + 1
            if special:
                key = (key0 + tl.arange(0, BN))[None, :]
                valid = inside(query[:, None], key, key, place, left, loop, sizes, TILE)
                a = tl.where(valid, a, float("-inf"))
                b = tl.where(valid, b, float("-inf"))
                d = tl.where(valid, d, 0.0)
        state = add_tile(state, a, b, d, METRIC)
    max1, sum1, max2, sum2, _, _, _, _ = state
    absent = (sum1 == 0.0) | (sum2 == 0.0)
    max1 = tl.where(absent, float("inf"), max1)
    max2 = tl.where(absent, float("inf"), max2)
    sum1 = tl.where(absent, 1.0, sum1)
    sum2 = tl.where(absent, 1.0, sum2)
    if METRIC == JS:
        value, mean1, mean2 = none, none, none
        ratio = tl.div_rn(sum1, sum2)  # see attention_qk_tile.gradients
        for key0 in range(loop.begin, loop.end, BN):
            k1 = rows_of(k1_ptr, key0, sizes.keys, one.k_row, one.dim, BN, TILE.dim1, TILE.whole1)
            k2 = rows_of(k2_ptr, key0, sizes.keys, two.k_row, two.dim, BN, TILE.dim2, TILE.whole2)
            a, b, d = _logits(q1, k1, q2, k2, one, two)
            if TILE.partial:
                key = (key0 + tl.arange(0, BN))[None, :]
                valid = inside(query[:, None], key, key, place, left, loop, sizes, TILE)
                a = tl.where(valid, a, float("-inf"))
                b = tl.where(valid, b, float("-inf"))
            p, q = tl.exp2(a - max1[:, None]), tl.exp2(b - max2[:, None]) * ratio[:, None]
            element, of_p, of_q = js_terms(p, q)
            value += tl.sum(element, 1)
            mean1 += tl.sum(of_p, 1)
            mean2 += tl.sum(of_q, 1)
        value, mean1, mean2 = value / sum1, mean1 / sum1, mean2 / sum1
    else:
        value, mean1, mean2 = divergence(state, METRIC)
    value = tl.where(absent, 0.0, value)
    mean1 = tl.where(absent, 0.0, mean1)
    mean2 = tl.where(absent, 0.0, mean2)
    there = query < sizes.queries
    row = (place.batch * sizes.heads + place.head) * sizes.queries + query
    if values_ptr is not None:
        tl.store(values_ptr + row, value, mask=there)
    tl.store(partials_ptr + tl.program_id(0), tl.sum(tl.where(there, value, 0.0)))
    tl.store(partials_ptr + programs + tl.program_id(0), tl.sum(tl.where(there & (absent == 0), 1.0, 0.0)))
    at = statistics_ptr + row * COUNT
    tl.store(at, max1, mask=there)
    tl.store(at + 1, sum1, mask=there)
    tl.store(at + 2, max2, mask=there)
    tl.store(at + 3, sum2, mask=there)
    tl.store(at + 4, mean1, mask=there)
    tl.store(at + 5, mean2, mask=there)


@triton.jit(do_not_specialize=["programs"])
def _attention_qk_total_kernel(
    partials_ptr,  # (2, programs) float32
    out_ptr,  # one float32, or None
    counted_ptr,  # one float32
    programs,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sums, counts = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, programs, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        sums += tl.load(partials_ptr + lanes, mask=lanes < programs, other=0.0)
        counts += tl.load(partials_ptr + programs + lanes, mask=lanes < programs, other=0.0)
    count = tl.sum(counts)
    tl.store(counted_ptr, count)
    if out_ptr is not None:
        total = tl.sum(sums)
        if MEAN:
            total = tl.div_rn(total, tl.maximum(count, 1.0))
        tl.store(out_ptr, total)


def _view(q: Tensor, k: Tensor, scale: float) -> View:
    return View(q, k, scale, q.shape[3], q.shape[1] // k.shape[1], *q.stride()[:3], *k.stride()[:3])


def _left(x: Inputs, spans: Tensor | None) -> Left:
    if x.mask is None:
        return Left(None, 0, 0, 0, 0, spans)
    batch, head, row, key = x.mask.stride()
    return Left(x.mask.view(torch.uint8), batch, head, row, key, spans)


class _Call:
    """What the kernels of one call have in common."""

    def __init__(self, x: Inputs) -> None:
        self.x = x
        q1, k1, q2, k2 = (t if t.stride(3) == 1 else t.contiguous() for t in (x.q1, x.k1, x.q2, x.k2))
        self.views = _view(q1, k1, x.scale1), _view(q2, k2, x.scale2)
        self.batch, self.heads, self.queries = x.q1.shape[:3]
        self.keys = x.k1.shape[2]
        self.rows = self.batch * self.heads * self.queries
        self.sizes = Sizes(self.heads, self.queries, self.keys)
        self.by_query, self.by_key = _left(x, x.key_spans), _left(x, x.query_spans)

    def tile(self, what: str) -> tuple[Tile, TileConstants]:
        dims = self.views[0].dim, self.views[1].dim
        tile = tile_of(self.x.q1, what, max(dims))
        dim1, dim2 = (max(16, triton.next_power_of_2(dim)) for dim in dims)
        causal = self.x.causal and self.x.key_spans is None
        partial = causal or self.keys % tile.keys != 0 or self.x.key_spans is not None or self.x.mask is not None
        return tile, TileConstants(tile.queries, tile.keys, dim1, dim2, dim1 == dims[0], dim2 == dims[1], causal,
                                   partial, METRICS[self.x.metric])  # fmt: skip


def attention_qk_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    call = _Call(x)
    tile, constants = call.tile(FORWARD)
    rows, model = call.rows, x.q1
    programs = call.batch * call.heads * triton.cdiv(call.queries, tile.queries)
    each = x.reduction == "none"
    values = model.new_empty(x.q1.shape[:3], dtype=torch.float32) if each else None
    out = None if each else model.new_empty((), dtype=torch.float32)
    statistics = model.new_empty((rows, STATISTICS), dtype=torch.float32)
    partials = model.new_empty((2, programs), dtype=torch.float32)
    counted = model.new_empty((), dtype=torch.float32)
    with on_device(model):
        if programs > 0:
            _attention_qk_fwd_kernel[(programs,)](
                *call.views, call.by_query, values, partials, statistics, *call.sizes, programs, constants,
                **tile.options,
            )  # fmt: skip
        _attention_qk_total_kernel[(1,)](partials, out, counted, programs, x.reduction == "mean", BLOCK, num_warps=4)
    result = values if out is None else out
    assert result is not None
    return result, Saved(statistics, counted)


def attention_qk_bwd(grad: Tensor, x: Inputs, saved: Saved, needs: Needs) -> Grads:
    call = _Call(x)
    of = {name: getattr(x, name) for name in Grads._fields}
    grads = {name: t.new_empty(t.shape if getattr(needs, name) else 0) for name, t in of.items()}
    found: dict[str, Any] = {name: grads[name] if getattr(needs, name) else None for name in of}
    each = x.reduction == "none"
    upstream = Upstream(grad.contiguous(), int(each), saved.counted if x.reduction == "mean" else None)
    if call.rows == 0:
        return Grads(*(g.zero_() for g in grads.values()))
    with on_device(x.q1):
        if needs.q1 or needs.q2:
            tile, constants = call.tile(OF_QUERIES)
            programs = call.batch * call.heads * triton.cdiv(call.queries, tile.queries)
            _attention_qk_queries_kernel[(programs,)](
                *call.views, call.by_query, saved.statistics, upstream, Out(found["q1"], found["q2"]),
                *call.sizes, constants, **tile.options,
            )  # fmt: skip
        tile, constants = call.tile(OF_KEYS)
        groups = x.k1.shape[1], x.k2.shape[1]
        together = [(found["k1"], found["k2"], groups[0])]
        if groups[0] != groups[1]:
            together = [(found["k1"], None, groups[0]), (None, found["k2"], groups[1])]
        for one, two, key_heads in together:
            if one is None and two is None:
                continue
            programs = call.batch * key_heads * triton.cdiv(call.keys, tile.keys)
            _attention_qk_keys_kernel[(programs,)](
                *call.views, call.by_key, saved.statistics, upstream, Out(one, two), *call.sizes, key_heads,
                each, constants, **tile.options,
            )  # fmt: skip
    return Grads(**grads)


def aot_cases() -> Iterator[AotCase]:
    """Each head dimension, metric and dtype; what is left out; grouped heads; which gradients are needed."""
    half = (torch.bfloat16, torch.float16)
    for dim, metric in itertools.product((64, 128, 256), METRICS):
        yield from _aot_calls(half[0], metric, dim)
    yield from _aot_calls(half[1], "kl", 64, causal=True)
    yield from _aot_calls(half[0], "sym_kl", 128, causal=True, mask=True, keys=1000)
    yield from _aot_calls(half[0], "js", 128, mask=True)
    yield from _aot_calls(half[0], "kl", 80, spans=True, keys=1000)
    yield from _aot_calls(half[0], "kl", 16, key_heads=(2, 1))
    for dim, metric in ((64, "kl"), (256, "js"), (128, "sym_kl")):
        yield from _aot_calls(torch.float32, metric, dim, causal=dim == 64)


def _aot_calls(
    dtype: torch.dtype, metric: str, dim: int, *, keys: int = 1024, key_heads: tuple[int, int] = (4, 4),
    causal: bool = False, mask: bool = False, spans: bool = False,
) -> Iterator[AotCase]:  # fmt: skip
    q = torch.empty(2, 4, 1024, dim, dtype=dtype, device="meta")
    k1, k2 = (torch.empty(2, n, keys, dim, dtype=dtype, device="meta") for n in key_heads)
    keep = torch.empty(2, 1, 1, keys, dtype=torch.bool, device="meta").expand(2, 4, 1024, keys) if mask else None
    of_queries, of_keys = (torch.empty(2, n, dtype=torch.int32, device="meta") if spans else None for n in (1024, keys))
    label = f"{metric} {dim} {str(dtype).removeprefix('torch.')}{' causal' if causal else ''}{' mask' if mask else ''}"
    label += f"{' spans' if spans else ''}{' grouped' if key_heads[0] != key_heads[1] else ''}"
    statistics = Saved(torch.empty(8 * 1024, STATISTICS, device="meta"), torch.empty((), device="meta"))
    matrix = dtype != torch.float32
    reductions = ("mean", "none") if metric == "kl" and dim == 64 else ("mean",)
    for reduction in reductions:
        x = Inputs(q, k1, q, k2, keep, of_queries, of_keys, metric, dim**-0.5, dim**-0.5, causal, reduction)
        more = " rows" if reduction == "none" else ""
        yield AotCase(f"forward {label}{more}", attention_qk_fwd, (x,), (), ("_attention_qk_fwd_kernel",) * matrix)
        grad = torch.empty(q.shape[:3] if reduction == "none" else (), device="meta")
        names = ("_attention_qk_queries_kernel", "_attention_qk_keys_kernel") * matrix
        yield AotCase(f"backward {label}{more}", attention_qk_bwd, (grad, x, statistics, Needs(*[True] * 4)), (), names)
    if len(reductions) > 1:
        args = (torch.empty((), device="meta"), x._replace(reduction="mean"), statistics)
        yield AotCase(f"backward {label} of b", attention_qk_bwd, (*args, Needs(False, False, True, True)), (), names)
