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

from typing import NamedTuple

import torch
from torch import Tensor

from ...core import Op, is_interpreting, reduce, result_dtype
from ..embeddings import embed
from ..options import SoftmaxOptions
from ..row_losses import row_losses, statistics
from ..save_plan import KEY, QUERY, SCALE, kept_exponentials, rows_kept, saves, triton_saves


class Inputs(NamedTuple):
    """Of the op; what each is stands above."""

    query: Tensor  # [M, D]
    key: Tensor  # [N, D]
    scale: Tensor | None  # one element
    share: Tensor | None  # [M]
    targets: Tensor | None  # [M]
    factor: float
    include_positive: bool
    symmetric: bool
    normalize: bool
    reduction: str
    needs: int
    workspace_mib: float


class Saved(NamedTuple):
    """Empty is what `saves` or `triton_saves` does not leave."""

    stats: Tensor  # p, n and the columns' n if symmetric [2 + symmetric, M]; Triton: [2 (1 + symmetric) + 1, M]
    lengths: Tensor  # c of queries and keys [M + N]; Triton: the row scales, and c of the keys
    stash: Tensor  # products [rows kept, N]; Triton: exponentials
    query_grad: Tensor  # [M, D], of out ("grads") or of each loss_i ("rows")
    key_grad: Tensor  # [N, D]
    scale_grad: Tensor  # [M], row by row


class Grads(NamedTuple):
    query: Tensor
    key: Tensor
    scale: Tensor


class Needs(NamedTuple):
    query: bool
    key: bool
    scale: bool


def softmax_loss_reference(x: Inputs) -> Tensor:
    """The loss in dense differentiable torch."""
    dtype = result_dtype(x.query, x.key)
    logits = embed(x.query, dtype, x.normalize) @ embed(x.key, dtype, x.normalize).T * x.factor
    if x.scale is not None:
        logits = logits * x.scale.reshape(())
    column = torch.arange(x.key.shape[0], device=x.query.device)
    target = column[: x.query.shape[0]] if x.targets is None else x.targets
    positive, form = logits.gather(1, target[:, None])[:, 0], SoftmaxOptions(x.include_positive)
    allowed = column != target[:, None]
    loss = row_losses(positive, statistics(logits, allowed, False, 0.0), x.factor, form).loss
    if x.symmetric:
        loss = (loss + row_losses(positive, statistics(logits.T, allowed.T, False, 0.0), x.factor, form).loss) / 2
    return reduce(loss if x.share is None else (loss * x.share).masked_fill(x.share == 0, 0.0), x.reduction)


def _softmax_loss_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    (rows, width), columns = x.query.shape, x.key.shape[0]
    single = x.query.new_empty(0, dtype=torch.float32)
    out = single.new_empty(rows if x.reduction == "none" else ())
    if x.query.is_cuda or is_interpreting():
        return out, _saved_by_triton(x)
    saved = saves(rows, columns, x.symmetric, x.reduction, x.needs, x.workspace_mib)
    made, again = saved in ("rows", "grads"), saved in ("stash", "again")
    kept = rows if saved == "stash" else rows_kept(columns, x.workspace_mib) if saved == "again" else 0
    return out, Saved(
        stats=single.new_empty(2 + x.symmetric if again else 0, rows),
        lengths=single.new_empty(rows + columns if again and x.normalize else 0),
        stash=single.new_empty(kept, columns),
        query_grad=single.new_empty(rows if made and x.needs & QUERY else 0, width),
        key_grad=single.new_empty(columns if made and x.needs & KEY else 0, width),
        scale_grad=single.new_empty(rows if made and x.needs & SCALE else 0),
    )


def _saved_by_triton(x: Inputs) -> Saved:
    (rows, width), columns = x.query.shape, x.key.shape[0]
    saved = triton_saves(x.symmetric, x.reduction, x.needs)
    again, grads = saved == "again", saved == "grads"
    single = x.query.new_empty(0, dtype=torch.float32)
    kind = "symmetric" * x.symmetric + "+stash" * again
    return Saved(
        stats=single.new_empty(2 * (1 + x.symmetric) + 1, rows if again else 0),
        lengths=single.new_empty(rows + columns * x.normalize if again else 0),
        stash=x.query.new_empty(kept_exponentials(x.query, x.key, None, kind, 0.0, x.workspace_mib)[0]),
        query_grad=single.new_empty(rows if grads and x.needs & QUERY else 0, width),
        key_grad=single.new_empty(columns if grads and x.needs & KEY else 0, width),
        scale_grad=single.new_empty(rows if grads and x.needs & SCALE else 0),
    )


def _softmax_loss_bwd(grad: Tensor, x: Inputs, saved: Saved, needs: Needs) -> Grads:
    return Grads(
        query=x.query.new_empty(x.query.shape if needs.query else 0),
        key=x.key.new_empty(x.key.shape if needs.key else 0),
        scale=grad.new_empty(0) if x.scale is None or not needs.scale else x.scale.new_empty(x.scale.shape),
    )


softmax_loss = Op(
    "softmax_loss",
    fwd=_softmax_loss_fwd,
    bwd=_softmax_loss_bwd,
    reference=softmax_loss_reference,
    grads=Grads._fields,
    outputs=("out", *Saved._fields),
    triton="contrastive.kernels.softmax_loss",
)
