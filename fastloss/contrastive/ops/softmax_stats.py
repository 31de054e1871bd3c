"""The op of the softmax contrastive losses: statistics of each row's negative logits, which are never stored whole.

    s_ij = row_scale_i column_scale_j <query_i, key_j> + bias_j     query [M, D], key [N, D]; the rest [M] or [N]
    A_i, the negatives of row i: all j but, with `diagonal`, j == i and, where given, j == targets_i,
         column_ids_j == row_ids_i, s_ij - bias_j > logit_limit_i and the pairs (i, j) that are listed; or with
         `are_negatives` those that are not (pair_spans and pair_words, see pairs.py)
    stats [directions, S, M] in float32: lse_A(s), max_A(s), -inf where A is empty; `moments`: sum_A(s), |A|;
         hardness beta > 0: lse_A((1 + beta) (s - max_A)), lse_A(beta (s - max_A))

What the forward leaves for the backward (`save`): see :func:`save_plan.save_of_stats`. The derivation:
docs/design/contrastive.md
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core import Op, result_dtype
from ..options import Form
from ..pairs import PairWords, is_listed
from ..row_losses import slopes, statistics
from ..save_plan import exponentials, save_of_stats


class Inputs(NamedTuple):
    """Of the op; what each is stands above."""

    query: Tensor  # [M, D]
    key: Tensor  # [N, D]
    row_scale: Tensor  # [M]
    column_scale: Tensor | None  # [N]
    bias: Tensor | None  # [N]
    targets: Tensor | None  # [M]
    row_ids: Tensor | None  # [M]
    column_ids: Tensor | None  # [N]
    logit_limit: Tensor | None  # [M]
    diagonal: bool
    symmetric: bool  # the columns' statistics too: a second direction
    self_similarity: bool  # query and key are the same rows: no row is its own negative, one direction
    moments: bool
    bfloat16: bool  # products may be made in it
    are_negatives: bool  # the listed pairs; else all others
    hardness: float
    workspace_mib: float
    save: str = ""
    pair_spans: Tensor | None = None  # [M, 2]; not beside `self_similarity`, which has half of the pairs
    pair_words: Tensor | None = None  # [P, 2]

    @property
    def form(self) -> Form:
        flags = self.diagonal, self.symmetric, self.self_similarity, self.moments, self.bfloat16, self.are_negatives
        return Form(*flags)

    def with_pairs(self, pairs: PairWords) -> Inputs:
        return self._replace(pair_spans=pairs.spans, pair_words=pairs.words, are_negatives=pairs.are_negatives)


class Saved(NamedTuple):
    """All that the forward returns: the backward needs the statistics themselves too."""

    stats: Tensor  # [directions, S, M]
    logits: Tensor  # "logits": [M, N]; "exps": their exponentials, see save_plan.py; else empty
    weighted_keys: Tensor  # "weighted_keys": [1 + moments + 2 (hardness > 0), M, D], else empty


class Grads(NamedTuple):
    query: Tensor
    key: Tensor
    row_scale: Tensor
    column_scale: Tensor
    bias: Tensor


class Needs(NamedTuple):
    query: bool
    key: bool
    row_scale: bool
    column_scale: bool
    bias: bool


def logits_of(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The logits [M, N] in dense differentiable torch, and which of them count for rows and for columns."""
    dtype = result_dtype(x.query, x.key)
    similar = x.row_scale[:, None] * (x.query.to(dtype) @ x.key.to(dtype).T)
    if x.column_scale is not None:
        similar = similar * x.column_scale
    logits = similar if x.bias is None else similar + x.bias
    row, column = (torch.arange(n, device=x.query.device) for n in similar.shape)
    allowed = torch.ones_like(similar, dtype=torch.bool)
    if x.self_similarity:
        allowed = column > row[:, None]
    if x.diagonal:
        allowed = column != row[:, None]
    if x.targets is not None:
        allowed = allowed & (column != x.targets[:, None])
    if x.row_ids is not None and x.column_ids is not None:
        allowed = allowed & (x.column_ids != x.row_ids[:, None])
    if x.pair_spans is not None and x.pair_words is not None:
        allowed = allowed & (is_listed(x.pair_spans, x.pair_words, x.key.shape[0]) == x.are_negatives)
    if x.self_similarity:
        allowed, similar, logits = allowed | allowed.T, *(t.triu(1) + t.triu(1).T for t in (similar, logits))
    of_rows = of_columns = allowed
    if x.logit_limit is not None:
        of_rows = allowed & ~(similar.detach() > x.logit_limit[:, None])
        of_columns = allowed & ~(similar.detach() > x.logit_limit) if x.symmetric else allowed
    return logits, of_rows, of_columns


