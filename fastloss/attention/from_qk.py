"""Attention consistency straight from queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import Loss, check_not_empty, check_reduction
from ..core.checks import check_choice, check_dense, check_flag, check_number, check_same_device, check_tensor
from ..core.entry import public_function
from .attention_qk import Inputs, attention_qk
from .divergence import check_mask

METRICS = ("kl", "sym_kl", "js")
VIEWS = ("a", "b")


@public_function
def attention_consistency_from_qk(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    *,
    metric: str = "kl",
    scale: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    causal: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    stop_gradient: str | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Attention consistency straight from queries and keys: no need to ask the model for its attention maps.

    The rows compared are :math:`p = \mathrm{softmax}(s\, q_1 k_1^T)` and :math:`q = \mathrm{softmax}(s\, q_2 k_2^T)`;
    otherwise :func:`attention_consistency_loss` on logits. On a CPU the kernels make both maps a few rows at a time,
    forward and backward, and never hold one whole: memory grows with Q + K, not with Q times K. PyTorch's operators,
    which compute other devices, float64 and double backward, do hold them.

    Args:
        q1, q2: ``[B, H, Q, d]`` queries of the two views, or packed ``[T_q, H, d]`` with `cu_seqlens_q`.
        k1, k2: ``[B, G, K, d]`` keys, or packed ``[T_k, G, d]``. G divides H: with fewer heads of keys than of queries
            (grouped-query attention) query head h has the keys of head ``h // (H // G)``. d and G may differ between
            the views (student and teacher).
        metric: ``"kl"`` (the first view is the teacher), ``"sym_kl"`` or ``"js"``, see there.
        scale: factor of the logits, finite; None is 1 / sqrt(d), each view with its own d.
        temperature: the logits are divided by it, > 0.
        mask: bool, broadcastable to ``[B, H, Q, K]``, True where the key takes part: of padding ``[B, 1, 1, K]``.
        causal: also drop the keys after the query: key j takes part in row i for j <= i, both counted from the start
            of their sequence.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 ``[sequences + 1]``, where each sequence starts in the packed rows,
            and their number last, as flash-attn's varlen functions have them, the same for both views. A query has
            the keys of its own sequence. Both or none; not together with `mask`. On the CPU their values are checked.
        stop_gradient: ``"a"`` or ``"b"`` holds the first or the second view fixed; None moves both.
        reduction: as there, ``"none"`` gives ``[B, H, Q]``, packed ``[H, T_q]``.

    Returns:
        float32 (float64 for float64 inputs), whatever the dtypes of the inputs; 0 with zero gradients for equal views.

    Raises:
        TypeError, ValueError: as there, and where heads do not divide or the cu_seqlens do not fit.

    Source: as there; causal and mask as in ``torch.nn.functional.scaled_dot_product_attention``, grouped heads as its
    ``enable_gqa``.

    Example:
        >>> q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
        >>> attention_consistency_from_qk(q, k, q, k, causal=True).item()
        0.0
    """
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    for name, value in (("q1", q1), ("k1", k1), ("q2", q2), ("k2", k2)):
        check_tensor(name, value, 3 if packed else 4)
        check_same_device("q1", q1, name, value)
    _check_views(q1, k1, q2, k2, packed)
    check_choice("metric", metric, METRICS)
    causal = check_flag("causal", causal)
    check_reduction(reduction)
    if scale is not None:
        scale = check_number("scale", scale)
    temperature = check_number("temperature", temperature, 0, open_low=True)
    if stop_gradient is not None:
        check_choice("stop_gradient", stop_gradient, VIEWS)
    key_spans = query_spans = None
    if packed:
        if mask is not None:
            raise ValueError("mask: expected None with cu_seqlens, which say what keys a query has")
        _check_starts(q1, cu_seqlens_q, cu_seqlens_k, k1)
        key_spans, query_spans = _spans(cu_seqlens_q, cu_seqlens_k, q1.shape[0], k1.shape[0], causal)
        q1, k1, q2, k2 = (t.transpose(0, 1)[None] for t in (q1, k1, q2, k2))
    shape = torch.Size((*q1.shape[:3], k1.shape[2]))
    if mask is not None:
        check_mask(mask, shape, q1)
        mask = mask.expand(shape)
    if reduction == "mean":
        check_not_empty(shape[:3].numel())
    if stop_gradient == "a":
        q1, k1 = q1.detach(), k1.detach()
    elif stop_gradient == "b":
        q2, k2 = q2.detach(), k2.detach()
    scale1, scale2 = ((q.shape[-1] ** -0.5 if scale is None else scale) / temperature for q in (q1, q2))
    dtype = torch.promote_types(torch.promote_types(q1.dtype, k1.dtype), torch.promote_types(q2.dtype, k2.dtype))
    q1, k1, q2, k2 = q1.to(dtype), k1.to(dtype), q2.to(dtype), k2.to(dtype)
    out = attention_qk(*Inputs(q1, k1, q2, k2, mask, key_spans, query_spans, metric, scale1, scale2, causal, reduction))
    return out[0] if packed and reduction == "none" else out


