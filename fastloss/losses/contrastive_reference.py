"""The definition of the contrastive losses, dense and in plain differentiable PyTorch.

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
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_number
from ..core import result_dtype

TINY_NORM = 1e-12  # a vector no longer than this counts as zero: cosine 0 with everything, gradient 0


@dataclass(frozen=True)
class NegativeSampling:
    r"""How the negatives of a softmax contrastive loss are chosen and weighted; the defaults change nothing.

    Args:
        tau_plus: debiasing, the probability in [0, 1) that a negative has the anchor's class. The sum over the
            negatives becomes ``N max((mean_A exp(s) - tau_plus exp(s_ip)) / (1 - tau_plus), exp(-scale))``, with the
            least exponential that a cosine gives as its floor: ``normalize=True`` and no bias.
        hardness: beta >= 0, weighs each negative by ``exp(beta s)`` (normalised to mean 1): hard ones count more.
        margin: leaves out the negatives that are more similar than the positive by more than `margin` (a difference of
            similarities, before scale and bias): likely false negatives. No gradient flows through the choice.

    Source: Chuang et al., "Debiased contrastive learning", 2020; Robinson et al., "Contrastive learning with hard
    negative samples", 2021; the margin as in Zhang et al., "Qwen3 embedding", 2025.
    """

    tau_plus: float = 0.0
    hardness: float = 0.0
    margin: float | None = None

    def __post_init__(self) -> None:
        check_number("tau_plus", self.tau_plus, 0)
        if self.tau_plus >= 1:
            raise ValueError(f"tau_plus: expected a probability >= 0 and < 1, got {self.tau_plus!r}")
        check_number("hardness", self.hardness, 0)
        if self.margin is not None:
            check_number("margin", self.margin)


class ContrastiveOutput(NamedTuple):
    """What ``return_lse=True`` returns: the loss and, without further work, two by-products.

    `loss` is the loss as without it. `lse` is the log-sum-exp that each row's loss has (with gradient; -inf where a sum
    over negatives alone has none). `top1` (bool) says whether the positive beats all of the row's negatives; a tie
    does not. Rows are ``[M]``; ``[2, M]`` for the two directions of a symmetric loss.
    """

    loss: Tensor
    lse: Tensor
    top1: Tensor


@dataclass(frozen=True)
class SoftmaxForm:
    """The options of the softmax losses that are no tensors."""

    include_positive: bool = True
    symmetric: bool = False
    normalize: bool = True
    label_smoothing: float = 0.0
    in_batch: bool = True
    sampling: NegativeSampling | None = None


def embed(x: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    """`x` in `dtype`, rows at unit length if asked; zero vectors stay zero and get no gradient."""
    x = x.to(dtype)
    if not normalize:
        return x
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    tiny = length <= TINY_NORM
    return torch.where(tiny, torch.zeros_like(x), x / torch.where(tiny, torch.ones_like(length), length))


def log_sum_exp(logits: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """log-sum-exp of each row's allowed entries with the exact maximum, and whether there are any.

    A row with none gives a finite number that the caller must replace, so that no NaN gradient arises.
    """
    if logits.shape[1] == 0:
        logits, allowed = logits.new_zeros(logits.shape[0], 1), allowed.new_zeros(allowed.shape[0], 1)
    some = allowed.any(1)
    masked = logits.masked_fill(~allowed, -math.inf).masked_fill(~some[:, None], 0.0)
    return torch.logsumexp(masked, 1), some


def negative_mass(
    positive: Tensor, logits: Tensor, allowed: Tensor, scale: Tensor | float, sampling: NegativeSampling | None
) -> tuple[Tensor, Tensor]:
    """The log of the negatives' total, reweighted and debiased, and whether a row has any."""
    mass, some = log_sum_exp(logits, allowed)
    if sampling is None or (sampling.hardness == 0 and sampling.tau_plus == 0):
        return mass, some
    log_count = allowed.sum(1).clamp_min(1).to(mass.dtype).log()
    if sampling.hardness:
        beta = sampling.hardness
        harder, _ = log_sum_exp((1 + beta) * logits, allowed)
        weights, _ = log_sum_exp(beta * logits, allowed)
        mass = harder - weights + log_count
    if sampling.tau_plus:
        tau = sampling.tau_plus
        shift = torch.maximum(mass, positive).detach()  # cancels in value and gradient
        left = (mass - shift).exp() - tau * (positive + log_count - shift).exp()
        exhausted = left <= 0  # False for NaN, which so goes on
        debiased = left.masked_fill(exhausted, 1.0).log() + shift - math.log1p(-tau)
        floor = log_count - scale
        mass = torch.where(exhausted, floor, torch.maximum(debiased, floor))
    return mass, some


def row_losses(
    positive: Tensor, logits: Tensor, allowed: Tensor, scale: Tensor | float, form: SoftmaxForm
) -> ContrastiveOutput:
    """Loss, log-sum-exp and top-1 of each row from its positive logit and its candidates' logits [M, C]."""
    mass, some = negative_mass(positive, logits, allowed, scale, form.sampling)
    if form.include_positive:
        loss = -F.logsigmoid(positive - mass)
        lse = torch.where(some, positive + loss, positive)
    else:
        loss = mass - positive
        lse = torch.where(some, mass, torch.full_like(mass, -math.inf))
    if form.label_smoothing:
        count = allowed.sum(1)
        apart = torch.where(allowed, positive[:, None] - logits, torch.zeros_like(logits)).sum(1)
        loss = loss + form.label_smoothing * apart / (count + 1)
    loss = torch.where(some, loss, torch.zeros_like(loss))
    best = F.pad(logits.detach().masked_fill(~allowed, -math.inf), (0, 1), value=-math.inf).amax(1)
    return ContrastiveOutput(loss, lse, positive.detach() > best)


