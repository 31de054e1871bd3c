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

import torch
from torch import Tensor

from ...core import Op, is_interpreting, result_dtype
from ..row_losses import statistics
from ..save_plan import _keeps_logits, kept_exponentials


def contrastive_stats_reference(
    query: Tensor,
    key: Tensor,
    row_scale: Tensor,
    column_scale: Tensor | None,
    bias: Tensor | None,
    excluded: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    ceiling: Tensor | None,
    kind: str,
    hardness: float,
    workspace_mib: float,
    keep: bool,
) -> Tensor:
    """The statistics [directions, S, M] in dense differentiable torch."""
    dtype = result_dtype(query, key)
    similar = row_scale[:, None] * (query.to(dtype) @ key.to(dtype).T)
    if column_scale is not None:
        similar = similar * column_scale
    logits = similar if bias is None else similar + bias
    row, column = (torch.arange(n, device=query.device) for n in similar.shape)
    allowed = torch.ones_like(similar, dtype=torch.bool)
    if "upper" in kind:
        allowed = column > row[:, None]
    if "diagonal" in kind:
        allowed = column != row[:, None]
    if excluded is not None:
        allowed = allowed & (column != excluded[:, None])
    if row_ids is not None and column_ids is not None:
        allowed = allowed & (column_ids != row_ids[:, None])
    if "upper" in kind:
        allowed, similar, logits = allowed | allowed.T, *(x.triu(1) + x.triu(1).T for x in (similar, logits))
    forth = back = allowed
    if ceiling is not None:
        forth = allowed & ~(similar.detach() > ceiling[:, None])
        back = allowed & ~(similar.detach() > ceiling) if "symmetric" in kind else allowed
    sides = [statistics(logits, forth, "moments" in kind, hardness)]
    if "symmetric" in kind:
        sides.append(statistics(logits.T, back.T, "moments" in kind, hardness))
    return torch.stack(sides)


def _contrastive_fwd(
    query: Tensor,
    key: Tensor,
    row_scale: Tensor,
    column_scale: Tensor | None,
    bias: Tensor | None,
    excluded: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    ceiling: Tensor | None,
    kind: str,
    hardness: float,
    workspace_mib: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = query.shape[0], key.shape[0]
    moments, hard = int("moments" in kind), int(hardness != 0)
    if query.is_cuda or is_interpreting():
        stash = query.new_empty(kept_exponentials(query, key, ceiling, kind, hardness, workspace_mib)[0])
    else:
        logits = not keep and _keeps_logits(query, key, workspace_mib)
        stash = row_scale.new_empty((rows, columns) if logits else 0)
    return (
        row_scale.new_empty((2 if "symmetric" in kind else 1, 2 + 2 * moments + 2 * hard, rows)),
        stash,
        row_scale.new_empty(1 + moments + 2 * hard if keep else 0, rows, query.shape[1]),
    )


def _contrastive_bwd(  # as many parameters as the forward, the results and the flags are
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    row_scale: Tensor,
    column_scale: Tensor | None,
    bias: Tensor | None,
    excluded: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    ceiling: Tensor | None,
    kind: str,
    hardness: float,
    workspace_mib: float,
    keep: bool,
    stats: Tensor,
    stash: Tensor,
    pulls: Tensor,
    needs_query: bool,
    needs_key: bool,
    needs_row_scale: bool,
    needs_column_scale: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, columns = query.shape[0], key.shape[0]
    return (
        query.new_empty(query.shape if needs_query else 0),
        key.new_empty(key.shape if needs_key else 0),
        row_scale.new_empty(rows if needs_row_scale else 0),
        row_scale.new_empty(columns if needs_column_scale else 0),
        row_scale.new_empty(columns if needs_bias else 0),
    )


contrastive = Op(
    "contrastive",
    fwd=_contrastive_fwd,
    bwd=_contrastive_bwd,
    reference=contrastive_stats_reference,
    grads=("query", "key", "row_scale", "column_scale", "bias"),
    outputs=("stats", "stash", "pulls"),
    triton="contrastive.kernels.softmax_stats",
)


def softmax_statistics(
    query: Tensor,
    key: Tensor,
    row_scale: Tensor,
    column_scale: Tensor | None,
    bias: Tensor | None,
    excluded: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    ceiling: Tensor | None,
    kind: str,
    hardness: float,
    workspace_mib: float,
) -> Tensor:
    """The op, which keeps its pulls where only the rows need a gradient."""
    given = query, row_scale, key, column_scale, bias
    needed = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in given]
    frozen = any(needed[:2]) and not any(needed[2:])
    keep = frozen and "symmetric" not in kind and "upper" not in kind
    if query.is_cuda or is_interpreting():  # these kernels know the first pull only, and one way to leave out columns
        keep &= "moments" not in kind and hardness == 0 and (excluded is None or "diagonal" not in kind)
    else:
        keep &= contrastive.kernels["cpp"]
    if any(needed) and not keep:
        kind += "+stash"
    return contrastive(
        query, key, row_scale, column_scale, bias, excluded, row_ids, column_ids, ceiling, kind, hardness,
        workspace_mib, keep,
    )  # fmt: skip
