"""Triton kernels for the divergence of attention maps: one launch forward and one backward for layers of one shape.

A program has some whole rows of both maps of a layer, in registers up to MOST_KEYS keys; longer rows of logits (and of
"cosine") it reads twice, the second time from the caches. The forward keeps a few numbers of each row
(attention_maps.py in the family), from which the backward goes over the elements in any order, with no sums.

Of logits, p = softmax(a / temperature) and, with the slope s_k of the metric at p_k, the gradient by a_k is
p_k (s_k - sum_j p_j s_j) / temperature; in the forward the two sums of a row are its value and sum_j p_j s_j.

Bytes per element of size s: forward 2 s, backward 3 s (4 s with both gradients), and of logits 28 a row in each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.device_math import number_in
from ...core.kernels.launch import AotCase, odd_number, on_device
from ...core.kernels.layer_table import MOST, columns_of, factor_of, pointer_of, pointer_to
from ...core.kernels.memory_order import needs_int64, runs
from ..attention_maps import Inputs, Needs, Saved, rows_of, statistics_of
from ..divergence import METRICS, OF_SCORES
from .maps_tile import (
    Kind,
    Layers,
    Pointers,
    Sizes,
    Softmax,
    compared,
    finite,
    keep_statistics,
    logit_slopes,
    normalisers,
    probability_slopes,
    read,
    statistics,
    tile_of,
)

TILE = 1024  # elements of each map in a program of four warps: with more, ptxas runs out of registers
MOST_KEYS = 4096  # of a row in registers
TOTAL_BLOCK = 1024
MASK_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit(do_not_specialize_on_alignment=["statistics_ptr", "out_ptr"])
def _maps_fwd_kernel(
    maps,  # Pointers
    layers,  # Layers
    weights,  # column of factors
    statistics_ptr,  # (statistics, all rows) float32
    out_ptr,  # (all rows,), or (2, layers, partials) sums of values and of rows that count; float32
    sizes,  # Sizes
    keys,
    temperature,
    KIND: tl.constexpr,
    TABLE: tl.constexpr,
):
    tile = tile_of(tl.program_id(0), layers, sizes, KIND, TABLE)
    all_rows = number_in(sizes.all_rows).to(tl.int64)
    a_ptr = pointer_of(maps.a, tile.entry, layers.starts, TABLE)
    b_ptr = pointer_of(maps.b, tile.entry, layers.starts, TABLE)
    mask_ptr = a_ptr
    if KIND.mask != "":
        mask_ptr = pointer_to(maps.mask, tile.entry, layers.starts, KIND.mask_dtype, TABLE)
    ptrs = (a_ptr, b_ptr, mask_ptr)
    a, b, keep, _, _ = read(ptrs, tile, 0, keys, sizes, temperature, KIND)
    taking = tl.sum(keep.to(tl.int32), 1) if KIND.mask == "kept" else tl.full((KIND.rows,), 1, tl.int32) * keys
    of_a, of_b = normalisers(ptrs, tile, a, b, keys, sizes, temperature, KIND)
    counts = tile.there
    if KIND.inputs == "logits":
        counts = counts & (of_a.peak != float("-inf")) & (of_b.peak != float("-inf"))
        of_a = Softmax(finite(of_a.peak), of_a.log, of_a.inverse)
        of_b = Softmax(finite(of_b.peak), of_b.log, of_b.inverse)
    value, inner = compared(a, b, of_a, of_b, KIND)
    if KIND.more:
        for start in range(KIND.keys, keys, KIND.keys):
            a, b, keep, _, _ = read(ptrs, tile, start, keys, sizes, temperature, KIND)
            more, more_inner = compared(a, b, of_a, of_b, KIND)
            value += more
            inner += more_inner
            if KIND.mask == "kept":
                taking += tl.sum(keep.to(tl.int32), 1)
    if KIND.mask == "kept":
        counts = counts & (taking > 0)
    scale = tl.full((KIND.rows,), 1.0, tl.float32)
    if KIND.metric == "mse" or KIND.metric == "l1":
        scale = tl.div_rn(1.0, tl.maximum(taking, 1).to(tl.float32))
        value *= scale
        inner *= scale
    if KIND.inputs == "logits":
        twice: tl.constexpr = 2.0 if KIND.metric == "sym_kl" or KIND.metric == "mse" else 1.0
        other = twice * value - inner
        if KIND.metric == "cosine":
            inner = value
            other = value
        value = tl.where(counts, value, 0.0)
        scale = tl.where(counts, scale, 0.0)
        values = (of_a.peak, of_a.log, of_b.peak, of_b.log, inner, other, scale)
        keep_statistics(statistics_ptr, tile, all_rows, values)
    elif KIND.metric == "cosine":
        value = tl.where((of_a.peak == 0.0) != (of_b.peak == 0.0), 2.0 * value, value)
        keep_statistics(statistics_ptr, tile, all_rows, (of_a.peak, of_b.peak, value))
    elif KIND.metric == "mse" or KIND.metric == "l1":
        keep_statistics(statistics_ptr, tile, all_rows, (scale,))
    weight = factor_of(weights, tile.entry, layers.starts, TABLE)
    if KIND.reduction == "none":
        tl.store(out_ptr + tile.kept, value * weight, mask=tile.there)
    else:
        at = tile.layer * number_in(sizes.partials) + tile.block
        tl.store(out_ptr + at, tl.sum(tl.where(tile.there, value, 0.0)) * weight)
        tl.store(out_ptr + number_in(sizes.counts).to(tl.int64) + at, tl.sum(counts.to(tl.float32)))


@triton.jit(do_not_specialize=["programs", "layers"])
def _totals_kernel(
    partials_ptr,  # (2, layers, programs) float32
    totals_ptr,  # (layers,) float32
    scales_ptr,  # (layers,) float32
    programs,
    layers,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    layer = tl.program_id(0).to(tl.int64)
    sums, counts = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, programs, BLOCK):
        lane = start + tl.arange(0, BLOCK)
        at = layer * programs + lane
        sums += tl.load(partials_ptr + at, mask=lane < programs, other=0.0)
        counts += tl.load(partials_ptr + layers.to(tl.int64) * programs + at, mask=lane < programs, other=0.0)
    scale = 1.0
    if MEAN:
        scale = tl.div_rn(1.0, tl.maximum(tl.sum(counts), 1.0))
    tl.store(scales_ptr + layer, scale)
    tl.store(totals_ptr + layer, tl.sum(sums) * scale)


@triton.jit(do_not_specialize_on_alignment=["statistics_ptr", "grad_ptr", "scales_ptr"])
def _maps_bwd_kernel(
    maps,  # Pointers
    layers,  # Layers
    weights,  # column of factors
    statistics_ptr,  # (statistics, all rows) float32
    scales_ptr,  # (layers,) float32
    grad_ptr,  # (all rows,) or one float32
    sizes,  # Sizes
    keys,
    temperature,
    KIND: tl.constexpr,
    STATISTICS: tl.constexpr,  # how many
    TABLE: tl.constexpr,
):
    tile = tile_of(tl.program_id(0), layers, sizes, KIND, TABLE)
    a_ptr = pointer_of(maps.a, tile.entry, layers.starts, TABLE)
    b_ptr = pointer_of(maps.b, tile.entry, layers.starts, TABLE)
    mask_ptr = a_ptr
    if KIND.mask != "":
        mask_ptr = pointer_to(maps.mask, tile.entry, layers.starts, KIND.mask_dtype, TABLE)
    of_row = statistics(statistics_ptr, tile, number_in(sizes.all_rows).to(tl.int64), STATISTICS)
    upstream = factor_of(weights, tile.entry, layers.starts, TABLE)
    if KIND.reduction == "mean":
        upstream *= tl.load(scales_ptr + tile.layer)
    if KIND.reduction == "none":
        upstream = upstream * tl.load(grad_ptr + tile.kept, mask=tile.there, other=0.0)[:, None]
    else:
        upstream *= tl.load(grad_ptr)
    if KIND.warm:
        upstream = upstream / temperature
    for start in range(0, keys, KIND.keys):
        a, b, _, moved_a, moved_b = read((a_ptr, b_ptr, mask_ptr), tile, start, keys, sizes, temperature, KIND)
        if KIND.inputs == "logits":
            of_a, of_b = logit_slopes(a, b, of_row, KIND)
        else:
            of_a, of_b = probability_slopes(a, b, of_row, KIND)
        key = start + tl.arange(0, KIND.keys)
        here = tile.there[:, None] & (key < keys)[None, :]
        at = tile.row[:, None] * keys + key[None, :]
        if maps.a_grad is not None:
            to_ptr = pointer_of(maps.a_grad, tile.entry, layers.starts, TABLE)
            tl.store(to_ptr + at, tl.where(moved_a, of_a * upstream, 0.0).to(to_ptr.dtype.element_ty), mask=here)
        if maps.b_grad is not None:
            to_ptr = pointer_of(maps.b_grad, tile.entry, layers.starts, TABLE)
            tl.store(to_ptr + at, tl.where(moved_b, of_b * upstream, 0.0).to(to_ptr.dtype.element_ty), mask=here)


class _Launch(NamedTuple):
    """Up to MOST layers of one shape, with masks of the same strides."""

    layers: list[int]
    first_rows: list[int]
    rows: int
    keys: int
    mask: Tensor | None  # of the first layer
    kind: Kind

    @property
    def blocks(self) -> int:
        """Programs of a layer."""
        return triton.cdiv(self.rows, self.kind.rows)

    def options(self, x: Inputs) -> dict:
        warps = 4 * max(1, self.kind.rows * self.kind.keys // TILE)
        # with eight elements of js in a thread ptxas spills, whatever the registers
        spilling = x.inputs == "logits" and x.metric == "js" and x.a[0].dtype == torch.float32
        return {"num_warps": min(2 * warps, 32) if spilling else warps, "enable_fp_fusion": True}

    def sizes(self, all_rows: int, partials: int, layers: int) -> Sizes:
        mask_runs, key_stride = [(1, 0)], 0
        if self.mask is not None:
            rows = self.mask.select(-1, 0)
            model = torch.empty(rows.shape, device="meta")
            mask_runs, key_stride = runs(rows, model), self.mask.stride(-1)
        (inner, inner_stride), (middle, middle_stride), (_, outer_stride) = [*mask_runs, (1, 0), (1, 0)][:3]
        numbers = (self.rows, all_rows, self.blocks, partials, layers * partials)
        of_mask = (inner, middle, inner_stride, middle_stride, outer_stride, key_stride)
        return Sizes(*map(odd_number, (*numbers, *of_mask)))

    def columns(self, x: Inputs, a_grads: list[Tensor] | None, b_grads: list[Tensor] | None) -> tuple:
        """The kernel's columns and how it reads them."""
        masks = None
        if self.mask is not None:
            masks = [_few_runs(x.masks[i]) for i in self.layers]
            masks = [mask.view(torch.uint8) if mask.dtype == torch.bool else mask for mask in masks]
        chosen = ([side[i] for i in self.layers] if side is not None else None for side in (a_grads, b_grads))
        pointers = Pointers(
            [x.a[i].contiguous() for i in self.layers], [x.b[i].contiguous() for i in self.layers], masks, *chosen
        )
        starts = [n * self.blocks for n in range(len(self.layers))]
        weights = [x.weights[i] for i in self.layers]
        return columns_of(Layers(starts, self.first_rows, self.layers), pointers, weights)


