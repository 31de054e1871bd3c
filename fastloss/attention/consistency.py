"""Attention consistency: divergence of two attention maps, given as maps, as logits, or as queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import Loss, check_not_empty, check_reduction, full_precision, result_dtype
from ..core.checks import (
    check_choice,
    check_dense,
    check_flag,
    check_number,
    check_numbers,
    check_same_device,
    check_same_length,
    check_same_shape,
    check_tensor,
    is_sequence,
)
from ..core.entry import public_function

INPUTS = ("probs", "logits")
METRICS = ("js", "kl", "sym_kl", "mse", "l1")
QK_METRICS = ("kl", "sym_kl", "js")


def _known(p: Tensor) -> Tensor:
    """p, with a gradient of 0 where it is 0: there the true one is infinite, and a softmax would make NaN of it."""
    return torch.where(p == 0, torch.zeros_like(p), p)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """p log(p / q) by element, and 0 with zero gradients where p is 0: both logs see 1 there."""
    zero = p == 0
    one = torch.ones_like(p)
    p, q = torch.where(zero, one, p), torch.where(zero, one, q)
    above = (p - q) / q
    near = above.abs() < 0.5  # the difference of the logs of near numbers would be mostly rounding
    small = torch.where(near, above, torch.zeros_like(p))
    return p * torch.where(near, torch.log1p(small), p.log() - q.log())


def _kl_of_logs(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p log(p / q) - p + q by element, which sums to the divergence of two normalised rows without their rounding.

    The rounding of a row's normaliser shifts all its log-probabilities alike: here it cancels. Finite where only q
    underflows; 0 where both are 0.
    """
    p, q = log_p.exp(), log_q.exp()
    zero = p == 0
    none = torch.zeros_like(p)
    d = torch.where(zero, none, log_p) - torch.where(zero, none, log_q)
    near = d.abs() < 0.5
    small = torch.where(near, d, none)
    return torch.where(near & ~zero, p * (small + torch.expm1(-small)), p * d + (q - p))


