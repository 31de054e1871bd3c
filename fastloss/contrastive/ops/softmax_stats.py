"""The op of the softmax contrastive losses: statistics of each row's negative logits, which are never stored whole.

    s_ij = row_scale_i column_scale_j <query_i, key_j> + bias_j     query [M, D], key [N, D]; the rest [M] or [N]
    A_i, the negatives of row i: all j but j == i ("diagonal" in `kind`) and, where given, j == excluded_i,
         column_ids_j == row_ids_i and s_ij - bias_j > ceiling_i
    stats [directions, S, M] in float32: lse_A(s), max_A(s), -inf where A is empty; "moments": sum_A(s), |A|;
         hardness beta > 0: lse_A((1 + beta) (s - max_A)), lse_A(beta (s - max_A))

`kind`: words joined by "+": "diagonal", "moments", "symmetric", "upper", "bfloat16", "stash". Kept for the backward, in
`workspace_mib`: `pulls` [.., M, D] with `keep`, else `stash`.
The derivation: docs/design/contrastive.md
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core import Op, is_interpreting, result_dtype
from ..row_losses import statistics
from ..save_plan import _keeps_logits, kept_exponentials


class Inputs(NamedTuple):
    """Of the op; what each is stands above."""

    query: Tensor  # [M, D]
    key: Tensor  # [N, D]
    row_scale: Tensor  # [M]
    column_scale: Tensor | None  # [N]
    bias: Tensor | None  # [N]
    excluded: Tensor | None  # [M]
    row_ids: Tensor | None  # [M]
    column_ids: Tensor | None  # [N]
    ceiling: Tensor | None  # [M]
    kind: str
    hardness: float
    workspace_mib: float
    keep: bool = False


class Saved(NamedTuple):
    """All that the forward returns: the backward needs the statistics themselves too."""

    stats: Tensor  # [directions, S, M]
    stash: Tensor  # logits [M, N], Triton: exponentials; or empty
    pulls: Tensor  # [1 + moments + 2 hard, M, D] with `keep`, else empty


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


def softmax_stats_reference(x: Inputs) -> Tensor:
    """The statistics [directions, S, M] in dense differentiable torch."""
    dtype = result_dtype(x.query, x.key)
    similar = x.row_scale[:, None] * (x.query.to(dtype) @ x.key.to(dtype).T)
    if x.column_scale is not None:
        similar = similar * x.column_scale
    logits = similar if x.bias is None else similar + x.bias
    row, column = (torch.arange(n, device=x.query.device) for n in similar.shape)
    allowed = torch.ones_like(similar, dtype=torch.bool)
    if "upper" in x.kind:
        allowed = column > row[:, None]
    if "diagonal" in x.kind:
        allowed = column != row[:, None]
    if x.excluded is not None:
        allowed = allowed & (column != x.excluded[:, None])
    if x.row_ids is not None and x.column_ids is not None:
        allowed = allowed & (x.column_ids != x.row_ids[:, None])
    if "upper" in x.kind:
        allowed, similar, logits = allowed | allowed.T, *(t.triu(1) + t.triu(1).T for t in (similar, logits))
    forth = back = allowed
    if x.ceiling is not None:
        forth = allowed & ~(similar.detach() > x.ceiling[:, None])
        back = allowed & ~(similar.detach() > x.ceiling) if "symmetric" in x.kind else allowed
    sides = [statistics(logits, forth, "moments" in x.kind, x.hardness)]
    if "symmetric" in x.kind:
        sides.append(statistics(logits.T, back.T, "moments" in x.kind, x.hardness))
    return torch.stack(sides)


def _softmax_stats_fwd(x: Inputs) -> Saved:
    rows, columns = x.query.shape[0], x.key.shape[0]
    moments, hard = int("moments" in x.kind), int(x.hardness != 0)
    if x.query.is_cuda or is_interpreting():
        size = kept_exponentials(x.query, x.key, x.ceiling, x.kind, x.hardness, x.workspace_mib)[0]
        stash = x.query.new_empty(size)
    else:
        logits = not x.keep and _keeps_logits(x.query, x.key, x.workspace_mib)
        stash = x.row_scale.new_empty((rows, columns) if logits else 0)
    return Saved(
        stats=x.row_scale.new_empty((2 if "symmetric" in x.kind else 1, 2 + 2 * moments + 2 * hard, rows)),
        stash=stash,
        pulls=x.row_scale.new_empty(1 + moments + 2 * hard if x.keep else 0, rows, x.query.shape[1]),
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
    """The op, which keeps its pulls where only the rows need a gradient."""
    given = x.query, x.row_scale, x.key, x.column_scale, x.bias
    needed = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in given]
    frozen = any(needed[:2]) and not any(needed[2:])
    keep = frozen and "symmetric" not in x.kind and "upper" not in x.kind
    if x.query.is_cuda or is_interpreting():  # these kernels know the first pull only, and one way to leave out columns
        keep &= "moments" not in x.kind and x.hardness == 0 and (x.excluded is None or "diagonal" not in x.kind)
    else:
        keep &= softmax_stats.kernels["cpp"]
    if any(needed):
        x = x._replace(keep=True) if keep else x._replace(kind=x.kind + "+stash")
    return softmax_stats(*x)
