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

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.traced import changes, number
from .options import ContrastiveOutput, NegativeSampling, SoftmaxForm


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

    stats = [lse(logits), flat.amax(1)]
    if moments:
        stats += [torch.where(allowed, logits, torch.zeros_like(logits)).sum(1), allowed.sum(1).to(logits.dtype)]
    if hardness:
        below = (logits - stats[1].masked_fill(stats[1] == -math.inf, 0.0)[:, None]).masked_fill(~allowed, -math.inf)
        stats += _hardness_sums((hardness * below).exp(), below, allowed.any(1))
    return torch.stack(stats)


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
    most = torch.maximum(one[1], two[1]).detach()
    easier, more = [], []
    for stats in (one, two):
        empty = stats[1] == -math.inf
        gap = (stats[1].detach() - most).masked_fill(empty, 0.0)
        harder, easy = (x.masked_fill(empty, 0.0) for x in stats[-2:])
        easier.append((easy + hardness * gap).masked_fill(empty, -math.inf))
        more.append(harder - easy + gap)
    shares, some = torch.stack(easier, 1), most > -math.inf
    top = shares.detach().amax(1).masked_fill(~some, 0.0)
    harder, easy = _hardness_sums((shares - top[:, None]).exp(), torch.stack(more, 1), some)
    return harder + top, easy + top


def _hardness_sums(powers: Tensor, below: Tensor, some: Tensor) -> list[Tensor]:
    """log sum_j powers_j e^below_j and log sum_j powers_j of each row, -inf where there are no terms.

    Both are sums of the same powers, times the hardness in their exponents: so roundings of those cancel in the
    difference, as they would not in two log-sum-exps.
    """
    sums = ((powers * below.exp()).sum(1), powers.sum(1))
    return [total.masked_fill(~some, 1.0).log().masked_fill(~some, -math.inf) for total in sums]


def negative_mass(
    positive: Tensor, stats: tuple[Tensor, ...], scale: Tensor | float, sampling: NegativeSampling | None
) -> tuple[Tensor, Tensor]:
    """The log of the negatives' total, reweighted and debiased (finite where there are none), and whether there are."""
    some = stats[0] != -math.inf
    mass = torch.where(some, stats[0], torch.zeros_like(stats[0]))
    if sampling is None or (sampling.hardness == 0 and sampling.tau_plus == 0):
        return mass, some
    log_count = stats[3].clamp_min(1).log()
    if sampling.hardness:
        most, harder, easier = (torch.where(some, x, torch.zeros_like(x)) for x in (stats[1], *stats[-2:]))
        mass = harder - easier + log_count + most.detach()  # the largest last
    if sampling.tau_plus:
        tau = sampling.tau_plus
        shift = torch.maximum(mass, positive).detach()  # cancels in value and gradient
        left = (mass - shift).exp() - tau * (positive + log_count - shift).exp()
        exhausted = left <= 0  # False for NaN, which so goes on
        kept = number(-tau, left).log1p() if changes(tau) else math.log1p(-tau)
        debiased = left.masked_fill(exhausted, 1.0).log() + shift - kept
        floor = log_count - scale
        mass = torch.where(exhausted, floor, torch.maximum(debiased, floor))
    return mass, some


def row_losses(positive: Tensor, stats: Tensor, scale: Tensor | float, form: SoftmaxForm) -> ContrastiveOutput:
    """Loss, log-sum-exp and top-1 of rows from positive logits [M] and the negatives' statistics [..., S, M]."""
    each = stats.unbind(-2)
    mass, some = negative_mass(positive, each, scale, form.sampling)
    if form.include_positive:
        loss = -F.logsigmoid(positive - mass)
        lse = torch.where(some, positive + loss, positive)
    else:
        loss = mass - positive
        lse = torch.where(some, mass, torch.full_like(mass, -math.inf))
    if form.label_smoothing:
        loss = loss + form.label_smoothing * (each[3] * positive - each[2]) / (each[3] + 1)
    loss = torch.where(some, loss, torch.zeros_like(loss))
    # times 1, but of an infinite loss times infinity: its gradient then is no number, on which a loss scaler would step
    loss = loss * (mass - positive).masked_fill(loss != math.inf, 1.0)
    return ContrastiveOutput(loss, lse, positive.detach() > each[1].detach())
