"""The op of the plain softmax losses: one call from embeddings to loss, CLIP's above all.

    s_ij   = scale factor c(query_i) c(key_j) <query_i, key_j>    c(x) = 1 / |x| with `normalize`, else 1; no `scale`: 1
    p_i    = s_i,target_i, without `targets` the diagonal         n_i = log sum_{j != target_i} e^s_ij
    loss_i = softplus(n_i - p_i), without `include_positive` n_i - p_i; with `symmetric` the mean with column i's
    out    = share_i loss_i [M], their sum or their mean by `reduction`; 0 where share_i is 0, be the loss NaN

query [M, D] and key [N, D] are float32, bfloat16 or float16 of any strides, scale (one element) and share [M] float32,
targets [M] int64. `needs`: what will be differentiated, bit 0 the queries, bit 1 the keys, bit 2 the scale.
What the forward leaves for the backward, nothing, "rows", "grads", "stash" or "again": see `saves` and `triton_saves`
in save_plan.py. The derivation, and what each costs: docs/design/contrastive.md
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import Op, is_interpreting, reduce, result_dtype
from ..embeddings import embed
from ..options import SoftmaxForm
from ..row_losses import row_losses, statistics
from ..save_plan import KEY, QUERY, SCALE, kept_exponentials, rows_kept, saves, triton_saves


def contrastive_plain_reference(
    query: Tensor,
    key: Tensor,
    scale: Tensor | None,
    share: Tensor | None,
    targets: Tensor | None,
    factor: float,
    include_positive: bool,
    symmetric: bool,
    normalize: bool,
    reduction: str,
    needs: int,
    workspace_mib: float,
) -> Tensor:
    """The loss in dense differentiable torch."""
    dtype = result_dtype(query, key)
    logits = embed(query, dtype, normalize) @ embed(key, dtype, normalize).T * factor
    if scale is not None:
        logits = logits * scale.reshape(())
    column = torch.arange(key.shape[0], device=query.device)
    target = column[: query.shape[0]] if targets is None else targets
    positive, form = logits.gather(1, target[:, None])[:, 0], SoftmaxForm(include_positive)
    allowed = column != target[:, None]
    loss = row_losses(positive, statistics(logits, allowed, False, 0.0), factor, form).loss
    if symmetric:
        loss = (loss + row_losses(positive, statistics(logits.T, allowed.T, False, 0.0), factor, form).loss) / 2
    return reduce(loss if share is None else (loss * share).masked_fill(share == 0, 0.0), reduction)


def _contrastive_plain_fwd(
    query: Tensor,
    key: Tensor,
    scale: Tensor | None,
    share: Tensor | None,
    targets: Tensor | None,
    factor: float,
    include_positive: bool,
    symmetric: bool,
    normalize: bool,
    reduction: str,
    needs: int,
    workspace_mib: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The C++ forward's results: out; p, n and the columns' n if symmetric [2 + symmetric, M]; c of queries and keys
    [M + N]; products [rows kept, N]; the gradients of query, of key and, row by row, of scale, those of out ("grads")
    or of each loss_i ("rows"). Empty is what `saves` does not leave."""
    (rows, width), columns = query.shape, key.shape[0]
    if query.is_cuda or is_interpreting():
        return _made_by_triton(query, key, symmetric, normalize, reduction, needs, workspace_mib)
    saved = saves(rows, columns, symmetric, reduction, needs, workspace_mib)
    made, again = saved in ("rows", "grads"), saved in ("stash", "again")
    kept = rows if saved == "stash" else rows_kept(columns, workspace_mib) if saved == "again" else 0
    single = query.new_empty(0, dtype=torch.float32)
    return (
        single.new_empty(rows if reduction == "none" else ()),
        single.new_empty(2 + symmetric if again else 0, rows),
        single.new_empty(rows + columns if again and normalize else 0),
        single.new_empty(kept, columns),
        single.new_empty(rows if made and needs & QUERY else 0, width),
        single.new_empty(columns if made and needs & KEY else 0, width),
        single.new_empty(rows if made and needs & SCALE else 0),
    )


def _made_by_triton(
    query: Tensor, key: Tensor, symmetric: bool, normalize: bool, reduction: str, needs: int, workspace_mib: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (rows, width), columns = query.shape, key.shape[0]
    saved = triton_saves(symmetric, reduction, needs)
    again, grads = saved == "again", saved == "grads"
    single = query.new_empty(0, dtype=torch.float32)
    kind = "symmetric" * symmetric + "+stash" * again
    return (
        single.new_empty(rows if reduction == "none" else ()),
        single.new_empty(2 * (1 + symmetric) + 1, rows if again else 0),
        single.new_empty(rows + columns * normalize if again else 0),
        query.new_empty(kept_exponentials(query, key, None, kind, 0.0, workspace_mib)[0]),
        single.new_empty(rows if grads and needs & QUERY else 0, width),
        single.new_empty(columns if grads and needs & KEY else 0, width),
        single.new_empty(rows if grads and needs & SCALE else 0),
    )


def _contrastive_plain_bwd(  # as many parameters as the forward, the results and the flags are
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    scale: Tensor | None,
    share: Tensor | None,
    targets: Tensor | None,
    factor: float,
    include_positive: bool,
    symmetric: bool,
    normalize: bool,
    reduction: str,
    needs: int,
    workspace_mib: float,
    stats: Tensor,
    lengths: Tensor,
    stash: Tensor,
    query_grad: Tensor,
    key_grad: Tensor,
    scale_grad: Tensor,
    needs_query: bool,
    needs_key: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape if needs_query else 0),
        key.new_empty(key.shape if needs_key else 0),
        grad.new_empty(0) if scale is None or not needs_scale else scale.new_empty(scale.shape),
    )


contrastive_plain = Op(
    "contrastive_plain",
    fwd=_contrastive_plain_fwd,
    bwd=_contrastive_plain_bwd,
    reference=contrastive_plain_reference,
    grads=("query", "key", "scale"),
    outputs=("out", "stats", "lengths", "stash", "query_grad", "key_grad", "scale_grad"),
    triton="contrastive.kernels.softmax_loss",
)
