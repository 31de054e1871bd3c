"""The op of attention consistency from queries and keys: neither map is ever whole in memory.

With s = scale q k^T and p, q the softmaxes over the keys of the rows of both views, the gradients of a row are

    kl       ds1 = p (d - sum_k p_k d_k), d = s1 - s2                   ds2 = q - p
    sym_kl   ds1 = (p (d - sum_k p_k d_k) + p - q) / 2                  ds2 = -(q (d - sum_k q_k d_k) + p - q) / 2
    js       ds1 = p (l - sum_k p_k l_k) / 2, l = log(2 p / (p + q))    ds2 the same of q

from which dq = scale ds k and dk = scale ds^T q. So the backward makes the tiles of s again and needs of the forward
six numbers a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core import Op, full_precision, result_dtype
from ..core.backends import is_interpreting
from .divergence import attention_reference, reduce_rows

MOST_DIM = 256  # of the Triton kernels: sums for the gradients of a tile stay in registers
STATISTICS = 6  # of a row: the largest logit and the sum of exponentials below it of each view, and the two means above


class Inputs(NamedTuple):
    """Of the op, which returns the reduced loss, or the divergence of each row [B, H, Q]."""

    q1: Tensor  # [B, H, Q, d]
    k1: Tensor  # [B, G, K, d], G divides H: head h attends to the keys of head h // (H // G)
    q2: Tensor  # [B, H, Q, d2]
    k2: Tensor  # [B, G2, K, d2]
    mask: Tensor | None  # [B, H, Q, K] bool, of any strides: True where the key takes part
    key_spans: Tensor | None  # [2, Q] int32: query i has the keys from key_spans[0, i] on and below key_spans[1, i]
    query_spans: Tensor | None  # [2, K] int32: the same pairs, from the side of the keys
    metric: str  # "kl", "sym_kl" or "js"
    scale1: float  # factors of the logits
    scale2: float
    causal: bool  # query i has the keys up to i; spans, where given, say so themselves
    reduction: str


class Saved(NamedTuple):
    statistics: Tensor  # [B H Q, STATISTICS] float32
    counted: Tensor  # [] float32, of rows that have a key


class Grads(NamedTuple):
    q1: Tensor
    k1: Tensor
    q2: Tensor
    k2: Tensor


class Needs(NamedTuple):
    q1: bool
    k1: bool
    q2: bool
    k2: bool


def attention_qk_reference(x: Inputs) -> Tensor:
    """The definition: build both [B, H, Q, K] maps of logits, then compare them."""
    dtype = result_dtype(x.q1, x.k1, x.q2, x.k2)
    with full_precision(x.q1):
        a = _logits(x.q1, x.k1, dtype, x.scale1)
        b = _logits(x.q2, x.k2, dtype, x.scale2)
    values, rows = attention_reference(a, b, _kept(x), "logits", x.metric)
    return reduce_rows(values, rows, x.reduction)


def _logits(q: Tensor, k: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    k = k.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], 1)
    return q.to(dtype) @ k.transpose(-1, -2) * scale


def _kept(x: Inputs) -> Tensor | None:
    """Which keys each query has, broadcastable to [B, H, Q, K]; None: all."""
    kept = x.mask
    if x.key_spans is not None:
        key = torch.arange(x.k1.shape[2], device=x.q1.device)
        inside = (key >= x.key_spans[0, :, None]) & (key < x.key_spans[1, :, None])
    elif x.causal:
        inside = torch.ones(x.q1.shape[2], x.k1.shape[2], dtype=torch.bool, device=x.q1.device).tril()
    else:
        return kept
    return inside if kept is None else kept & inside


def _attention_qk_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    shape = x.q1.shape[:3]
    out = x.q1.new_empty(shape if x.reduction == "none" else (), dtype=torch.float32)
    statistics = x.q1.new_empty((shape.numel(), STATISTICS), dtype=torch.float32)
    return out, Saved(statistics, x.q1.new_empty((), dtype=torch.float32))


def _attention_qk_bwd(grad: Tensor, x: Inputs, saved: Saved, needs: Needs) -> Grads:
    def gradient(t: Tensor, needed: bool) -> Tensor:
        return t.new_empty(t.shape if needed else 0)

    return Grads(gradient(x.q1, needs.q1), gradient(x.k1, needs.k1), gradient(x.q2, needs.q2), gradient(x.k2, needs.k2))


def _why_not(x: Inputs) -> str | None:
    dim = max(x.q1.shape[3], x.q2.shape[3])
    if x.q1.device.type == "cpu" and not is_interpreting() or dim <= MOST_DIM:
        return None
    return f"the kernels of GPUs take head dimensions up to {MOST_DIM}, not {dim}"


attention_qk = Op(
    "attention_qk",
    fwd=_attention_qk_fwd,
    bwd=_attention_qk_bwd,
    reference=attention_qk_reference,
    grads=Grads._fields,
    outputs=("out", *Saved._fields),
    triton="attention.kernels.attention_qk",
    declines=_why_not,
)
