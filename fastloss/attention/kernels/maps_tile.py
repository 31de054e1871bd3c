"""Rows of attention maps in Triton: reading them, normalisers, sums and slopes. The formulas: attention_maps.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...core.kernels.device_math import number_in
from ...core.kernels.layer_table import number_of
from .divergence import of_logarithms, of_probabilities, product, slopes

LOG2_E = tl.constexpr(1.4426950408889634)
LEAST_SCORE = tl.constexpr(-100.0)  # as in fastloss/attention/divergence.py


class Pointers(NamedTuple):
    """Columns of a launch, see layer_table.py: of each layer (rows, keys)."""

    a: Any
    b: Any
    mask: Any  # None, or in strides of its own
    a_grad: Any = None
    b_grad: Any = None


class Layers(NamedTuple):
    """Likewise, a number of each layer."""

    starts: Any  # its first program
    first_rows: Any  # in the rows of all layers
    layers: Any  # its place among all


class Sizes(NamedTuple):
    """As odd numbers, see launch.odd_number."""

    rows: int  # of a layer
    all_rows: int
    blocks: int  # programs of a layer
    partials: int  # forward: of a layer, there is room for so many
    counts: int  # forward: where those of rows that count begin
    mask_inner: int  # the mask's rows in runs
    mask_middle: int
    mask_inner_stride: int
    mask_middle_stride: int
    mask_outer_stride: int
    mask_key_stride: int


class Kind(NamedTuple):
    """What is compiled in."""

    metric: str
    inputs: str
    mask: str  # "", "kept" (0 leaves the key out) or "added"
    mask_dtype: Any  # of its elements, or None
    dense_mask: bool  # its keys lie side by side
    warm: bool  # temperature other than 1
    reduction: str
    wide: bool  # offsets need 64 bits
    rows: int  # of a program
    keys: int  # of a row that a program has at a time
    more: bool  # there are more


class Tile(NamedTuple):
    """Which rows a program has."""

    layer: Any  # among all
    entry: Any  # in the columns
    block: Any
    row: Any  # (rows,) in the layer
    there: Any
    kept: Any  # in what is kept of rows


class Softmax(NamedTuple):
    """Of rows of one map: p = e^(x - peak) * inverse. Of probabilities, for "cosine", `peak` is the length."""

    peak: Any
    log: Any
    inverse: Any


@triton.jit
def tile_of(program, layers, sizes, KIND: tl.constexpr, TABLE: tl.constexpr):
    blocks = number_in(sizes.blocks)
    nth = program // blocks
    entry = program if TABLE.dtype is None else nth  # as the columns want it
    block = program - nth * blocks
    row = block * KIND.rows + tl.arange(0, KIND.rows)
    there = row < number_in(sizes.rows)
    if KIND.wide:
        row = row.to(tl.int64)
    first = number_of(layers.first_rows, entry, layers.starts, TABLE).to(tl.int64)
    layer = number_of(layers.layers, entry, layers.starts, TABLE)
    return Tile(layer, entry, block, row, there, first + row)


@triton.jit
def _mask_of(mask_ptr, row, key, here, sizes, KIND: tl.constexpr):
    """Elements of the mask, in whatever strides."""
    inner = number_in(sizes.mask_inner)
    middle = number_in(sizes.mask_middle)
    rest = row // inner
    at = (row % inner) * number_in(sizes.mask_inner_stride) + (rest % middle) * number_in(sizes.mask_middle_stride)
    at += (rest // middle) * number_in(sizes.mask_outer_stride)
    step = 1 if KIND.dense_mask else number_in(sizes.mask_key_stride)
    return tl.load(mask_ptr + at[:, None] + key[None, :] * step, mask=here, other=0)


@triton.jit
def _prepared(x, keep, added, temperature, KIND: tl.constexpr):
    """What is compared, and which elements get a gradient."""
    if KIND.mask == "added":
        x += added
    if KIND.inputs == "logits":
        if KIND.warm:
            x = tl.div_rn(x, temperature)
        return tl.where(keep, x, float("-inf")), keep
    else:
        if KIND.inputs == "scores":
            keep = keep & ~(x <= LEAST_SCORE)
        return tl.where(keep, x, 0.0), keep


@triton.jit
def read(ptrs, tile, start, keys, sizes, temperature, KIND: tl.constexpr):
    """Keys `start` on of both maps, as they are compared; which of them take part, and of which map get gradients."""
    a_ptr, b_ptr, mask_ptr = ptrs
    key = start + tl.arange(0, KIND.keys)
    here = tile.there[:, None] & (key < keys)[None, :]
    at = tile.row[:, None] * keys + key[None, :]
    a = tl.load(a_ptr + at, mask=here, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + at, mask=here, other=0.0).to(tl.float32)
    keep = here
    added = 0.0
    if KIND.mask == "kept":
        keep = _mask_of(mask_ptr, tile.row, key, here, sizes, KIND) != 0
    elif KIND.mask == "added":
        added = _mask_of(mask_ptr, tile.row, key, here, sizes, KIND).to(tl.float32)
    a, moved_a = _prepared(a, keep, added, temperature, KIND)
    b, moved_b = _prepared(b, keep, added, temperature, KIND)
    return a, b, keep, moved_a, moved_b


@triton.jit
def _peak(x):
    """The largest of each row; of rows with NaN inf, which makes NaN of them."""
    return tl.max(tl.where(x == x, x, float("inf")), 1)


@triton.jit
def _exponentials(x, peak, KIND: tl.constexpr):
    e = tl.exp2((x - peak[:, None]) * LOG2_E)
    return e, tl.sum(e * e if KIND.metric == "cosine" else e, 1)


@triton.jit
def finite(peak):
    """The peak, and 0 of rows that have none: their differences from it are no NaN."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def _softmax_of(peak, total, KIND: tl.constexpr):
    total = tl.where(total == 0.0, 1.0, total)
    if KIND.metric == "cosine":
        root = tl.sqrt_rn(total)
        return Softmax(peak, tl.log(root), tl.div_rn(1.0, root))
    else:
        return Softmax(peak, tl.log(total), 1.0 / total)


