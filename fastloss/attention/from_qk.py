"""Attention consistency straight from queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import Loss, check_reduction, full_precision, result_dtype
from ..core.checks import check_choice, check_flag, check_number, check_same_device, check_tensor
from ..core.entry import public_function
from .divergence import attention_reference, check_mask, reduce_rows

METRICS = ("kl", "sym_kl", "js")


def attention_qk_reference(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, mask: Tensor | None, metric: str, scales: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """The definition: build both [B,H,Q,K] maps of logits, then compare them."""
    dtype = result_dtype(q1, k1, q2, k2)
    with full_precision(q1):
        a = q1.to(dtype) @ k1.to(dtype).transpose(-1, -2) * scales[0]
        b = q2.to(dtype) @ k2.to(dtype).transpose(-1, -2) * scales[1]
    return attention_reference(a, b, mask, "logits", metric)


@public_function
def attention_consistency_from_qk(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    *,
    metric: str = "kl",
    scale: float | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    reduction: str = "mean",
) -> Tensor:
    r"""Attention consistency straight from queries and keys: no need to ask the model for its attention maps.

    The rows compared are :math:`p = \mathrm{softmax}(s\, q_1 k_1^T)` and :math:`q = \mathrm{softmax}(s\, q_2 k_2^T)`;
    otherwise :func:`attention_consistency_loss` on logits.

    Args:
        q1, q2: ``[B, H, Q, d]`` queries of the two views.
        k1, k2: ``[B, H, K, d]`` keys. d may differ between the views (student and teacher).
        metric: ``"kl"`` (the first view is the teacher), ``"sym_kl"`` or ``"js"``, see there.
        scale: factor of the logits, finite; None is 1 / sqrt(d), each view with its own d.
        mask: bool, broadcastable to ``[B, H, Q, K]``, True where the key takes part.
        causal: also drop the keys after the query: key j takes part in row i for j <= i.
        reduction: as there, ``"none"`` gives ``[B, H, Q]``.

    Returns:
        float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: as there.

    Source: as there; causal and mask as in ``torch.nn.functional.scaled_dot_product_attention``.

    Example:
        >>> q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
        >>> attention_consistency_from_qk(q, k, q, k, causal=True).item()
        0.0
    """
    for name, value in (("q1", q1), ("k1", k1), ("q2", q2), ("k2", k2)):
        check_tensor(name, value, 4)
        check_same_device("q1", q1, name, value)
        if value.shape[:2] != q1.shape[:2]:
            raise ValueError(f"{name}: expected the batch and heads of q1, {tuple(q1.shape)}, got {tuple(value.shape)}")
    for name_q, q, name_k, k in (("q1", q1, "k1", k1), ("q2", q2, "k2", k2)):
        if q.shape[-1] != k.shape[-1] or q.shape[-1] == 0:
            raise ValueError(
                f"{name_k}: expected the last dimension of {name_q}, {tuple(q.shape)}, >= 1, got {tuple(k.shape)}"
            )
    for name, value, name_1, first in (("q2", q2, "q1", q1), ("k2", k2, "k1", k1)):
        if value.shape[-2] != first.shape[-2]:
            raise ValueError(
                f"{name}: expected as many rows as {name_1}, {tuple(first.shape)}, got {tuple(value.shape)}"
            )
    if k1.shape[-2] == 0:
        raise ValueError(f"k1: expected at least one key, got shape {tuple(k1.shape)}")
    check_choice("metric", metric, METRICS)
    causal = check_flag("causal", causal)
    check_reduction(reduction)
    if scale is not None:
        scale = check_number("scale", scale)
    shape = torch.Size((*q1.shape[:3], k1.shape[2]))
    check_mask(mask, shape, q1)
    if causal:
        lower = torch.ones(shape[-2:], dtype=torch.bool, device=q1.device).tril()
        mask = lower if mask is None else mask & lower
    scales = (q1.shape[-1] ** -0.5, q2.shape[-1] ** -0.5) if scale is None else (scale, scale)
    values, rows = attention_qk_reference(q1, k1, q2, k2, mask, metric, scales)
    return reduce_rows(values, rows, reduction)


class AttentionConsistencyFromQK(Loss):
    """Module form of :func:`attention_consistency_from_qk`."""

    fn = staticmethod(attention_consistency_from_qk)
