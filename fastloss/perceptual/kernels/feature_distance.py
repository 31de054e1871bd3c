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
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.launch import STREAM_OPTIONS, AotCase, on_device, registers, total, vector_block
from ...core.kernels.layer_table import MOST, UNIT, columns_of, factor_of, layer_of, number_of, pointer_of, start_of
from ..feature_distance import Inputs, LayerInputs, Needs, Saved
from ..layer_layout import layers_of, layout_of, rows_of, sign_count, sign_words

CRITERIA = ("l1", "l2", "charbonnier", "smooth_l1")
UNROLL = tl.constexpr(4)  # pieces whose loads are in flight together, in the backward
FORWARD_UNROLL = 4  # in the forward, with whole units


class Pointers(NamedTuple):
    """Columns of a launch, see layer_table.py: of each layer a pointer, (rows, length)."""

    features: Any  # None where the signs stand for features and targets
    targets: Any
    incoming: Any = None  # None, or what is added to the first gradient
    gradients: Any = None  # None in the forward; else of the first side that needs them
    negatives: Any = None  # None, or the gradients of the other side


class Layers(NamedTuple):
    """Likewise, a number of each layer."""

    starts: Any  # its first tile
    units: Any  # the length of its rows, in Table.unit
    words: Any  # its first word of signs, in 16


