"""Triton kernels for the distance of two lists of deep features: up to 64 layers in one launch.

With d = f - t, p the parameter of the criterion and g the gradient of the sum of the layer:

    criterion     c(d)                                       d c / d f = - d c / d t
    l1            |d|                                        sign(d)
    l2            d^2                                        2 d
    charbonnier   sqrt(d^2 + p^2)                            d / sqrt(d^2 + p^2), 0 at d = 0
    smooth_l1     d^2 / (2 p) if |d| < p else |d| - p / 2    d / p if |d| < p else sign(d)

NaN has the slope NaN.

A row is what one sum runs over (a layer, or a sample of it), a tile 16 * BLOCK elements of a row, one tile a program. A
tile is read in 16 pieces of `step` elements, step = BLOCK but in the last tile of a row. Element w of piece r has its
sign in word w of the tile: bit 2 r where d > 0, bit 2 r + 1 where d < 0, both where d is NaN. So a thread packs what it
has read itself, and features, signs and gradients all move in 128-bit accesses.

Bytes per element of size s: L1 forward 2 s + 1/4, backward s + 1/4; the others forward 2 s, backward 3 s; s more in the
backward for a second side, and for incoming gradients.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.launch import STREAM_OPTIONS, AotCase, on_device, registers, total, vector_block
from ..layer_layout import layers_of, layout_of, rows_of, sign_count, sign_words
from .layer_table import MOST, UNIT, Columns, columns_of, factor_of, layer_of, number_of, pointer_of, start_of

CRITERIA = ("l1", "l2", "charbonnier", "smooth_l1")
UNROLL = tl.constexpr(4)  # pieces whose loads are in flight together, in the backward
FORWARD_UNROLL = 4  # in the forward, with whole units


@triton.jit
def _term(d, p, KIND: tl.constexpr):
    a = tl.abs(d)
    if KIND == "l1":
        return a
    elif KIND == "l2":
        return d * d
    elif KIND == "charbonnier":
        return tl.sqrt(d * d + p * p)
    else:
        return tl.where(a < p, 0.5 * d * (d / p), a - 0.5 * p)


@triton.jit
def _slope(d, p, KIND: tl.constexpr):
    if KIND == "l2":
        return 2.0 * d
    elif KIND == "charbonnier":
        t = d * (1.0 / tl.maximum(p, 1.1754944e-38))  # in units of eps: its square is never too small, nor too large
        t = tl.where(t > 16777216.0, 16777216.0, tl.where(t < -16777216.0, -16777216.0, t))  # from there on it is 1
        return t * tl.rsqrt(t * t + 1.0) + (d - d)  # NaN for infinities, as eager has
    else:
        return tl.where(tl.abs(d) >= p, tl.where(d > 0, 1.0, -1.0), d / p)


@triton.jit
def _place(tile, layer, row, starts, units, words, DTYPE: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """(first element of the tile in its layer, how many it has, elements in a piece, its first word of signs)."""
    units_of_row = number_of(units, layer, starts, DTYPE).to(tl.int64)
    nth = (tile - start_of(layer, starts, DTYPE)).to(tl.int64)
    units_left = units_of_row - nth * (16 * BLOCK // UNIT)
    count = tl.minimum(units_left, 16 * BLOCK // UNIT).to(tl.int32) * UNIT
    words_of_row = (units_of_row * UNIT + 255) // 256
    first_word = (number_of(words, layer, starts, DTYPE).to(tl.int64) + row * words_of_row) * 16 + nth * BLOCK
    first = row * units_of_row * UNIT + nth * (16 * BLOCK)
    return first, count, (count + 255) // 256 * 16, first_word


@triton.jit(do_not_specialize=["tiles", "stride"])
def _distance_fwd_kernel(
    features,  # columns, see layer_table.py: a pointer a layer, (rows, length)
    targets,  # likewise
    signs_ptr,  # (words,) int32, or None
    out_ptr,  # (rows, tiles) float32, rows `stride` apart
    starts,  # of each layer: its first tile
    units,  # the length of its rows, in UNIT
    words,  # its first word of signs, in 16
    scales,  # what its sums are multiplied with
    tiles,
    stride,
    p,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles).to(tl.int64)
    layer = layer_of(tile, starts, DTYPE)
    first, count, step, first_word = _place(tile, layer, row, starts, units, words, DTYPE, UNIT, BLOCK)
    f_ptr = pointer_of(features, layer, starts, DTYPE, ALIGNED) + first
    t_ptr = pointer_of(targets, layer, starts, DTYPE, ALIGNED) + first
    columns = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    word = tl.zeros((BLOCK,), tl.int32)
    for r in tl.range(0, (count + step - 1) // step, loop_unroll_factor=AHEAD):
        offsets = r * step + columns
        mask = columns < tl.minimum(step, count - r * step)
        f = tl.load(f_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        t = tl.load(t_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        d = f - t
        term = _term(d, p, KIND)
        acc += tl.where(mask, term, 0.0) if KIND == "charbonnier" else term  # charbonnier(0) is not 0
        if signs_ptr is not None:  # the bits are the same for all elements: a select and an or each
            above, below = tl.full((), 1, tl.int32) << (2 * r), tl.full((), 2, tl.int32) << (2 * r)
            word |= tl.where(d <= 0, 0, above) | tl.where(d >= 0, 0, below)  # NaN sets both
    if signs_ptr is not None:
        tl.store(signs_ptr + first_word + columns, word, mask=columns < step)
    tl.store(out_ptr + row * stride + tile, tl.sum(acc) * factor_of(scales, layer, starts, DTYPE))


@triton.jit(do_not_specialize=["tiles"])
def _distance_bwd_kernel(
    grad_ptr,  # (rows,) float32
    signs_ptr,  # (words,) int32, or None
    features,  # None with signs, else a pointer a layer: (rows, length)
    targets,  # likewise
    incoming,  # None, or likewise: added to the first gradient
    gradients,  # a pointer a layer: (rows, length)
    negatives,  # None, or likewise: gradients of the other side
    starts,
    units,
    words,
    scales,
    tiles,
    p,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles).to(tl.int64)
    layer = layer_of(tile, starts, DTYPE)
    first, count, step, first_word = _place(tile, layer, row, starts, units, words, DTYPE, UNIT, BLOCK)
    upstream = tl.load(grad_ptr + row) * factor_of(scales, layer, starts, DTYPE)
    columns = tl.arange(0, BLOCK)
    to_ptr = pointer_of(gradients, layer, starts, DTYPE, ALIGNED) + first
    if signs_ptr is not None:
        word = tl.load(signs_ptr + first_word + columns, mask=columns < step, other=0)
    else:
        f_ptr = pointer_of(features, layer, starts, DTYPE, ALIGNED) + first
        t_ptr = pointer_of(targets, layer, starts, DTYPE, ALIGNED) + first
    for r in tl.range(0, (count + step - 1) // step, loop_unroll_factor=UNROLL):
        offsets = r * step + columns
        mask = columns < tl.minimum(step, count - r * step)
        if signs_ptr is not None:
            pair = word >> (2 * r)
            slope = tl.where((pair & 3) == 3, float("nan"), ((pair & 1) - ((pair >> 1) & 1)).to(tl.float32))
        else:
            f = tl.load(f_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            t = tl.load(t_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            slope = _slope(f - t, p, KIND)
        g = upstream * slope
        if negatives is not None:
            other_ptr = pointer_of(negatives, layer, starts, DTYPE, ALIGNED) + first
            tl.store(other_ptr + offsets, (-g).to(other_ptr.dtype.element_ty), mask=mask)
        if incoming is not None:
            in_ptr = pointer_of(incoming, layer, starts, DTYPE, ALIGNED) + first
            g += tl.load(in_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(to_ptr + offsets, g.to(to_ptr.dtype.element_ty), mask=mask)


@dataclass
class _Launch:
    """Up to MOST layers of a list, those without elements left out: which they are, and the numbers of each."""

    layers: list[int]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    words: tuple[int, ...]
    scales: tuple[float, ...]
    tiles: int
    first_tile: int
    unit: int

    def columns(self, *sides: Sequence[Tensor] | None) -> Columns:
        """The kernel's columns, with the layers' tensors of each side."""
        units = [n // self.unit for n in self.lengths]
        chosen = [None if side is None else [side[i] for i in self.layers] for side in sides]
        return columns_of((self.starts, units, self.words), chosen, [self.scales])


def _launches(layout: list[int], weights: Sequence[float], dtype: torch.dtype, reduction: str) -> list[_Launch]:
    """What to launch for a list of layers. The tiles of a row are counted through all of its layers."""
    # 16 bytes of each list a thread: with 32, registers leave room for half of the programs
    per_tile, entries, word = 16 * vector_block(dtype.itemsize), [], 0
    for i, ((shape, _), weight) in enumerate(zip(layers_of(layout), weights, strict=True)):
        rows, length = rows_of(shape, reduction)
        if rows * length > 0:
            scale = weight if reduction == "sum" else weight / length
            entries.append((i, length, word // 16, scale, triton.cdiv(length, per_tile)))
        word += rows * sign_words(length)
    found, first = [], 0
    for at in range(0, len(entries), MOST):
        layers, lengths, words, scales, tiles = zip(*entries[at : at + MOST], strict=True)
        starts = tuple(itertools.accumulate(tiles, initial=0))
        unit = UNIT if all(n % UNIT == 0 for n in lengths) else 1
        found.append(_Launch(list(layers), starts[:-1], lengths, words, scales, starts[-1], first, unit))
        first += starts[-1]
    return found


def _laid_out(tensors: Sequence[Tensor], layout: list[int]) -> list[Tensor]:
    """The tensors as the layout has them: themselves, or copies."""
    found = []
    for tensor, (shape, strides) in zip(tensors, layers_of(layout), strict=True):
        here = zip(shape, tensor.stride(), strides, strict=True)
        if tensor.numel() > 0 and any(size != 1 and own != wanted for size, own, wanted in here):
            tensor = tensor.new_empty_strided(shape, strides).copy_(tensor)
        found.append(tensor)
    return found


def _sum_layers(
    features: list[Tensor],
    targets: list[Tensor],
    weights: list[float],
    layout: list[int],
    criterion: str,
    parameter: float,
    reduction: str,
    signs: Tensor | None,
) -> Tensor:
    dtype, shape = features[0].dtype, features[0].shape[:1] if reduction == "none" else ()
    launches = _launches(layout, weights, dtype, reduction)
    if not launches:
        return features[0].new_zeros(shape, dtype=torch.float32)
    rows = math.prod(shape)
    tiles = launches[-1].first_tile + launches[-1].tiles
    partials = features[0].new_empty((rows, tiles), dtype=torch.float32)
    features, targets = _laid_out(features, layout), _laid_out(targets, layout)
    with on_device(partials):
        for launch in launches:
            of = launch.columns(features, targets)
            _distance_fwd_kernel[(rows * launch.tiles,)](
                *of.pointers, signs, partials[:, launch.first_tile :], *of.numbers, *of.factors, launch.tiles, tiles,
                parameter, criterion, of.dtype, of.aligned, launch.unit, vector_block(dtype.itemsize),
                FORWARD_UNROLL if launch.unit > 1 else 2, **STREAM_OPTIONS,
            )  # fmt: skip
    return partials.sum(1) if reduction == "none" else total(partials)


def feature_l1_fwd(
    features: list[Tensor],
    targets: list[Tensor],
    weights: list[float],
    layout: list[int],
    dtype: torch.dtype,
    criterion: str,
    parameter: float,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    signs = features[0].new_empty(sign_count(layout, reduction), dtype=torch.int32)
    return _sum_layers(features, targets, weights, layout, "l1", 0.0, reduction, signs), signs


def feature_distance_fwd(
    features: list[Tensor],
    targets: list[Tensor],
    weights: list[float],
    layout: list[int],
    dtype: torch.dtype,
    criterion: str,
    parameter: float,
    reduction: str,
) -> Tensor:
    return _sum_layers(features, targets, weights, layout, criterion, parameter, reduction, None)


def feature_l1_bwd(
    grad: Tensor,
    signs: Tensor,
    incoming: list[Tensor],
    weights: list[float],
    layout: list[int],
    dtype: torch.dtype,
    reduction: str,
    needs_features: bool,
    needs_targets: bool,
) -> list[Tensor]:
    return _gradients(
        grad, signs, [], [], incoming, weights, layout, dtype, ("l1", 0.0, reduction), needs_features, needs_targets
    )


def feature_distance_bwd(
    grad: Tensor,
    features: list[Tensor],
    targets: list[Tensor],
    incoming: list[Tensor],
    weights: list[float],
    layout: list[int],
    dtype: torch.dtype,
    criterion: str,
    parameter: float,
    reduction: str,
    needs_features: bool,
    needs_targets: bool,
) -> list[Tensor]:
    options = (criterion, parameter, reduction)
    return _gradients(
        grad, None, features, targets, incoming, weights, layout, dtype, options, needs_features, needs_targets
    )


def _gradients(
    grad: Tensor,
    signs: Tensor | None,
    features: list[Tensor],
    targets: list[Tensor],
    incoming: list[Tensor],
    weights: list[float],
    layout: list[int],
    dtype: torch.dtype,
    options: tuple[str, float, str],
    needs_features: bool,
    needs_targets: bool,
) -> list[Tensor]:
    criterion, parameter, reduction = options
    spilling = bool(incoming) and dtype == torch.float32  # at 32 registers, ptxas's choice
    of_lanes = STREAM_OPTIONS | (registers(40) if spilling else {})
    made = [
        [grad.new_empty_strided(*layer, dtype=dtype) for layer in layers_of(layout)]
        for needed in (needs_features, needs_targets)
        if needed
    ]
    if not made:
        return []
    if not needs_features:  # the gradients differ in sign only
        weights = [-weight for weight in weights]
    rows = grad.numel()
    grad = grad.contiguous()
    sides = [_laid_out(tensors, layout) if tensors else None for tensors in (features, targets, incoming)]
    with on_device(grad):
        for launch in _launches(layout, weights, dtype, reduction):
            of = launch.columns(*sides, made[0], made[1] if len(made) > 1 else None)
            _distance_bwd_kernel[(rows * launch.tiles,)](
                grad, signs, *of.pointers, *of.numbers, *of.factors, launch.tiles,
                parameter, criterion, of.dtype, of.aligned, launch.unit, vector_block(dtype.itemsize), **of_lanes,
            )  # fmt: skip
    return [gradient for side in made for gradient in side]


def aot_cases() -> Iterator[AotCase]:
    """Every criterion, dtype and set of gradients; odd sizes, one layer, many, one value a sample, huge layers."""
    even = ((2, 64, 32, 32), (2, 128, 16, 16), (2, 256, 8, 8))
    for dtype, criterion in itertools.product((torch.float32, torch.bfloat16, torch.float16), CRITERIA):
        yield from _aot_calls("", even, dtype, criterion, "mean", all_sides=True)
    for criterion in ("l1", "smooth_l1"):
        yield from _aot_calls("odd", ((1, 3, 33, 65), (1, 7, 5, 3)), torch.float32, criterion, "mean", vector=False)
        yield from _aot_calls("per sample", even, torch.bfloat16, criterion, "none")
        yield from _aot_calls("one layer", even[:1], torch.bfloat16, criterion, "mean")
        for count in (10, 64):
            yield from _aot_calls(f"{count} layers", even[1:2] * count, torch.float32, criterion, "mean")
        yield from _aot_calls("one element", ((1,),), torch.float32, criterion, "mean", vector=False)
        yield from _aot_calls("int64", ((4, 64, 8192, 8192),) * 2, torch.bfloat16, criterion, "mean")


def _aot_calls(
    label: str, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, criterion: str, reduction: str,
    all_sides: bool = False, vector: bool = True,
) -> Iterator[AotCase]:  # fmt: skip
    label = f"{criterion} {str(dtype).removeprefix('torch.')} {label}".rstrip()
    wide = ("_distance_fwd_kernel", "_distance_bwd_kernel") if vector else ()
    features = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
    layout, weights = layout_of(features, features, reduction), [1.0] * len(shapes)
    grad = torch.empty(shapes[0][:1] if reduction == "none" else (), device="meta")
    args = (features, features, weights, layout, dtype, criterion, 0.5, reduction)
    name = "feature_l1" if criterion == "l1" else "feature_distance"
    yield AotCase(f"forward {label}", globals()[f"{name}_fwd"], args, wide)
    sides = ((True, False), (False, True), (True, True)) if all_sides else ((True, False),)
    for (needs_features, needs_targets), tapped in itertools.product(sides, (False, True)):
        if tapped and not needs_features:
            continue
        incoming = features if tapped else []
        if criterion == "l1":
            signs = torch.empty(sign_count(layout, reduction), dtype=torch.int32, device="meta")
            rest: tuple = (grad, signs, incoming, weights, layout, dtype, reduction)
        else:
            rest = (grad, features, features, incoming, *args[2:])
        which = {(True, False): "", (False, True): " targets", (True, True): " both"}[needs_features, needs_targets]
        yield AotCase(f"backward {label}{which}{' tap' if tapped else ''}", globals()[f"{name}_bwd"],
                      (*rest, needs_features, needs_targets), wide)  # fmt: skip