def softmax_stats_reference(x: Inputs) -> Tensor:
    """The statistics [directions, S, M] in dense differentiable torch."""
    logits, of_rows, of_columns = logits_of(x)
    sides = [statistics(logits, of_rows, x.moments, x.hardness)]
    if x.symmetric:
        sides.append(statistics(logits.T, of_columns.T, x.moments, x.hardness))
    return torch.stack(sides)


def _softmax_stats_fwd(x: Inputs) -> Saved:
    (rows, dim), columns = x.query.shape, x.key.shape[0]
    sums = 1 + x.moments + 2 * (x.hardness != 0)
    if x.save == "exps":
        logits = x.query.new_empty(exponentials(rows, columns, x.query.element_size()).elements)
    else:
        logits = x.row_scale.new_empty((rows, columns) if x.save == "logits" else 0)
    return Saved(
        stats=x.row_scale.new_empty(1 + x.symmetric, 1 + x.moments + sums, rows),
        logits=logits,
        weighted_keys=x.row_scale.new_empty(sums if x.save == "weighted_keys" else 0, rows, dim),
    )


def _softmax_stats_bwd(grad: Tensor, x: Inputs, saved: Saved, needs: Needs) -> Grads:
    rows, columns = x.query.shape[0], x.key.shape[0]
    return Grads(
        query=x.query.new_empty(x.query.shape if needs.query else 0),
        key=x.key.new_empty(x.key.shape if needs.key else 0),
        row_scale=x.row_scale.new_empty(rows if needs.row_scale else 0),
        column_scale=x.row_scale.new_empty(columns if needs.column_scale else 0),
        bias=x.row_scale.new_empty(columns if needs.bias else 0),
    )


softmax_stats = Op(
    "softmax_stats",
    fwd=_softmax_stats_fwd,
    bwd=_softmax_stats_bwd,
    reference=softmax_stats_reference,
    grads=Grads._fields,
    outputs=Saved._fields,
    triton="contrastive.kernels.softmax_stats",
)


def softmax_statistics(x: Inputs) -> Tensor:
    """The op, with what this call's backward needs saved."""
    backend = softmax_stats.backend(*x)
    of_rows, of_columns = (x.query, x.row_scale), (x.key, x.column_scale, x.bias)
    enabled = torch.is_grad_enabled()
    needs_rows, needs_columns = (
        enabled and any(t is not None and t.requires_grad for t in side) for side in (of_rows, of_columns)
    )
    if backend != "reference" and (needs_rows or needs_columns):
        save = save_of_stats(
            backend, x.query, x.key, x.form, x.targets, x.logit_limit, x.hardness, x.workspace_mib, needs_columns
        )
        x = x._replace(save=save)
    return softmax_stats(*x, backend=backend)


def gradients_of_statistics(x: Inputs, stats: Tensor, grad: Tensor, needs: Needs) -> Grads:
    """The gradients of x where its negatives are a part of those that `stats` [directions, S, M] are of.

    Each logit is made once. So a matrix of logits may be made in blocks: its statistics merged forward, and given to
    every block backward. `grad` is the gradient of `stats`.
    """
    empty = x.row_scale.new_empty(0)
    if softmax_stats.backend(*x) != "reference":
        flags = {f"needs_{name}": flag for name, flag in needs._asdict().items()}
        saved = Saved(stats, empty, empty)
        return Grads(*softmax_stats.gradients(x._replace(save="")._asdict() | saved._asdict() | flags, grad))
    leaves = {name: getattr(x, name).detach().requires_grad_() for name, flag in needs._asdict().items() if flag}
    with torch.enable_grad():
        logits, of_rows, of_columns = logits_of(x._replace(**leaves))
    known = logits.detach()
    upstream = slopes(known, of_rows, stats[0], grad[0], x.moments, x.hardness)
    if x.symmetric:
        upstream = upstream + slopes(known.T, of_columns.T, stats[1], grad[1], x.moments, x.hardness).T
    found = torch.autograd.grad(logits, list(leaves.values()), upstream.to(logits.dtype))
    return Grads(**(dict.fromkeys(Grads._fields, empty) | dict(zip(leaves, found, strict=True))))