def _few_runs(mask: Tensor) -> Tensor:
    """The mask, copied if its rows cannot be walked in three runs: such as one of more than two separate axes."""
    rows = mask.select(-1, 0)
    return mask if len(runs(rows, torch.empty(rows.shape, device="meta"))) <= 3 else mask.contiguous()


def _launches(x: Inputs) -> list[_Launch]:
    groups: dict[tuple, list[int]] = {}
    for i, a in enumerate(x.a):
        if a.numel() > 0:
            groups.setdefault((tuple(a.shape), x.masks[i].stride() if x.masks else ()), []).append(i)
    counts = rows_of(x.a)
    found = []
    for (shape, _), group in groups.items():
        mask = _few_runs(x.masks[group[0]]) if x.masks else None
        for start in range(0, len(group), MOST):
            chosen = group[start : start + MOST]
            first_rows = [sum(counts[:i]) for i in chosen]
            kind = _kind_of(x, x.a[chosen[0]], mask)
            found.append(_Launch(chosen, first_rows, math.prod(shape[:-1]), shape[-1], mask, kind))
    return found


def _kind_of(x: Inputs, a: Tensor, mask: Tensor | None) -> Kind:
    keys = a.shape[-1]
    more = keys > MOST_KEYS
    width = TILE if more else max(16, triton.next_power_of_2(keys))
    masked = "" if mask is None else "kept" if mask.dtype == torch.bool else "added"
    dtype = None if mask is None else MASK_TYPES.get(mask.dtype, tl.uint8)
    wide = a.numel() >= 2**31 - 2 * TILE or (mask is not None and needs_int64(mask))
    dense = mask is not None and mask.stride(-1) == 1
    return Kind(
        x.metric,
        x.inputs,
        masked,
        dtype,
        dense,
        x.temperature != 1,
        x.reduction,
        wide,
        max(1, TILE // width),
        width,
        more,
    )


def attention_maps_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    first, layers, all_rows, launches = x.a[0], len(x.a), sum(rows_of(x.a)), _launches(x)
    kept = first.new_empty((statistics_of(x.inputs, x.metric), all_rows), dtype=torch.float32)
    scales = first.new_empty((layers,), dtype=torch.float32)
    partials = max((launch.blocks for launch in launches), default=0)
    if x.reduction == "none":
        out = first.new_empty((all_rows,), dtype=torch.float32)
    else:
        even = sum(launch.blocks * len(launch.layers) for launch in launches) == layers * partials
        out = (first.new_empty if even else first.new_zeros)((2, layers, partials), dtype=torch.float32)
    with on_device(first):
        for launch in launches:
            numbers, pointers, weights, table = launch.columns(x, None, None)
            _maps_fwd_kernel[(launch.blocks * len(launch.layers),)](
                pointers, numbers, weights, kept, out, launch.sizes(all_rows, partials, layers), launch.keys,
                x.temperature, launch.kind, table, **launch.options(x),
            )  # fmt: skip
        if x.reduction == "none":
            return out, Saved(kept, scales)
        totals = first.new_empty((layers,), dtype=torch.float32)
        _totals_kernel[(layers,)](
            out, totals, scales, partials, layers, x.reduction == "mean", TOTAL_BLOCK, num_warps=4
        )
    return totals.sum() if layers > 1 else totals.reshape(()), Saved(kept, scales)


def attention_maps_bwd(grad: Tensor, saved: Saved, x: Inputs, needs: Needs) -> list[Tensor]:
    a_grads = [t.new_empty(t.shape) for t in x.a] if needs.a else None
    b_grads = [t.new_empty(t.shape) for t in x.b] if needs.b else None
    all_rows, grad = sum(rows_of(x.a)), grad.contiguous()
    if a_grads is not None or b_grads is not None:
        with on_device(grad):
            for launch in _launches(x):
                numbers, pointers, weights, table = launch.columns(x, a_grads, b_grads)
                _maps_bwd_kernel[(launch.blocks * len(launch.layers),)](
                    pointers, numbers, weights, saved.statistics, saved.scales, grad,
                    launch.sizes(all_rows, 0, len(x.a)), launch.keys, x.temperature, launch.kind,
                    saved.statistics.shape[0], table, **launch.options(x),
                )  # fmt: skip
    return (a_grads or []) + (b_grads or [])


def aot_cases() -> Iterator[AotCase]:
    """Every metric and kind of inputs; masks, dtypes, one gradient, long rows, many layers, huge ones."""
    wide = (2, 4, 64, 512)
    for inputs, metric in ((i, m) for i in ("probs", "logits") for m in METRICS):
        few = inputs == "logits" and metric == "js"  # loads a thread, beside the statistics, which are narrow
        yield from _aot_calls(f"{inputs} {metric}", [wide], torch.float32, inputs, metric, vector=not few)
    for metric in OF_SCORES:
        yield from _aot_calls(f"scores {metric}", [wide], torch.bfloat16, "scores", metric, mask="added", vector=True)
    for metric in ("js", "kl", "mse"):
        for mask in ("kept", "added"):
            yield from _aot_calls(f"logits {metric} {mask}", [wide], torch.bfloat16, "logits", metric, mask=mask)
        yield from _aot_calls(f"probs {metric} half", [wide], torch.float16, "probs", metric, vector=True)
    for metric in ("js", "sym_kl", "cosine"):
        yield from _aot_calls(f"long {metric}", [(1, 2, 16, 65536)], torch.bfloat16, "logits", metric, vector=True)
        yield from _aot_calls(f"odd {metric}", [(1, 2, 197, 197)], torch.float32, "logits", metric, reduction="none")
    yield from _aot_calls("long probs cosine", [(1, 2, 16, 5000)], torch.float32, "probs", "cosine", mask="kept")
    yield from _aot_calls("12 layers", [wide] * 12, torch.bfloat16, "logits", "kl", mask="kept")
    yield from _aot_calls("two shapes", [wide, (2, 8, 64, 64)], torch.bfloat16, "probs", "js")
    yield from _aot_calls("most keys", [(1, 2, 16, MOST_KEYS)], torch.float32, "logits", "js")
    yield from _aot_calls("one key", [(3, 1)], torch.float32, "probs", "l1")
    yield from _aot_calls("int64", [(8, 16, 8192, 4096)], torch.bfloat16, "probs", "js")


def _aot_calls(
    label: str, shapes: list, dtype: torch.dtype, inputs: str, metric: str, *, mask: str = "", reduction: str = "mean",
    vector: bool = False,
) -> Iterator[AotCase]:  # fmt: skip
    maps = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
    masks = []
    if mask:
        of_keys = [
            torch.empty(shape[-1], dtype=torch.bool if mask == "kept" else dtype, device="meta") for shape in shapes
        ]
        masks = [m.expand(shape) for m, shape in zip(of_keys, shapes, strict=True)]
    warm = 2.0 if inputs == "logits" and mask else 1.0
    x = Inputs(maps, maps, masks, [1.0] * len(maps), inputs, metric, warm, reduction, False)
    rows = sum(rows_of(maps))
    saved = Saved(
        torch.empty((statistics_of(inputs, metric), rows), device="meta"), torch.empty(len(maps), device="meta")
    )
    grad = torch.empty((rows,) if reduction == "none" else (), device="meta")
    yield AotCase(f"forward {label}", attention_maps_fwd, (x,), ("_maps_fwd_kernel",) if vector else ())
    for needs in (Needs(True, True), Needs(False, True)):
        which = "both" if needs.a else "b"
        args = (grad, saved, x, needs)
        yield AotCase(f"backward {label} {which}", attention_maps_bwd, args, ("_maps_bwd_kernel",) if vector else ())
