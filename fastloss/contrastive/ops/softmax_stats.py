"""The op of the softmax contrastive losses: statistics of each row's negative logits, which are never stored whole.

Every form of the loss is assembled from them in O(M) and O(M D) differentiable torch (query_key_losses.py); what
needs all M x N logits, the statistics and their gradients, is here.

    logit  s_ij = row_scale_i column_scale_j <query_i, key_j> + bias_j           (no column_scale: 1, no bias: 0)
    A_i    the negatives of row i: all j but
             j == i             if `kind` has "diagonal"
             j == excluded_i    if `excluded` is given (an index that no column has leaves out nothing)
             column_ids_j == row_ids_i                    if both are given
             s_ij - bias_j > ceiling_i                    if `ceiling` is given (NaN stays in)

    stats [directions, S, M] in float32, of each row:
      0  lse_A(s)        -inf where A is empty, then without gradient
      1  max_A(s)        -inf where A is empty; no gradient
      "moments" in kind:   2  sum_A(s), 0 where A is empty     3  |A|, no gradient
      hardness beta > 0:  -2  lse_A((1 + beta) (s - max_A))   -1  lse_A(beta (s - max_A))    (the last two rows)
                               max_A without gradient: their difference, all that is used of them, has none by it, and
                               so keeps the digits that beta s is too large for

`kind` is "", or words joined by "+": "diagonal", "moments", "symmetric", "upper", "bfloat16", "stash" (below). With
"symmetric", M = N and there are two directions: the second has the statistics of column j over the rows i of the
transposed mask, {i: j in A_i}, except that a ceiling is then the column's own, s_ij - bias_j > ceiling_j.
With "upper", M = N and the matrix of logits is symmetric: only the pairs i < j are made, and each counts in both rows,
as if s_ji were s_ij and the mask symmetric too; one direction, no bias, and a ceiling is each row's own. Half the work.
With "bfloat16", query and key hold widened bfloat16: where the CPU multiplies pairs of bfloat16 with float32 sums,
products are made so, and what multiplies query and key in the gradients, G and its scales, is rounded to bfloat16.

Gradients, with g_t the upstream of statistic t and G_ij = d loss / d s_ij for j in A_i, else 0,

    G_ij = g_0 e^(s_ij - lse_i) + g_2 + h_ij + beta (h_ij + g_-1 e^(beta d_ij - lse''_i))
           + the same of the column's direction, which with "upper" are the statistics of row j
    d_ij = s_ij - max_i        h_ij = g_-2 e^((1 + beta) d_ij - lse'_i), of which beta times are to cancel exactly
    t_i = sum_j G_ij column_scale_j key_j      d query_i = row_scale_i t_i    d row_scale_i = <query_i, t_i>
    u_j = sum_i G_ij row_scale_i query_i       d key_j = column_scale_j u_j   d column_scale_j = <key_j, u_j>
    d bias_j = sum_i G_ij

So cosine similarity needs no normalised copy: row_scale = scale / |query|, column_scale = 1 / |key|, 0 for zero
vectors.
query and key are float32, bfloat16 or float16 of any strides, the other float arguments float32, integers int64.
`workspace_mib` bounds what the op holds beyond its results. What is kept for the backward: with `keep`, which serves
one direction whose columns (keys, their scales and biases) need no gradient, `pulls` [S - 2 or S - 3, M, D]: for each
statistic with a gradient (the log-sum-exp, then with hardness those of (1 + beta) s and beta s, last the sum), its part
of t divided by its upstream gradient and its factor: the backward multiplies no matrices, 2 U in all. Without `keep`,
`stash`: of the C++ kernels the logits, where they are few; of the Triton kernels, with "stash" in `kind`, what
`kept_exponentials` says: 3 U, else 4 U.
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
