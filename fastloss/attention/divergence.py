"""Divergences of two attention distributions in PyTorch operators, and what the public losses share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import check_not_empty, result_dtype
from ..core.checks import check_dense, check_same_device, check_tensor

METRICS = ("js", "kl", "sym_kl", "mse", "l1", "cosine")
OF_SCORES = ("mse", "l1", "cosine")  # need no probabilities
LEAST_SCORE = -1e2  # raw scores no larger stand for masked keys, and count as 0


def _known(p: Tensor) -> Tensor:
    """p, with a gradient of 0 where it is 0: there the true one is infinite, and a softmax would make NaN of it."""
    return torch.where(p == 0, torch.zeros_like(p), p)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """p log(p / q) by element, and 0 with zero gradients where p is 0: both logs see 1 there."""
    zero = p == 0
    one = torch.ones_like(p)
    p, q = torch.where(zero, one, p), torch.where(zero, one, q)
    above = (p - q) / q
    near = above.abs() < 0.5  # the difference of the logs of near numbers would be mostly rounding
    small = torch.where(near, above, torch.zeros_like(p))
    return p * torch.where(near, torch.log1p(small), p.log() - q.log())


def _kl_of_logs(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p log(p / q) - p + q by element, which sums to the divergence of two normalised rows without their rounding.

    The rounding of a row's normaliser shifts all its log-probabilities alike: here it cancels. Finite where only q
    underflows; 0 where both are 0.
    """
    p, q = log_p.exp(), log_q.exp()
    zero = p == 0
    none = torch.zeros_like(p)
    d = torch.where(zero, none, log_p) - torch.where(zero, none, log_q)
    near = d.abs() < 0.5
    small = torch.where(near, d, none)
    return torch.where(near & ~zero, p * (small + torch.expm1(-small)), p * d + (q - p))


def _sym_kl_of_logs(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(p - q) log(p / q) / 2 by element: of one sign, and blind to the rounding of the normalisers."""
    p, q = log_p.exp(), log_q.exp()
    zero = (p == 0) & (q == 0)
    none = torch.zeros_like(p)
    return 0.5 * (p - q) * (torch.where(zero, none, log_p) - torch.where(zero, none, log_q))


def _js(p: Tensor, q: Tensor) -> Tensor:
    """KL(p|m) / 2 + KL(q|m) / 2 by element; where p and q are near, from r = (p - q) / (p + q): p = m (1 + r)."""
    p, q = _known(p), _known(q)
    total = p + q
    r = (p - q) / torch.where(total == 0, torch.ones_like(total), total)

    near = r.abs() < 0.5
    small = torch.where(near, r, torch.zeros_like(r))
    middle = 0.5 * total
    middle = torch.where(middle == 0, total, middle)  # half of the smallest positive number rounds to 0
    close = 0.25 * total * ((1 + small) * torch.log1p(small) + (1 - small) * torch.log1p(-small))
    return torch.where(near, close, 0.5 * (_kl(p, middle) + _kl(q, middle)))


def _unit(p: Tensor) -> tuple[Tensor, Tensor]:
    """p over its length, row by row, and which rows are all 0: they stay so, with zero gradients."""
    square = (p * p).sum(-1, keepdim=True)
    zero = square == 0
    return torch.where(zero, torch.zeros_like(p), p / torch.where(zero, torch.ones_like(square), square).sqrt()), zero


def _cosine(p: Tensor, q: Tensor) -> Tensor:
    """1 - cos by element, as |p / |p| - q / |q||^2 / 2: no digits are lost where they are near. 1 where one is 0."""
    (u, zero_p), (v, zero_q) = _unit(p), _unit(q)
    d = u - v
    return torch.where(zero_p == zero_q, 0.5, 1.0).to(d.dtype) * (d * d)


def _probable(p: Tensor) -> Tensor:
    """p, and NaN where it is negative."""
    negative = p < 0
    return torch.where(negative, torch.where(negative, p, -1.0).log(), p)


def _divergence(p: Tensor, q: Tensor, metric: str) -> Tensor:
    """The metric by element, from probabilities."""
    if metric == "kl":
        return _kl(p, q)
    if metric == "sym_kl":
        return 0.5 * (_kl(p, q) + _kl(q, p))
    if metric == "js":
        return _js(p, q)
    if metric == "cosine":
        return _cosine(p, q)
    return (p - q) * (p - q) if metric == "mse" else (p - q).abs()


def attention_reference(
    a: Tensor, b: Tensor, mask: Tensor | None, inputs: str, metric: str, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The definition: ([..., Q] divergences in float32 or float64, [..., Q] which rows count).

    A mask is bool, True where the key takes part, or is added to logits and scores.
    """
    dtype = result_dtype(a, b)
    a, b = a.to(dtype), b.to(dtype)
    keep = torch.ones_like(a, dtype=torch.bool)
    if mask is not None and mask.dtype == torch.bool:
        keep = mask.expand(a.shape)
    elif mask is not None:
        a, b = a + mask.to(dtype), b + mask.to(dtype)
    if inputs == "logits":
        # a row without a logit above -inf has no softmax: it counts as masked, and is computed as if all were 0
        rows = (keep & (a != -torch.inf)).any(-1) & (keep & (b != -torch.inf)).any(-1)
        a, b = (torch.where(keep, x, -torch.inf).where(rows[..., None], torch.zeros_like(x)) for x in (a, b))
        a, b = (a / temperature).log_softmax(-1), (b / temperature).log_softmax(-1)
        if metric == "kl":
            values = _kl_of_logs(a, b)
        elif metric == "sym_kl":
            values = _sym_kl_of_logs(a, b)
        else:
            values = _divergence(a.exp(), b.exp(), metric)
    else:
        rows = keep.any(-1)
        if inputs == "scores":
            a, b = (torch.where(x <= LEAST_SCORE, torch.zeros_like(x), x) for x in (a, b))
        a, b = (torch.where(keep, x, torch.zeros_like(x)) for x in (a, b))
        if metric in ("js", "kl", "sym_kl"):
            a, b = _probable(a), _probable(b)
        values = _divergence(a, b, metric)
    values = values.sum(-1)
    return values / keep.sum(-1).clamp(min=1) if metric in ("mse", "l1") else values, rows


def reduce_rows(values: Tensor, rows: Tensor, reduction: str) -> Tensor:
    """Mean over the rows that count (0 when none does), sum, or the rows with 0 where they do not count."""
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    check_not_empty(values.numel())
    return values.sum() / rows.sum().clamp(min=1)


def check_mask(mask: Tensor | None, shape: torch.Size, like: Tensor, additive: bool = False) -> None:
    """A bool mask that broadcasts to `shape`, or with `additive` one of floats, which is added."""
    if mask is None:
        return
    if isinstance(mask, Tensor):
        check_dense("mask", mask)
    added = additive and isinstance(mask, Tensor) and mask.is_floating_point()
    if not isinstance(mask, Tensor) or (mask.dtype != torch.bool and not added):
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        more = " or a floating-point one, which is added" if additive else ""
        raise TypeError(f"mask: expected a bool tensor (True: the key takes part){more}, got {got}")
    if added:
        check_tensor("mask", mask)
        if mask.requires_grad:
            raise ValueError("mask: no gradient is provided for it; pass mask.detach()")
    check_same_device("the maps", like, "mask", mask)
    try:
        fits = torch.broadcast_shapes(mask.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"mask: expected a shape that broadcasts to {tuple(shape)}, got {tuple(mask.shape)}")