def _without_margin(similar: Tensor, positive: Tensor, allowed: Tensor, form: SoftmaxForm) -> Tensor:
    if form.sampling is None or form.sampling.margin is None:
        return allowed
    return allowed & ~(similar.detach() > positive.detach()[:, None] + form.sampling.margin)


def _biased(logits: Tensor, bias: Tensor | float | None, columns: slice | Tensor) -> Tensor:
    if bias is None:
        return logits
    per_column = isinstance(bias, Tensor) and bias.ndim == 1
    return logits + (bias[columns] if per_column else bias)  # type: ignore[index]


def contrastive_reference(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    scale: Tensor | float,
    bias: Tensor | float | None,
    targets: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    form: SoftmaxForm,
) -> ContrastiveOutput:
    """Row losses [M] of the softmax forms; of a symmetric one the mean of the two directions."""
    dtype = result_dtype(query, key, negatives)
    q, k = embed(query, dtype, form.normalize), embed(key, dtype, form.normalize)
    rows, keys = q.shape[0], k.shape[0]
    if targets is None:
        targets = torch.arange(rows, device=q.device)
    column = torch.arange(keys, device=q.device)
    logits, allowed = [], []
    if form.in_batch:
        similar = q @ k.T
        near = similar.gather(1, targets[:, None]).squeeze(1)
        mask = column != targets[:, None]
        if query_ids is not None and key_ids is not None:
            mask = mask & (query_ids[:, None] != key_ids[:keys])
        logits.append(_biased(similar * scale, bias, slice(0, keys)))
        allowed.append(_without_margin(similar, near, mask, form))
    else:
        near = (q * k[targets]).sum(1)
    positive = _biased(near * scale, bias, targets)
    if negatives is not None:
        n = embed(negatives, dtype, form.normalize)
        extra = q @ n.T if n.ndim == 2 else torch.bmm(n, q[:, :, None]).squeeze(2)
        keep = torch.ones_like(extra, dtype=torch.bool)
        if query_ids is not None and key_ids is not None and key_ids.shape[0] > keys:
            keep = query_ids[:, None] != key_ids[keys:]
        logits.append(_biased(extra * scale, bias, slice(keys, None)))
        allowed.append(_without_margin(extra, near, keep, form))
    forth = row_losses(positive, torch.cat(logits, 1), torch.cat(allowed, 1), scale, form)
    if not form.symmetric:
        return forth
    allowed_back = _without_margin(similar.T, near, mask.T, form)
    back = row_losses(positive, logits[0].T, allowed_back, scale, form)
    pairs = zip(forth[1:], back[1:], strict=True)
    return ContrastiveOutput(0.5 * (forth.loss + back.loss), *(torch.stack(pair) for pair in pairs))


def nt_xent_reference(
    view_a: Tensor, view_b: Tensor, scale: Tensor | float, ids: Tensor | None, form: SoftmaxForm
) -> ContrastiveOutput:
    """Row losses [2M]: each view of each sample against all the other views of the batch."""
    dtype = result_dtype(view_a, view_b)
    z = embed(torch.cat((view_a.to(dtype), view_b.to(dtype))), dtype, form.normalize)
    similar = z @ z.T
    index = torch.arange(z.shape[0], device=z.device)
    partner = index.roll(view_a.shape[0])
    near = similar.gather(1, partner[:, None]).squeeze(1)
    allowed = (index != index[:, None]) & (index != partner[:, None])
    if ids is not None:
        both = torch.cat((ids, ids))
        allowed = allowed & (both != both[:, None])
    allowed = _without_margin(similar, near, allowed, form)
    return row_losses(near * scale, similar * scale, allowed, scale, form)


def supcon_reference(
    features: Tensor, labels: Tensor, scale: Tensor | float, include_positive: bool, normalize: bool
) -> ContrastiveOutput:
    """Row losses [M]: log-sum-exp over the other rows minus the mean logit of the row's positives."""
    z = embed(features, result_dtype(features), normalize)
    logits = (z @ z.T) * scale
    index = torch.arange(z.shape[0], device=z.device)
    other = index != index[:, None]
    positive = other & (labels == labels[:, None])
    mass, some = log_sum_exp(logits, other if include_positive else other & ~positive)
    count = positive.sum(1)
    lse = torch.where(some, mass, torch.full_like(mass, -math.inf))
    apart = torch.where(positive, mass[:, None] - logits, torch.zeros_like(logits)).sum(1)
    loss = apart / count.clamp_min(1)
    loss = torch.where(some & (count > 0), loss, torch.zeros_like(loss))
    flat = logits.detach()
    if flat.shape[1] == 0:
        return ContrastiveOutput(loss, lse, loss.detach() > 0)
    best = flat.masked_fill(~positive, -math.inf).amax(1)
    return ContrastiveOutput(loss, lse, best > flat.masked_fill(~other | positive, -math.inf).amax(1))
