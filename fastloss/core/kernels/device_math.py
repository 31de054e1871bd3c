"""Arithmetic that the kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _softplus(x):
    """log(1 + e^x) and its slope."""
    e = tl.exp2(tl.abs(x) * -1.4426950408889634)
    one, two = e + 1.0, e + 2.0
    both = one * two
    root = tl.rsqrt(both)
    inverse = root * root
    inverse = tl.fma(inverse, tl.fma(-both, inverse, 1.0), inverse)  # a division takes twice the instructions
    t = e * one * inverse
    q = t * t
    series = ((q * 0.1342575 + 0.1411831) * q + 0.2000378) * q + 0.3333332
    return tl.maximum(x, 0.0) + 2.0 * (t + t * (q * series)), tl.where(x < 0.0, e, 1.0) * (inverse * two)


@triton.jit
def sign(x):
    """-1, 0 or 1; 0 for NaN, as torch.sign has it."""
    one = ((x.to(tl.int32, bitcast=True) & -2147483648) | 0x3F800000).to(tl.float32, bitcast=True)
    # three instructions, where two comparisons make five; `> 0` of a difference becomes a comparison of its two terms,
    # made for all elements of a lane at once and packed into bits
    least = tl.full((), 1, tl.int32).to(tl.float32, bitcast=True)  # a literal as small would be float64
    return tl.where(tl.abs(x) >= least, one, 0.0)


@triton.jit
def weighted(x, weight):
    """A value times its weight: 0 where that is 0, which excludes even NaN."""
    return tl.where(weight != 0, x * weight, 0.0)


@triton.jit
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr = 0):
    """Sums that nothing has been added to: of ROWS elements, or of ROWS by COLS."""
    sums = ()
    for _ in tl.static_range(COUNT):
        if COLS == 0:
            none = tl.zeros((ROWS,), tl.float32)
        else:
            none = tl.zeros((ROWS, COLS), tl.float32)
        sums = sums + (none,)  # type: ignore[assignment]
    return sums


@triton.jit
def added(sums, terms):
    """A tuple of sums, a term added to each."""
    new = ()
    for i in tl.static_range(len(sums)):
        new = new + (sums[i] + terms[i],)  # type: ignore[assignment]
    return new


@triton.jit
def number_in(odd):
    """The size that launch.odd_number made an odd number of."""
    return odd >> 1