@triton.jit
def length_of(square):
    """The root of a sum of squares; NaN for an infinite one, whose row has no direction."""
    return tl.where(square == float("inf"), float("nan"), tl.sqrt_rn(square))


@triton.jit
def inverse_of(length):
    """1 over the length, 0 of a row of zeros."""
    return tl.where(length == 0.0, 0.0, tl.div_rn(1.0, tl.where(length == 0.0, 1.0, length)))


@triton.jit
def direction(x, length, inverse):
    """x over its length, rounded once: a row of one number becomes exactly 1. Zeros stay so."""
    u = x * inverse
    return tl.fma(tl.fma(-u, length, x), inverse, u)


@triton.jit
def compared(a, b, of_a, of_b, KIND: tl.constexpr):
    """The two sums of a row over its elements: of the values, and of p times the slope."""
    METRIC: tl.constexpr = KIND.metric
    if KIND.inputs == "logits":
        p = product(tl.exp2((a - of_a.peak[:, None]) * LOG2_E), of_a.inverse[:, None])
        q = product(tl.exp2((b - of_b.peak[:, None]) * LOG2_E), of_b.inverse[:, None])
        if METRIC == "kl" or METRIC == "sym_kl":
            log_p = (a - of_a.peak[:, None]) - of_a.log[:, None]
            value, inner = of_logarithms(p, q, log_p - ((b - of_b.peak[:, None]) - of_b.log[:, None]), METRIC)
        else:
            value, inner = of_probabilities(p, q, METRIC)
        return tl.sum(value, 1), tl.sum(inner, 1)
    else:
        if METRIC == "cosine":
            a = direction(a, of_a.peak[:, None], of_a.inverse[:, None])
            b = direction(b, of_b.peak[:, None], of_b.inverse[:, None])
        value, _ = of_probabilities(a, b, METRIC)
        total = tl.sum(value, 1)
        return total, total