def _sym_kl_of_logs(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(p - q) log(p / q) / 2 by element: of one sign, and blind to the rounding of the normalisers."""
    p, q = log_p.exp(), log_q.exp()
    zero = (p == 0) & (q == 0)
    none = torch.zeros_like(p)
    return 0.5 * (p - q) * (torch.where(zero, none, log_p) - torch.where(zero, none, log_q))


def _js(p: Tensor, q: Tensor) -> Tensor:
    """KL(p|m) / 2 + KL(q|m) / 2 by element; where p and q are near, from r = (p - q) / (p + q): p = m (1 + r)."""
    p, q = _known(p), _known(q)
    total = p + q
    r = (p - q) / torch.where(total == 0, torch.ones_like(total), total)

    near = r.abs() < 0.5
    small = torch.where(near, r, torch.zeros_like(r))
    middle = 0.5 * total
    middle = torch.where(middle == 0, total, middle)  # half of the smallest positive number rounds to 0
    close = 0.25 * total * ((1 + small) * torch.log1p(small) + (1 - small) * torch.log1p(-small))
    return torch.where(near, close, 0.5 * (_kl(p, middle) + _kl(q, middle)))


def _divergence(p: Tensor, q: Tensor, metric: str) -> Tensor:
    """The metric by element, from probabilities."""
    if metric == "kl":
        return _kl(p, q)
    if metric == "sym_kl":
        return 0.5 * (_kl(p, q) + _kl(q, p))
    if metric == "js":
        return _js(p, q)
    return (p - q) * (p - q) if metric == "mse" else (p - q).abs()


def attention_reference(a: Tensor, b: Tensor, mask: Tensor | None, inputs: str, metric: str) -> tuple[Tensor, Tensor]:
    """The definition: ([..., Q] divergences in float32 or float64, [..., Q] which rows count)."""
    dtype = result_dtype(a, b)
    a, b = a.to(dtype), b.to(dtype)
    keep = torch.ones_like(a, dtype=torch.bool) if mask is None else mask.expand(a.shape)
    if inputs == "probs":
        rows = keep.any(-1)
        a, b = (torch.where(keep, x, torch.zeros_like(x)) for x in (a, b))
        values = _divergence(a, b, metric)
    else:
        # a row without a logit above -inf has no softmax: it counts as masked, and is computed as if all were 0
        rows = (keep & (a != -torch.inf)).any(-1) & (keep & (b != -torch.inf)).any(-1)
        a, b = (torch.where(keep, x, -torch.inf).where(rows[..., None], torch.zeros_like(x)) for x in (a, b))
        a, b = a.log_softmax(-1), b.log_softmax(-1)
        if metric == "kl":
            values = _kl_of_logs(a, b)
        elif metric == "sym_kl":
            values = _sym_kl_of_logs(a, b)
        else:
            values = _divergence(a.exp(), b.exp(), metric)
    values = values.sum(-1)
    return values / keep.sum(-1).clamp(min=1) if metric in ("mse", "l1") else values, rows


def attention_qk_reference(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, mask: Tensor | None, metric: str, scales: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """The definition: build both [B,H,Q,K] maps of logits, then compare them."""
    dtype = result_dtype(q1, k1, q2, k2)
    with full_precision(q1):
        a = q1.to(dtype) @ k1.to(dtype).transpose(-1, -2) * scales[0]
        b = q2.to(dtype) @ k2.to(dtype).transpose(-1, -2) * scales[1]
    return attention_reference(a, b, mask, "logits", metric)


def _reduce_rows(values: Tensor, rows: Tensor, reduction: str) -> Tensor:
    """Mean over the rows that count (0 when none does), sum, or the rows with 0 where they do not count."""
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    check_not_empty(values.numel())
    return values.sum() / rows.sum().clamp(min=1)


def _check_mask(mask: Tensor | None, shape: torch.Size, like: Tensor) -> None:
    if mask is None:
        return
    if isinstance(mask, Tensor):
        check_dense("mask", mask)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: expected a bool tensor (True: the key takes part), got {got}")
    check_same_device("the maps", like, "mask", mask)
    try:
        fits = torch.broadcast_shapes(mask.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"mask: expected a shape that broadcasts to {tuple(shape)}, got {tuple(mask.shape)}")


@public_function
def attention_consistency_loss(
    a: Tensor | Sequence[Tensor],
    b: Tensor | Sequence[Tensor],
    *,
    inputs: str = "probs",
    metric: str = "js",
    mask: Tensor | None = None,
    layer_weights: Sequence[float] | None = None,
    reduction: str = "mean",
) -> Tensor | list[Tensor]:
    r"""Divergence of two sets of attention distributions, row by row, for one input seen twice.

    Two views of one input (dropout, augmentation, a student and its teacher) should attend alike. With p and q the
    distributions over the K keys in one row of `a` and of `b`, natural logarithms, and 0 log 0 = 0::

        "js"        KL(p|m) / 2 + KL(q|m) / 2, m = (p + q) / 2      symmetric, from 0 to log 2 (the default)
        "kl"        KL(p|q) = sum_k p_k log(p_k / q_k)              `a` is the teacher, as in distillation
        "sym_kl"    KL(p|q) / 2 + KL(q|p) / 2                       R-Drop
        "mse"       mean_k (p_k - q_k)^2
        "l1"        mean_k |p_k - q_k|

    Args:
        a, b: ``[..., Q, K]`` maps of one shape, usually ``[B, H, Q, K]``, or lists of them, one per layer (each layer
            in a shape of its own). Both may need gradients; detach the one that should not move.
        inputs: ``"probs"``, used as they are (rows are not normalised again), or ``"logits"``, put through a softmax;
            -inf logits are keys left out.
        metric: the divergence, see above; always between probabilities. ``"kl"`` and ``"sym_kl"`` of probabilities
            are infinite where one is 0 and the other is not, as after attention dropout: ``"js"`` never is.
        mask: bool, broadcastable to the maps (to every layer's), True where the key takes part.
        layer_weights: for lists, one number >= 0 per layer; None is the mean over the layers, 1 / layers each.
        reduction: ``"mean"`` over the rows with at least one key left (0 if there is none), ``"sum"``, or ``"none"``
            for the ``[..., Q]`` rows, which are 0 where every key is masked. Lists: the weighted sum over the layers
            of the mean or sum of each; for ``"none"`` the list of weighted rows.

    Returns:
        float32 (float64 for float64 inputs). The gradient is 0 at probabilities that are exactly 0.

    Raises:
        TypeError: an argument is no floating-point tensor, or the mask is not bool. ValueError: shapes, devices,
            lengths or options do not fit, or ``"mean"`` of an empty batch.

    Source: Lin, "Divergence measures based on the Shannon entropy", IEEE Trans. Inf. Theory 1991 (JS); Liang et al.,
    "R-Drop", NeurIPS 2021 (sym_kl); Wang et al., "MiniLM", NeurIPS 2020 (kl of attention); Jiao et al., "TinyBERT",
    2020 (mse of attention, there of the scores before the softmax).

    Example:
        >>> round(attention_consistency_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item(), 4)
        0.6931
    """
    check_choice("inputs", inputs, INPUTS)
    check_choice("metric", metric, METRICS)
    check_reduction(reduction)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if layer_weights is not None:
            raise ValueError("layer_weights: expected None for single maps; it weighs the entries of lists")
        return _one_map("a", a, "b", b, mask, inputs, metric, reduction)
    a, b = _two_lists(a, b)
    check_same_length("a", a, "b", b)
    if len(a) == 0:
        raise ValueError("a: expected at least one layer, got an empty list")
    if layer_weights is None:
        layer_weights = [1 / len(a)] * len(a)
    layer_weights = check_numbers("layer_weights", layer_weights, 0, of="numbers, one a layer")
    check_same_length("a", a, "layer_weights", layer_weights)
    layers = []
    for i, (x, y, weight) in enumerate(zip(a, b, layer_weights, strict=True)):
        layers.append(weight * _one_map(f"a[{i}]", x, f"b[{i}]", y, mask, inputs, metric, reduction))
    return layers if reduction == "none" else torch.stack(layers).sum()


def _two_lists(a: Any, b: Any) -> tuple[list[Tensor], list[Tensor]]:
    for name, value in sorted({"a": a, "b": b}.items(), key=lambda item: isinstance(item[1], Tensor)):
        if not is_sequence(value):
            raise TypeError(f"{name}: expected two tensors or two lists of them, got {type(value).__name__} for {name}")
    return list(a), list(b)


def _one_map(
    name_a: str, a: Tensor, name_b: str, b: Tensor, mask: Tensor | None, inputs: str, metric: str, reduction: str
) -> Tensor:
    check_tensor(name_a, a)
    check_tensor(name_b, b)
    check_same_shape(name_a, a, name_b, b)
    if a.ndim < 2 or a.shape[-1] == 0:
        raise ValueError(f"{name_a}: expected [..., Q, K] with K >= 1, got shape {tuple(a.shape)}")
    _check_mask(mask, a.shape, a)
    values, rows = attention_reference(a, b, mask, inputs, metric)
    return _reduce_rows(values, rows, reduction)


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
    check_choice("metric", metric, QK_METRICS)
    causal = check_flag("causal", causal)
    check_reduction(reduction)
    if scale is not None:
        scale = check_number("scale", scale)
    shape = torch.Size((*q1.shape[:3], k1.shape[2]))
    _check_mask(mask, shape, q1)
    if causal:
        lower = torch.ones(shape[-2:], dtype=torch.bool, device=q1.device).tril()
        mask = lower if mask is None else mask & lower
    scales = (q1.shape[-1] ** -0.5, q2.shape[-1] ** -0.5) if scale is None else (scale, scale)
    values, rows = attention_qk_reference(q1, k1, q2, k2, mask, metric, scales)
    return _reduce_rows(values, rows, reduction)


class AttentionConsistencyLoss(Loss):
    """Module form of :func:`attention_consistency_loss`."""

    fn = staticmethod(attention_consistency_loss)


class AttentionConsistencyFromQK(Loss):
    """Module form of :func:`attention_consistency_from_qk`."""

    fn = staticmethod(attention_consistency_from_qk)
