"""SupCon: the softmax loss of one set of rows, whose positives are the rows of the same label."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..core import Loss, full_precision, result_dtype
from ..core.checks import check_dense, check_tensor
from .checks import (
    across_ranks,
    check_embeddings,
    check_flags,
    check_integers,
    check_shared,
    counted,
    dropped_rows,
    reduce_output,
    scale_of,
    without,
)
from .embeddings import scale_of_rows, self_operands
from .groups import sum_of_group
from .ops.softmax_stats import Inputs, softmax_statistics
from .options import SUPCONTRAST_HINTS, TEMPERATURE_HINTS, Columns, ContrastiveOutput, may_return_lse
from .pairs import ListedPairs, checked_pairs, words_of
from .query_key_losses import _left_out

if TYPE_CHECKING:
    from ..distributed.exchange import Exchange, Group


@may_return_lse(hints=TEMPERATURE_HINTS | SUPCONTRAST_HINTS)
def supcon_loss(
    features: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    include_positive: bool = True,
    normalize: bool = True,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    excluded_pairs: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    return_lse: bool = False,
    workspace_mib: float = 256,
    group: Group = None,
    exchange: Exchange | None = None,
) -> Tensor | ContrastiveOutput:
    r"""Supervised contrastive loss: all other rows of a row's class are its positives.

    With :math:`s_{ij} = \mathrm{sim}(f_i, f_j) / \tau` and :math:`P_i` the other rows with row i's label::

        include_positive=True    -mean_{p in P_i} log( exp(s_ip) / sum_{j != i} exp(s_ij) )
        include_positive=False   the sum runs over the rows with another label only; may be negative

    A row without a positive, or with nothing in its sum, has loss 0 and gradient 0, and counts in the mean.

    Args:
        features: embeddings [M, D], float16, bfloat16, float32 or float64; several views of a sample are several rows.
            Or [B, V, D], SupContrast's layout: V views of each of B samples, which share its label.
        labels: integers [M], or [B] for views, any values. None, for views only: each sample is a class of its own,
            which is SimCLR's loss.
        keys: embeddings [N, D] that the rows are compared with in place of one another: a memory bank, or those of a
            momentum encoder. A row's positives are the keys with its label; all keys are in its sum. Not with `group`.
        key_labels: integers [N], beside `keys`.
        temperature: number > 0, or a one-element tensor (its gradient is exact, its value is not looked at).
        include_positive: see above.
        normalize: cosine similarity; zero vectors have similarity 0 and gradient 0. False: plain dot products.
        excluded_pairs: integers [P, 2], pairs of a row and another row, or a key, that the row's sum leaves out, as in
            :func:`info_nce`; which are its positives does not change. Of views rows are counted sample by sample.
        weights: one weight >= 0 per row [M], or per sample [B] for all its views, or a bool mask, as in
            :func:`info_nce`; a row of weight 0 remains a positive or negative of the others.
        reduction: ``"mean"`` (weighted as in :func:`info_nce`), ``"sum"`` or ``"none"``, over rows.
        return_lse: return ``(loss, lse, top1)``, see :class:`ContrastiveOutput`; top1: a positive is the nearest row.
        workspace_mib: as in :func:`info_nce`.
        group, exchange: a batch whose rows lie on several ranks, as in :func:`info_nce`.

    Returns:
        float32 (float64 for float64 features): a scalar, or [M] for ``"none"``, [B, V] for views.

    Raises:
        TypeError: an argument of the wrong type. ValueError: shapes, devices or options do not fit, temperature <= 0 or
            not finite, ``"mean"`` of an empty batch.

    Source: Khosla et al., "Supervised contrastive learning", 2020, its L_out without the factor temperature /
    base_temperature, and their ``SupContrast``; pytorch-metric-learning's ``SupConLoss``, which averages over rows of
    non-zero loss only.

    Example:
        >>> loss = supcon_loss(torch.ones(4, 2), torch.tensor([0, 0, 1, 1]))
        >>> round(loss.item(), 4)  # log 3
        1.0986
    """
    first_label = 0 if group is None else across_ranks().first_label(group)
    known = labels is not None
    views, features, labels, weights = _as_rows(features, labels, weights, first_label)
    others = _checked_keys(features, keys, key_labels, known, group)
    rows, columns = features.shape[0], features.shape[0] if others is None else others.embeddings.shape[0]
    pairs = checked_pairs(excluded_pairs, None, rows, columns, features, group)
    include_positive, normalize, return_lse = check_flags(
        include_positive=include_positive, normalize=normalize, return_lse=return_lse
    )
    workspace_mib, _ = check_shared(features, weights, workspace_mib)
    scale = scale_of(temperature, features, result_dtype(features, keys))
    if group is not None:
        x = features, labels, scale, weights, include_positive, normalize, reduction, return_lse, workspace_mib
        found = across_ranks().supcon_loss(*x, known, group, exchange)
    else:
        dropped = dropped_rows(weights)
        if others is None:
            features = counted(features, dropped)
        else:
            features = without(features.to(others.embeddings.dtype), dropped)
            others = others._replace(embeddings=counted(others.embeddings, dropped))
        with full_precision(features):
            out = supcon_rows(
                features, labels, scale, include_positive, normalize, return_lse, workspace_mib, dropped,
                others=others, pairs=pairs,
            )  # fmt: skip
        found = reduce_output(out, weights, reduction, return_lse)
    return found if views is None else _per_view(found, views)


def _as_rows(
    features: Tensor, labels: Tensor | None, weights: Tensor | None, first_label: int
) -> tuple[tuple[int, int] | None, Tensor, Tensor, Tensor | None]:
    """(B, V) where views came, else None; the embeddings [M, D], and their labels and weights [M], M = B V."""
    check_tensor("features", features, (2, 3))
    if features.ndim == 2:
        check_embeddings("features", features)
        if labels is None:
            raise TypeError("labels: expected integers [M]; only views, features [B, V, D], may come without")
        return None, features, check_integers("labels", labels, (features.shape[0],), features), weights
    samples, count, dim = features.shape
    if count == 0 or dim == 0:
        raise ValueError(f"features: expected [B, V, D] with V and D >= 1, got shape {tuple(features.shape)}")
    if labels is None:
        labels = torch.arange(first_label, first_label + samples, device=features.device)
    labels = check_integers("labels", labels, (samples,), features).repeat_interleave(count)
    if isinstance(weights, Tensor):  # else check_shared() refuses it
        check_dense("weights", weights)
        if weights.shape != (samples,):
            raise ValueError(f"weights: expected one per sample, shape ({samples},), got {tuple(weights.shape)}")
        weights = weights.repeat_interleave(count)
    return (samples, count), features.flatten(0, 1), labels, weights


def _checked_keys(features: Tensor, keys: Any, key_labels: Any, known: bool, group: object) -> Columns | None:
    """The rows' keys and their labels, where they are given."""
    if keys is None:
        if key_labels is not None:
            raise ValueError("key_labels: expected keys beside it, the embeddings that have these labels")
        return None
    if group is not None:
        raise ValueError("keys: expected it without group, whose rows are compared with one another")
    check_embeddings("keys", keys, features, "features")
    keys = keys.to(torch.promote_types(keys.dtype, features.dtype))
    if key_labels is None or not known:
        missing = "key_labels" if known else "labels"
        raise TypeError(f"{missing}: expected integers beside keys, to say which of them are positives")
    return Columns(keys, None, check_integers("key_labels", key_labels, (keys.shape[0],), features))


