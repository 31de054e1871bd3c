"""The op of the plain softmax losses: one call from embeddings to loss, CLIP's above all.

    s_ij   = scale fixed_scale c(query_i) c(key_j) <query_i, key_j>   c(x) = 1 / |x| with `normalize`, else 1
    p_i    = s_i,target_i, without `targets` the diagonal         n_i = log sum_{j != target_i} e^s_ij
    loss_i = softplus(n_i - p_i), without `include_positive` n_i - p_i; with `symmetric` the mean with column i's
    out    = row_weight_i loss_i [M], their sum or their mean by `reduction`; 0 where row_weight_i is 0, be the loss NaN

query [M, D] and key [N, D] are float32, bfloat16 or float16 of any strides, scale (one element, None: 1) and row_weight
[M] float32, targets [M] int64. `needs` says what will be differentiated, in bits: QUERY, KEY, SCALE. What the forward
leaves for the backward (`save`, `saved_rows`): save_plan.py. The derivation, and what each costs:
docs/design/contrastive.md
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core import Op, reduce, result_dtype
from ..embeddings import embed
from ..options import SoftmaxOptions
from ..row_losses import row_losses, statistics
from ..save_plan import KEY, QUERY, SCALE, aligned, exponentials


class Inputs(NamedTuple):
    """Of the op; what each is stands above."""

    query: Tensor  # [M, D]
    key: Tensor  # [N, D]
    scale: Tensor | None  # one element
    row_weight: Tensor | None  # [M]
    targets: Tensor | None  # [M]
    fixed_scale: float
    include_positive: bool
    symmetric: bool
    normalize: bool
    reduction: str
    needs: int
    save: str
    saved_rows: int  # of how many rows the logits are saved
    workspace_mib: float


class Saved(NamedTuple):
    """Fields that `save` does not ask for are empty tensors."""

    # "logits": p, n and, if symmetric, the columns' n [2 + symmetric, M]; "exps": [2 (1 + symmetric) + 1, M]
    stats: Tensor
    # "logits": c of queries and keys [M + N]; "exps": the row scales; normalized, from aligned(M) on c of keys
    inverse_norms: Tensor
    logits: Tensor  # "logits": products <query_i, key_j> [saved_rows, N]; "exps": exponentials, see save_plan.py
    query_grad: Tensor  # [M, D], of out ("grads") or of each loss_i ("row_grads")
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
    logits = embed(x.query, dtype, x.normalize) @ embed(x.key, dtype, x.normalize).T * x.fixed_scale
    if x.scale is not None:
        logits = logits * x.scale.reshape(())
    column = torch.arange(x.key.shape[0], device=x.query.device)
    target = column[: x.query.shape[0]] if x.targets is None else x.targets
    positive, form = logits.gather(1, target[:, None])[:, 0], SoftmaxOptions(x.include_positive)
    allowed = column != target[:, None]
    loss = row_losses(positive, statistics(logits, allowed, False, 0.0), x.fixed_scale, form).loss
    if x.symmetric:
        of_columns = statistics(logits.T, allowed.T, False, 0.0)
        loss = (loss + row_losses(positive, of_columns, x.fixed_scale, form).loss) / 2
    if x.row_weight is not None:
        loss = (loss * x.row_weight).masked_fill(x.row_weight == 0, 0.0)
    return reduce(loss, x.reduction)


def _softmax_loss_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    (rows, dim), columns = x.query.shape, x.key.shape[0]
    like = x.query.new_empty(0, dtype=torch.float32)
    grads, logits, exps = x.save in ("row_grads", "grads"), x.save == "logits", x.save == "exps"
    if exps:
        elements = exponentials(x.saved_rows, columns, x.query.element_size()).elements
        stats, norms = 2 * (1 + x.symmetric) + 1, aligned(rows) + columns if x.normalize else rows
    else:
        elements, stats = 0, 2 + x.symmetric if logits else 0
        norms = rows + columns if logits and x.normalize else 0
    return like.new_empty(rows if x.reduction == "none" else ()), Saved(
        stats=like.new_empty(stats, rows),
        inverse_norms=like.new_empty(norms),
        logits=x.query.new_empty(elements) if exps else like.new_empty(x.saved_rows, columns),
        query_grad=like.new_empty(rows if grads and x.needs & QUERY else 0, dim),
        key_grad=like.new_empty(columns if grads and x.needs & KEY else 0, dim),
        scale_grad=like.new_empty(rows if grads and x.needs & SCALE else 0),
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