@triton.jit
def normalisers(ptrs, tile, a, b, keys, sizes, temperature, KIND: tl.constexpr):
    """The first pass: softmax, or length, of both rows. `a` and `b` are their first keys, all unless there are more."""
    if KIND.inputs == "logits":
        peak_a, peak_b = _peak(a), _peak(b)
        _, total_a = _exponentials(a, finite(peak_a), KIND)
        _, total_b = _exponentials(b, finite(peak_b), KIND)
        if KIND.more:
            for start in range(KIND.keys, keys, KIND.keys):
                a, b, _, _, _ = read(ptrs, tile, start, keys, sizes, temperature, KIND)
                higher_a, higher_b = tl.maximum(peak_a, _peak(a)), tl.maximum(peak_b, _peak(b))
                power: tl.constexpr = 2.0 if KIND.metric == "cosine" else 1.0
                # not of rows that have no key as yet, nor of NaN
                shrink_a = tl.where(peak_a == higher_a, 1.0, tl.exp2((peak_a - higher_a) * (power * LOG2_E)))
                shrink_b = tl.where(peak_b == higher_b, 1.0, tl.exp2((peak_b - higher_b) * (power * LOG2_E)))
                _, more_a = _exponentials(a, finite(higher_a), KIND)
                _, more_b = _exponentials(b, finite(higher_b), KIND)
                total_a, total_b = total_a * shrink_a + more_a, total_b * shrink_b + more_b
                peak_a, peak_b = higher_a, higher_b
        return _softmax_of(peak_a, total_a, KIND), _softmax_of(peak_b, total_b, KIND)
    elif KIND.metric == "cosine":
        total_a, total_b = tl.sum(a * a, 1), tl.sum(b * b, 1)
        if KIND.more:
            for start in range(KIND.keys, keys, KIND.keys):
                a, b, _, _, _ = read(ptrs, tile, start, keys, sizes, temperature, KIND)
                total_a += tl.sum(a * a, 1)
                total_b += tl.sum(b * b, 1)
        length_a, length_b = length_of(total_a), length_of(total_b)
        return Softmax(length_a, total_a, inverse_of(length_a)), Softmax(length_b, total_b, inverse_of(length_b))
    else:
        none = tl.zeros((KIND.rows,), tl.float32)
        return Softmax(none, none, none), Softmax(none, none, none)


@triton.jit
def keep_statistics(statistics_ptr, tile, all_rows, values):
    for k in tl.static_range(len(values)):
        tl.store(statistics_ptr + k * all_rows + tile.kept, values[k], mask=tile.there)


@triton.jit
def statistics(statistics_ptr, tile, all_rows, COUNT: tl.constexpr):
    """What was kept of the rows."""
    found = ()
    for k in tl.static_range(COUNT):
        found = found + (tl.load(statistics_ptr + k * all_rows + tile.kept, mask=tile.there, other=0.0)[:, None],)  # type: ignore[assignment]
    return found


@triton.jit
def logit_slopes(a, b, of_row, KIND: tl.constexpr):
    """Of logits, from what was kept of the rows."""
    METRIC: tl.constexpr = KIND.metric
    peak_a, log_a, peak_b, log_b, inner_a, inner_b, scale = of_row
    log_p, log_q = (a - peak_a) - log_a, (b - peak_b) - log_b
    p, q = tl.exp2(log_p * LOG2_E), tl.exp2(log_q * LOG2_E)
    d = p - q
    if METRIC == "kl":
        of_a = tl.where(p != 0, p * ((log_p - log_q) - inner_a), 0.0)
        of_b = -d
    elif METRIC == "sym_kl":
        ratio = log_p - log_q
        of_a = 0.5 * (tl.where(p != 0, p * (ratio - inner_a), 0.0) + d)
        of_b = -0.5 * (tl.where(q != 0, q * (ratio + inner_b), 0.0) + d)
    elif METRIC == "cosine":
        of_a = p * (d - p * inner_a)
        of_b = q * (-d - q * inner_b)
    else:
        of_a, of_b = slopes(p, q, METRIC)
        of_a = tl.where(p != 0, p * (of_a * scale - inner_a), 0.0)
        of_b = tl.where(q != 0, q * (of_b * scale - inner_b), 0.0)
    return tl.where(scale != 0, of_a, 0.0), tl.where(scale != 0, of_b, 0.0)


@triton.jit
def probability_slopes(a, b, of_row, KIND: tl.constexpr):
    """Of probabilities and scores."""
    if KIND.metric == "cosine":
        length_a, length_b, value = of_row
        inverse_a, inverse_b = inverse_of(length_a), inverse_of(length_b)
        u, v = direction(a, length_a, inverse_a), direction(b, length_b, inverse_b)
        both = (length_a != 0) & (length_b != 0)  # a row of zeros has no direction
        of_a = tl.where(both, ((u - v) - u * value) * inverse_a, 0.0)
        of_b = tl.where(both, ((v - u) - v * value) * inverse_b, 0.0)
    else:
        of_a, of_b = slopes(a, b, KIND.metric)
        if KIND.metric == "mse" or KIND.metric == "l1":
            (scale,) = of_row
            of_a *= scale
            of_b *= scale
    return of_a, of_b
