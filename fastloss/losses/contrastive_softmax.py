"""The op of the softmax contrastive losses: rows paired with columns, in float32, logits never stored as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import Op
from .contrastive_reference import SoftmaxForm, contrastive_reference, embed


def _reference(query: Tensor, key: Tensor, symmetric: bool, workspace_mib: float) -> Tensor:
    form = SoftmaxForm(symmetric=symmetric, normalize=False)
    return contrastive_reference(query, key, None, 1.0, None, None, None, None, form).loss


def _contrastive_fwd(
    query: Tensor, key: Tensor, symmetric: bool, workspace_mib: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = query.shape[0]
    loss, positive, row_loss = (query.new_empty(rows) for _ in range(3))
    return loss, positive, row_loss, query.new_empty(rows if symmetric else 0)


def _contrastive_bwd(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    symmetric: bool,
    workspace_mib: float,
    positive: Tensor,
    row_loss: Tensor,
    column_loss: Tensor,
    needs_query: bool,
    needs_key: bool,
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape if needs_query else 0), key.new_empty(key.shape if needs_key else 0)


_contrastive = Op(
    "contrastive",
    fwd=_contrastive_fwd,
    bwd=_contrastive_bwd,
    reference=_reference,
    grads=("query", "key"),
    outputs=("loss", "positive", "row_loss", "column_loss"),
)


def softmax_rows(
    query: Tensor,
    key: Tensor,
    scale: Tensor | float,
    bias: Tensor | float | None,
    form: SoftmaxForm,
    dtype: torch.dtype,
    workspace_mib: float,
) -> Tensor:
    """Row losses [M] of the plain forms, those that :func:`is_plain` names.

    The scale goes into the queries and the normalisation stays outside, so that autograd has their exact gradients at
    O(M D); a bias of one element cancels, and so has gradient 0.
    """
    q = embed(query, dtype, form.normalize) * scale
    rows = _contrastive(q, embed(key, dtype, form.normalize), form.symmetric, float(workspace_mib))
    return rows + 0.0 * bias if isinstance(bias, Tensor) else rows


def is_plain(form: SoftmaxForm, bias: Tensor | float | None, *others: object) -> bool:
    """Whether the op has these options: in-batch negatives only, one positive per row, no `others`."""
    alike = SoftmaxForm(symmetric=form.symmetric, normalize=form.normalize)
    return form == alike and not (isinstance(bias, Tensor) and bias.ndim) and all(o is None for o in others)