def _per_view(found: Tensor | ContrastiveOutput, views: tuple[int, int]) -> Tensor | ContrastiveOutput:
    """What there is of each row as [B, V]."""
    if isinstance(found, Tensor):
        return found.unflatten(0, views) if found.ndim else found
    return ContrastiveOutput(*(t.unflatten(0, views) if t.ndim else t for t in found))


class SupConLoss(Loss):
    """Module form of :func:`supcon_loss`."""

    fn = staticmethod(supcon_loss)


class Among(NamedTuple):
    """What rows find among those that they are compared with."""

    stats: Tensor  # [2, M], of the logits: log-sum-exp and maximum
    positives: Tensor | None  # [M], the sum of the logits of the rows of the same label; None where no labels are asked
    number: Tensor | None  # [M], how many these are


def supcon_rows(
    features: Tensor,
    labels: Tensor,
    scale: Tensor | float,
    include_positive: bool,
    normalize: bool,
    return_lse: bool,
    workspace_mib: float,
    dropped: Tensor | None,
    among: Callable[[Inputs, Tensor | None], Among] | None = None,
    others: Columns | None = None,
    pairs: ListedPairs | None = None,
) -> ContrastiveOutput:
    """Row losses [M]: log-sum-exp over the other rows minus the mean logit of the row's positives.

    `among` looks among the rows of other ranks too. With `others` the rows are compared with these, not with one
    another. `top1` is right with `return_lse` only: it takes the largest logit of the rows of other labels beside that
    of all, a second call of the op.
    """
    dtype = result_dtype(features) if others is None else result_dtype(features, others.embeddings)
    rows, norms = self_operands(features, dtype, normalize)
    row_scale = scale_of_rows(norms, scale, rows, dtype)
    columns = Columns(rows, norms, labels) if others is None else _operands(others, dtype, normalize)
    alone = others is None and pairs is None  # of all pairs of rows one half is made
    words = words_of(pairs, rows.shape[0], columns.embeddings.shape[0])

    def found(everything: bool, of_labels: Tensor | None) -> Among:
        row_ids, column_ids = (None, None) if everything else (labels, columns.ids)
        x = Inputs(
            rows, columns.embeddings, row_scale, columns.inverse_norms, None, None, row_ids, column_ids, None,
            others is None and not alone, False, alone, False, False, False, 0.0, workspace_mib,
        ).with_pairs(words)  # fmt: skip
        return _among_these(x, columns, of_labels, others is None) if among is None else among(x, of_labels)

    (lse, row_max), positives, count = found(include_positive, labels)
    assert positives is not None and count is not None
    mean = positives / count.to(dtype).clamp_min(1)
    some = lse != -math.inf
    loss = torch.where(some & (count > 0), lse.masked_fill(~some, 0.0) - mean, torch.zeros_like(mean))
    top1 = row_max > -math.inf
    if return_lse:
        with torch.no_grad():
            other_max = found(not include_positive, None).stats[1]
        top1 = row_max > other_max if include_positive else other_max > row_max
    return ContrastiveOutput(loss, _left_out(dropped, lse), top1 if dropped is None else top1 & ~dropped)


def _operands(others: Columns, dtype: torch.dtype, normalize: bool) -> Columns:
    embeddings, norms = self_operands(others.embeddings, dtype, normalize)
    return Columns(embeddings, norms, others.ids)


def _among_these(x: Inputs, columns: Columns, labels: Tensor | None, own: bool) -> Among:
    stats = softmax_statistics(x)[0]
    return Among(stats, None, None) if labels is None else Among(stats, *logits_of_label(x, columns, labels, own))


def logits_of_label(x: Inputs, columns: Columns, labels: Tensor, own: bool = True) -> tuple[Tensor, Tensor]:
    """The sum of the logits of each row's positives among the `columns`, and how many these are: from the sum of each
    label's rows, in O(M D). `own`: the columns begin with the rows themselves, which are none of their positives."""
    dtype = x.row_scale.dtype
    assert columns.ids is not None
    vectors = columns.embeddings.to(dtype)
    if columns.inverse_norms is not None:
        vectors = vectors * columns.inverse_norms[:, None]
    sums, count = sum_of_group(vectors, columns.ids, labels)
    if own:
        sums, count = sums - vectors[: labels.shape[0]], count - 1
    return (x.query.to(dtype) * sums).sum(1) * x.row_scale, count