class Tile(NamedTuple):
    """Where a program's tile is."""

    first: Any  # element, in its layer
    count: Any  # of elements
    step: Any  # elements in a piece
    first_word: Any  # of its signs


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
def _tile_of(tile, layer, row, layers, TABLE: tl.constexpr, BLOCK: tl.constexpr):
    UNIT: tl.constexpr = TABLE.unit
    units_of_row = number_of(layers.units, layer, layers.starts, TABLE).to(tl.int64)
    nth = (tile - start_of(layer, layers.starts, TABLE)).to(tl.int64)
    units_left = units_of_row - nth * (16 * BLOCK // UNIT)
    count = tl.minimum(units_left, 16 * BLOCK // UNIT).to(tl.int32) * UNIT
    words_of_row = (units_of_row * UNIT + 255) // 256
    words_before = number_of(layers.words, layer, layers.starts, TABLE).to(tl.int64) + row * words_of_row
    first = row * units_of_row * UNIT + nth * (16 * BLOCK)
    return Tile(first, count, (count + 255) // 256 * 16, words_before * 16 + nth * BLOCK)


@triton.jit(do_not_specialize=["tiles", "stride"])
def _distance_fwd_kernel(
    pointers,  # Pointers: of features and targets
    signs_ptr,  # (words,) int32, or None
    out_ptr,  # (rows, tiles) float32, rows `stride` apart
    layers,  # Layers
    scales,  # column: what the sums of each layer are multiplied with
    tiles,
    stride,
    p,
    KIND: tl.constexpr,
    TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles).to(tl.int64)
    layer = layer_of(tile, layers.starts, TABLE)
    own = _tile_of(tile, layer, row, layers, TABLE, BLOCK)
    f_ptr = pointer_of(pointers.features, layer, layers.starts, TABLE) + own.first
    t_ptr = pointer_of(pointers.targets, layer, layers.starts, TABLE) + own.first
    count, step = own.count, own.step
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
        tl.store(signs_ptr + own.first_word + columns, word, mask=columns < step)
    tl.store(out_ptr + row * stride + tile, tl.sum(acc) * factor_of(scales, layer, layers.starts, TABLE))


@triton.jit(do_not_specialize=["tiles"])
def _distance_bwd_kernel(
    grad_ptr,  # (rows,) float32
    signs_ptr,  # (words,) int32, or None
    pointers,  # Pointers
    layers,  # Layers
    scales,  # as in the forward
    tiles,
    p,
    KIND: tl.constexpr,
    TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles).to(tl.int64)
    layer = layer_of(tile, layers.starts, TABLE)
    own = _tile_of(tile, layer, row, layers, TABLE, BLOCK)
    first, count, step = own.first, own.count, own.step
    upstream = tl.load(grad_ptr + row) * factor_of(scales, layer, layers.starts, TABLE)
    columns = tl.arange(0, BLOCK)
    to_ptr = pointer_of(pointers.gradients, layer, layers.starts, TABLE) + first
    if signs_ptr is not None:
        word = tl.load(signs_ptr + own.first_word + columns, mask=columns < step, other=0)
    else:
        f_ptr = pointer_of(pointers.features, layer, layers.starts, TABLE) + first
        t_ptr = pointer_of(pointers.targets, layer, layers.starts, TABLE) + first
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
        if pointers.negatives is not None:
            other_ptr = pointer_of(pointers.negatives, layer, layers.starts, TABLE) + first
            tl.store(other_ptr + offsets, (-g).to(other_ptr.dtype.element_ty), mask=mask)
        if pointers.incoming is not None:
            in_ptr = pointer_of(pointers.incoming, layer, layers.starts, TABLE) + first
            g += tl.load(in_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(to_ptr + offsets, g.to(to_ptr.dtype.element_ty), mask=mask)


class _Launch(NamedTuple):
    """Up to MOST layers of a list, those without elements left out: which they are, and the numbers of each."""

    layers: tuple[int, ...]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    words: tuple[int, ...]
    scales: tuple[float, ...]
    tiles: int
    first_tile: int
    unit: int

    def columns(self, sides: Pointers) -> tuple[Layers, Pointers, Any, Any]:
        """The kernel's columns, with the layers' tensors of each side."""
        units = [n // self.unit for n in self.lengths]
        chosen = Pointers(*(None if side is None else [side[i] for i in self.layers] for side in sides))
        return columns_of(Layers(self.starts, units, self.words), chosen, self.scales, self.unit)


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
    for start in range(0, len(entries), MOST):
        layers, lengths, words, scales, tiles = zip(*entries[start : start + MOST], strict=True)
        *starts, end = itertools.accumulate(tiles, initial=0)
        unit = UNIT if all(n % UNIT == 0 for n in lengths) else 1
        found.append(_Launch(layers, tuple(starts), lengths, words, scales, end, first, unit))
        first += end
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


def _sum_layers(x: Inputs, criterion: str, parameter: float, signs: Tensor | None) -> Tensor:
    model, per_sample = x.features[0], x.reduction == "none"
    shape = model.shape[:1] if per_sample else ()
    launches = _launches(x.layout, x.weights, model.dtype, x.reduction)
    if not launches:
        return model.new_zeros(shape, dtype=torch.float32)
    rows, tiles = math.prod(shape), sum(launch.tiles for launch in launches)
    partials = model.new_empty((rows, tiles), dtype=torch.float32)
    sides = Pointers(_laid_out(x.features, x.layout), _laid_out(x.targets, x.layout))
    with on_device(partials):
        for launch in launches:
            layers, pointers, scales, table = launch.columns(sides)
            _distance_fwd_kernel[(rows * launch.tiles,)](
                pointers, signs, partials[:, launch.first_tile :], layers, scales, launch.tiles, tiles, parameter,
                criterion, table, vector_block(model.dtype.itemsize), FORWARD_UNROLL if launch.unit > 1 else 2,
                **STREAM_OPTIONS,
            )  # fmt: skip
    return partials.sum(1) if per_sample else total(partials)


def feature_l1_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    signs = x.features[0].new_empty(sign_count(x.layout, x.reduction), dtype=torch.int32)
    return _sum_layers(x, "l1", 0.0, signs), Saved(signs)


def feature_distance_fwd(x: Inputs) -> Tensor:
    return _sum_layers(x, x.criterion, x.parameter, None)


def feature_l1_bwd(grad: Tensor, saved: Saved, incoming: list[Tensor], x: LayerInputs, needs: Needs) -> list[Tensor]:
    whole = Inputs([], [], x.weights, x.layout, x.dtype, "l1", 0.0, x.reduction)
    return _gradients(grad, saved.signs, whole, incoming, needs)


def feature_distance_bwd(grad: Tensor, x: Inputs, incoming: list[Tensor], needs: Needs) -> list[Tensor]:
    return _gradients(grad, None, x, incoming, needs)


def _gradients(grad: Tensor, signs: Tensor | None, x: Inputs, incoming: list[Tensor], needs: Needs) -> list[Tensor]:
    spilling = bool(incoming) and x.dtype == torch.float32  # at 32 registers, ptxas's choice
    of_lanes = STREAM_OPTIONS | (registers(40) if spilling else {})
    grads = [
        [grad.new_empty_strided(*layer, dtype=x.dtype) for layer in layers_of(x.layout)] for needed in needs if needed
    ]
    if not grads:
        return []
    weights = x.weights
    if not needs.features:  # the gradients differ in sign only
        weights = [-weight for weight in weights]
    rows = grad.numel()
    grad = grad.contiguous()
    read = [_laid_out(tensors, x.layout) if tensors else None for tensors in (x.features, x.targets, incoming)]
    with on_device(grad):
        for launch in _launches(x.layout, weights, x.dtype, x.reduction):
            layers, pointers, scales, table = launch.columns(Pointers(*read, *grads))
            _distance_bwd_kernel[(rows * launch.tiles,)](
                grad, signs, pointers, layers, scales, launch.tiles, x.parameter, x.criterion, table,
                vector_block(x.dtype.itemsize), **of_lanes,
            )  # fmt: skip
    return [gradient for side in grads for gradient in side]


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
    x = Inputs(features, features, weights, layout, dtype, criterion, 0.5, reduction)
    forward, backward = (
        (feature_l1_fwd, feature_l1_bwd) if criterion == "l1" else (feature_distance_fwd, feature_distance_bwd)
    )
    yield AotCase(f"forward {label}", forward, (x,), wide)
    sides = ((True, False), (False, True), (True, True)) if all_sides else ((True, False),)
    for needs, tapped in itertools.product((Needs(*side) for side in sides), (False, True)):
        if tapped and not needs.features:
            continue
        incoming = features if tapped else []
        if criterion == "l1":
            saved = Saved(torch.empty(sign_count(layout, reduction), dtype=torch.int32, device="meta"))
            args: tuple = (grad, saved, incoming, LayerInputs(weights, layout, dtype, reduction), needs)
        else:
            args = (grad, x, incoming, needs)
        which = {(True, False): "", (False, True): " targets", (True, True): " both"}[needs]
        yield AotCase(f"backward {label}{which}{' tap' if tapped else ''}", backward, args, wide)
