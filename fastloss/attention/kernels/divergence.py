"""Divergences of two probabilities p and q, element by element, and their slopes, without the rounding of a difference
of logarithms of near numbers. What they are: fastloss/attention/divergence.py. The series have a relative error below
1e-7, and equal numbers give exactly 0."""

from __future__ import annotations

import triton
import triton.language as tl

from ...core.kernels.device_math import sign


@triton.jit
def product(x, by):
    """x * by, which the compiler does not fuse with a subtraction that follows: equal ones differ by exactly 0."""
    return tl.where(x != 0.0, x * by, 0.0)


@triton.jit
def _probable(p, q, x):
    """NaN where p or q is negative, and so no probability."""
    return tl.where((p < 0.0) | (q < 0.0), float("nan"), x)


@triton.jit
def _over_total(x, p, q):
    """x / (p + q), and 0 where that is no normal number."""
    total = p + q
    none = tl.abs(total) < 1.17549435e-38
    return _probable(p, q, tl.where(none, 0.0, x / tl.where(none, 1.0, total)))


@triton.jit
def log_ratio(p, q):
    """log(p / q); where both are 0, 0."""
    t = _over_total(p - q, p, q)  # log(p / q) = 2 atanh t
    s = t * t
    series = (((s * 0.140891551 + 0.139803041) * s + 0.200124549) * s + 0.333331573) * s + 1.0
    return tl.where(tl.abs(t) < 0.33333334, 2.0 * t * series, tl.log(p) - tl.log(q))


@triton.jit
def log_larger(t):
    """log(1 + t), 0 <= t <= 1"""
    s = ((t * 0.00523250335 - 0.0295044736) * t + 0.0782247057) * t - 0.136631401
    return t * (((((s * t + 0.191059571) * t - 0.248429695) * t + 0.333190952) * t - 0.499994931) * t + 0.99999997)


@triton.jit
def log_smaller(t, w):
    """log(1 - t), 0 <= t <= 1, from w = 1 - t too"""
    s = ((t * -1.44105597 + 1.69570816) * t - 1.25758553) * t + 0.20350335
    s = ((((s * t - 0.269604422) * t - 0.242806137) * t - 0.333700549) * t - 0.499992854) * t - 1.00000002
    return tl.where(t < 0.5, t * s, tl.log(w))


@triton.jit
def js(p, q):
    """With m = (p + q) / 2: log(p / m), log(q / m) and p log(p / m) / 2 + q log(q / m) / 2. Where p or q is 0, its own
    logarithm is to be left out."""
    r = _over_total(p - q, p, q)  # p = m (1 + r), q = m (1 - r)
    t = tl.abs(r)
    larger = log_larger(t)
    less = tl.where(p < q, p, q)
    smaller = log_smaller(t, _over_total(2.0 * less, p, q))
    s = r * r  # the value is a series in it
    series = ((s * 0.0276251413 + 0.0182374227) * s + 0.0362662147) * s + 0.0666329079
    series = (series * s + 0.166667414) * s + 1.0
    far = tl.where(less != 0, less * smaller, 0.0) + tl.where(p < q, q, p) * larger
    value = tl.where(t < 0.5, 0.25 * (p + q) * (s * series), 0.5 * far)
    return tl.where(r > 0, larger, smaller), tl.where(r > 0, smaller, larger), value


@triton.jit
def _exponential_rest(d):
    """d + e^-d - 1, |d| < 1 / 2"""
    s = ((d * -0.000198756037 + 0.00139819973) * d - 0.00833345225) * d + 0.0416657959
    return d * d * ((s * d - 0.166666655) * d + 0.500000012)


@triton.jit
def of_logarithms(p, q, d, METRIC: tl.constexpr):
    """Of "kl" and "sym_kl" from d = log p - log q: the value, and p d."""
    if METRIC == "sym_kl":
        d = tl.where((p == 0) & (q == 0), 0.0, d)
        return 0.5 * (p - q) * d, tl.where(p != 0, p * d, 0.0)
    else:
        d = tl.where(p == 0, 0.0, d)
        near = (tl.abs(d) < 0.5) & (p != 0)
        return tl.where(near, p * _exponential_rest(d), p * d + (q - p)), p * d


@triton.jit
def of_probabilities(p, q, METRIC: tl.constexpr):
    """The value, and p times its slope (of metrics that a softmax goes with here)."""
    d = p - q
    if METRIC == "js":
        log_p, _, value = js(p, q)
        return value, tl.where(p != 0, 0.5 * p * log_p, 0.0)
    elif METRIC == "kl":
        return tl.where(p != 0, p * log_ratio(p, q), 0.0), d
    elif METRIC == "sym_kl":
        return 0.5 * d * log_ratio(p, q), d
    elif METRIC == "mse":
        return d * d, 2.0 * p * d
    elif METRIC == "l1":
        return tl.abs(d), p * sign(d)
    else:
        return 0.5 * d * d, d  # "cosine", of unit vectors


@triton.jit
def slopes(p, q, METRIC: tl.constexpr):
    """The derivatives by p and by q, of all but "cosine"."""
    d = p - q
    if METRIC == "js":
        log_p, log_q, _ = js(p, q)
        return tl.where(p != 0, 0.5 * log_p, 0.0), tl.where(q != 0, 0.5 * log_q, 0.0)
    elif METRIC == "kl":
        return tl.where(p != 0, log_ratio(p, q) + 1.0, 0.0), tl.where(p != 0, _probable(p, q, -p / q), 0.0)
    elif METRIC == "sym_kl":
        there = (p != 0) | (q != 0)
        ratio = log_ratio(p, q)
        return tl.where(there, 0.5 * (d / p + ratio), 0.0), tl.where(there, -0.5 * (d / q + ratio), 0.0)
    elif METRIC == "mse":
        return 2.0 * d, -2.0 * d
    else:
        return sign(d), -sign(d)
