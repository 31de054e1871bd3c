"""The definition of the contrastive losses, from the statistics of each row's negatives, in differentiable PyTorch.

With logits s_ij = scale <q_i, k_j> + b_j, the positive p of row i and the set A of its negatives:

    n    = log sum_{j in A} exp(s_ij)
    loss = softplus(n - s_ip)          standard InfoNCE: log-sum-exp over the positive and A, minus s_ip
    loss = n - s_ip                    decoupled: the positive is left out of the sum
    loss + smoothing * (s_ip - mean of s_ij over A and p)

The softplus form keeps the digits of loss and gradient when the positive has almost all of the probability. A row with
no negatives has loss 0 and no gradient.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.traced import changes, number
from .options import ContrastiveOutput, NegativeSampling, SoftmaxOptions


class Statistics(NamedTuple):
    """Of each row's negatives, in the order of softmax_stats.py; where there is a hardness there are moments too."""

    lse: Tensor
    max: Tensor
    sum: Tensor | None = None
    number: Tensor | None = None
    lse_1p_beta: Tensor | None = None  # of (1 + beta) (s - max)
    lse_beta: Tensor | None = None  # of beta (s - max)


def log_sum_exp(logits: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """log-sum-exp of each row's allowed entries with the exact maximum, and whether there are any.

    A row with none gives a finite number that the caller must replace, so that no NaN gradient arises.
    """
    if logits.shape[1] == 0:
        logits, allowed = logits.new_zeros(logits.shape[0], 1), allowed.new_zeros(allowed.shape[0], 1)
    some = allowed.any(1)
    masked = logits.masked_fill(~allowed, -math.inf).masked_fill(~some[:, None], 0.0)
    return torch.logsumexp(masked, 1), some


def statistics(logits: Tensor, allowed: Tensor, moments: bool, hardness: float) -> Tensor:
    """[S, M]: log-sum-exp, maximum and so on (as softmax_stats.py lists) of each row's allowed logits [M, C]."""
    flat = F.pad(logits.detach().masked_fill(~allowed, -math.inf), (0, 1), value=-math.inf)

    def lse(x: Tensor) -> Tensor:
        value, some = log_sum_exp(x, allowed)
        return torch.where(some, value, torch.full_like(value, -math.inf))

    row_max = flat.amax(1)
    stats = [lse(logits), row_max]
    if moments:
        stats += [torch.where(allowed, logits, torch.zeros_like(logits)).sum(1), allowed.sum(1).to(logits.dtype)]
    if hardness:
        below = (logits - row_max.masked_fill(row_max == -math.inf, 0.0)[:, None]).masked_fill(~allowed, -math.inf)
        stats += _hardness_sums((hardness * below).exp(), below, allowed.any(1))
    return torch.stack(stats)


def slopes(logits: Tensor, allowed: Tensor, stats: Tensor, grad: Tensor, moments: bool, hardness: float) -> Tensor:
    """[M, C]: the gradients of logits of which, or of more than which, `stats` [S, M] are the statistics."""

    def share(exponent: Tensor, lse: Tensor, upstream: Tensor) -> Tensor:
        finite = lse.masked_fill(lse == -math.inf, 0.0)
        return upstream[:, None] * (exponent - finite[:, None]).exp()

    known, given = Statistics(*stats.unbind()), Statistics(*grad.unbind())
    total = share(logits, known.lse, given.lse)
    if moments:
        assert given.sum is not None
        total = total + given.sum[:, None]
    if hardness:
        assert known.lse_1p_beta is not None and known.lse_beta is not None
        assert given.lse_1p_beta is not None and given.lse_beta is not None
        below = logits - known.max.masked_fill(known.max == -math.inf, 0.0)[:, None]
        total = total + (1 + hardness) * share((1 + hardness) * below, known.lse_1p_beta, given.lse_1p_beta)
        total = total + hardness * share(hardness * below, known.lse_beta, given.lse_beta)
    return total.masked_fill(~allowed, 0.0)


def merged(one: Tensor, two: Tensor, moments: bool, hardness: float) -> Tensor:
    """Statistics [S, M] of the union of two sets of negatives."""
    none = (one == -math.inf) & (two == -math.inf)  # whose log-sum-exp has the gradient NaN
    both = torch.stack((one.masked_fill(none, 0.0), two.masked_fill(none, 0.0)))
    # not logaddexp: its second derivatives are NaN where one of the sets is empty, or over e^88 times the other
    together = list(torch.logsumexp(both, 0).masked_fill(none, -math.inf))
    together[1] = torch.maximum(one[1], two[1]).detach()
    if moments:
        together[2:4] = one[2] + two[2], one[3] + two[3]
    if hardness:
        together[-2:] = _merged_hardness(one, two, hardness)
    return torch.stack(together)


def _merged_hardness(one: Tensor, two: Tensor, hardness: float) -> tuple[Tensor, Tensor]:
    """The log-sum-exps of hardness, each below its set's own maximum, of the union and below that of both."""
    new_max = torch.maximum(one[1], two[1]).detach()
    parts, differences = [], []
    for stats in (one, two):
        empty = stats[1] == -math.inf
        gap = (stats[1].detach() - new_max).masked_fill(empty, 0.0)
        lse_1p_beta, lse_beta = (x.masked_fill(empty, 0.0) for x in stats[-2:])
        parts.append((lse_beta + hardness * gap).masked_fill(empty, -math.inf))
        differences.append(lse_1p_beta - lse_beta + gap)
    logs, some = torch.stack(parts, 1), new_max > -math.inf
    max_log = logs.detach().amax(1).masked_fill(~some, 0.0)
    lse_1p_beta, lse_beta = _hardness_sums((logs - max_log[:, None]).exp(), torch.stack(differences, 1), some)
    return lse_1p_beta + max_log, lse_beta + max_log


def _hardness_sums(powers: Tensor, below: Tensor, some: Tensor) -> list[Tensor]:
    """log sum_j powers_j e^below_j and log sum_j powers_j of each row, -inf where there are no terms.

    Both are sums of the same powers, times the hardness in their exponents: so roundings of those cancel in the
    difference, as they would not in two log-sum-exps.
    """
    sums = ((powers * below.exp()).sum(1), powers.sum(1))
    return [total.masked_fill(~some, 1.0).log().masked_fill(~some, -math.inf) for total in sums]


def negatives_lse(
    positive: Tensor, stats: Statistics, scale: Tensor | float, sampling: NegativeSampling | None
) -> tuple[Tensor, Tensor]:
    """The log of the sum over the negatives, reweighted and debiased (finite where there are none), and whether there
    are any."""
    some = stats.lse != -math.inf
    lse = torch.where(some, stats.lse, torch.zeros_like(stats.lse))
    if sampling is None or (sampling.hardness == 0 and sampling.tau_plus == 0):
        return lse, some
    assert stats.number is not None
    log_number = stats.number.clamp_min(1).log()
    if sampling.hardness:
        assert stats.lse_1p_beta is not None and stats.lse_beta is not None
        row_max, lse_1p_beta, lse_beta = (
            torch.where(some, x, torch.zeros_like(x)) for x in (stats.max, stats.lse_1p_beta, stats.lse_beta)
        )
        lse = lse_1p_beta - lse_beta + log_number + row_max.detach()  # the largest last
    if sampling.tau_plus:
        tau = sampling.tau_plus
        shift = torch.maximum(lse, positive).detach()  # cancels in value and gradient
        left = (lse - shift).exp() - tau * (positive + log_number - shift).exp()
        exhausted = left <= 0  # False for NaN, which so goes on
        log_rest = number(-tau, left).log1p() if changes(tau) else math.log1p(-tau)
        debiased = left.masked_fill(exhausted, 1.0).log() + shift - log_rest
        floor = log_number - scale
        lse = torch.where(exhausted, floor, torch.maximum(debiased, floor))
    return lse, some


def row_losses(positive: Tensor, stats: Tensor, scale: Tensor | float, form: SoftmaxOptions) -> ContrastiveOutput:
    """Loss, log-sum-exp and top-1 of rows from positive logits [M] and the negatives' statistics [..., S, M]."""
    of_rows = Statistics(*stats.unbind(-2))
    from_negatives, some = negatives_lse(positive, of_rows, scale, form.sampling)
    if form.include_positive:
        loss = -F.logsigmoid(positive - from_negatives)
        lse = torch.where(some, positive + loss, positive)
    else:
        loss = from_negatives - positive
        lse = torch.where(some, from_negatives, torch.full_like(from_negatives, -math.inf))
    if form.label_smoothing:
        assert of_rows.sum is not None and of_rows.number is not None
        loss = loss + form.label_smoothing * (of_rows.number * positive - of_rows.sum) / (of_rows.number + 1)
    loss = torch.where(some, loss, torch.zeros_like(loss))
    # times 1, but of an infinite loss times infinity: its gradient then is no number, on which a loss scaler would step
    loss = loss * (from_negatives - positive).masked_fill(loss != math.inf, 1.0)
    return ContrastiveOutput(loss, lse, positive.detach() > of_rows.max.detach())