def _check_views(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, packed: bool) -> None:
    heads, rows = (1, 0) if packed else (1, 2)
    for name, value in (("k1", k1), ("q2", q2), ("k2", k2)):
        if not packed and value.shape[0] != q1.shape[0]:
            raise ValueError(f"{name}: expected the batch of q1, {tuple(q1.shape)}, got {tuple(value.shape)}")
    if q2.shape[heads] != q1.shape[heads]:
        raise ValueError(f"q2: expected the heads of q1, {tuple(q1.shape)}, got {tuple(q2.shape)}")
    for name_q, q, name_k, k in (("q1", q1, "k1", k1), ("q2", q2, "k2", k2)):
        if k.shape[heads] == 0 or q.shape[heads] % k.shape[heads] != 0:
            raise ValueError(
                f"{name_k}: expected a number of heads that divides the {q.shape[heads]} of {name_q}, "
                f"got {k.shape[heads]} in {tuple(k.shape)}"
            )
        if q.shape[-1] != k.shape[-1] or q.shape[-1] == 0:
            raise ValueError(
                f"{name_k}: expected the last dimension of {name_q}, {tuple(q.shape)}, >= 1, got {tuple(k.shape)}"
            )
    for name, value, name_1, first in (("q2", q2, "q1", q1), ("k2", k2, "k1", k1)):
        if value.shape[rows] != first.shape[rows]:
            raise ValueError(
                f"{name}: expected as many rows as {name_1}, {tuple(first.shape)}, got {tuple(value.shape)}"
            )
    if k1.shape[rows] == 0:
        raise ValueError(f"k1: expected at least one key, got shape {tuple(k1.shape)}")


def _check_starts(q: Tensor, cu_seqlens_q: Any, cu_seqlens_k: Any, k: Tensor) -> None:
    for name, starts, rows_name, of in (
        ("cu_seqlens_q", cu_seqlens_q, "q1", q),
        ("cu_seqlens_k", cu_seqlens_k, "k1", k),
    ):
        if starts is None:
            raise ValueError(f"{name}: expected it with the other cu_seqlens, got None")
        if not isinstance(starts, Tensor) or starts.dtype not in (torch.int32, torch.int64):
            got = starts.dtype if isinstance(starts, Tensor) else type(starts).__name__
            raise TypeError(f"{name}: expected an int32 or int64 tensor, got {got}")
        check_dense(name, starts)
        check_same_device("q1", q, name, starts)
        if starts.ndim != 1 or starts.shape[0] < 2:
            raise ValueError(f"{name}: expected shape [sequences + 1], got {tuple(starts.shape)}")
        # Looking at values must not happen while tracing, nor make a GPU wait.
        plain = not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
        if plain and type(starts) is Tensor and starts.device.type == "cpu":
            found = starts.tolist()
            if found[0] != 0 or found[-1] != of.shape[0] or found != sorted(found):
                raise ValueError(
                    f"{name}: expected starts that rise from 0 to the {of.shape[0]} rows of {rows_name}, got "
                    f"{found[:8]}{'...' if len(found) > 8 else ''}"
                )
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k: expected as many entries as cu_seqlens_q, {len(cu_seqlens_q)}, got {len(cu_seqlens_k)}"
        )


def _spans(starts_q: Any, starts_k: Any, queries: int, keys: int, causal: bool) -> tuple[Tensor, Tensor]:
    """(int32 [2, queries]: the first key of each query and the one after its last, [2, keys]: the same of each key)."""
    sequence, query = _sequences(starts_q, queries)
    first, end = starts_k[sequence], starts_k[sequence + 1]
    if causal:
        end = torch.minimum(end, first + (query - starts_q[sequence]) + 1)
    of_queries = torch.stack([first, end]).int()
    sequence, key = _sequences(starts_k, keys)
    first, end = starts_q[sequence], starts_q[sequence + 1]
    if causal:
        first = torch.minimum(end, first + (key - starts_k[sequence]))
    return of_queries, torch.stack([first, end]).int()


def _sequences(starts: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The sequence of each packed row, and its number."""
    row = torch.arange(rows, dtype=starts.dtype, device=starts.device)
    sequence = torch.searchsorted(starts, row, right=True) - 1
    return sequence.clamp(0, starts.shape[0] - 2), row


class AttentionConsistencyFromQK(Loss):
    """Module form of :func:`attention_consistency_from_qk`."""

    fn = staticmethod(attention_consistency_from_qk)
