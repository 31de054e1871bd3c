"""NT-Xent: the softmax loss of two views of each sample, against all the other views of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core import Loss, full_precision, result_dtype
from .checks import (
    across_ranks,
    check_embeddings,
    check_flags,
    check_integers,
    check_sampling,
    check_shared,
    counted,
    dropped_rows,
    reduce_output,
    scale_of,
)
from .embeddings import _inner, scale_of_rows, self_operands
from .ops.softmax_stats import Inputs, softmax_statistics
from .options import (
    SAMPLING_HINTS,
    TEMPERATURE_HINTS,
    ContrastiveOutput,
    NegativeSampling,
    SoftmaxOptions,
    may_return_lse,
)
from .pairs import ListedPairs, checked_pairs, words_of
from .query_key_losses import _left_out, _sampling
from .row_losses import row_losses

if TYPE_CHECKING:
    from ..distributed.exchange import Exchange, Group


def nt_xent_rows(
    view_a: Tensor,
    view_b: Tensor,
    scale: Tensor | float,
    ids: Tensor | None,
    form: SoftmaxOptions,
    workspace_mib: float,
    dropped: Tensor | None,
    statistics: Callable[[Inputs], Tensor] = softmax_statistics,
    pairs: ListedPairs | None = None,
) -> ContrastiveOutput:
    """Row losses [2M]: each view of each sample against all the other views of the batch.

    `statistics` finds those of the negatives, of which other ranks may have a part.
    """
    dtype = result_dtype(view_a, view_b)
    rows = view_a.shape[0]
    views, norms = self_operands(torch.cat((view_a, view_b)), dtype, form.normalize)
    moments, hardness, margin = _sampling(form)
    row_scale = scale_of_rows(norms, scale, views, dtype)
    partner = torch.arange(2 * rows, device=views.device).roll(rows)
    positive = _inner(views[:rows], views[rows:], dtype).repeat(2) * row_scale
    if norms is not None:
        positive = positive * norms.roll(rows)
    logit_limit = None if margin is None else (positive + scale * margin).detach()
    both = None if ids is None else ids.repeat(2)
    stats = statistics(Inputs(  # of listed pairs (i, j) may be one and (j, i) none: no half of the matrix has all
        views, views, row_scale, norms, None, partner, both, both, logit_limit, pairs is not None, False, pairs is None,
        moments, False, False, hardness, workspace_mib,
    ).with_pairs(words_of(pairs, 2 * rows, 2 * rows)))  # fmt: skip
    out = row_losses(_left_out(dropped, positive), _left_out(dropped, stats[0]), scale, form)
    return out._replace(lse=_left_out(dropped, out.lse))


@may_return_lse(hints=SAMPLING_HINTS | TEMPERATURE_HINTS)
def nt_xent_loss(
    view_a: Tensor,
    view_b: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    include_positive: bool = True,
    normalize: bool = True,
    label_smoothing: float = 0.0,
    ids: Tensor | None = None,
    sampling: NegativeSampling | None = None,
    excluded_pairs: Tensor | None = None,
    negative_pairs: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    return_lse: bool = False,
    workspace_mib: float = 256,
    group: Group = None,
    exchange: Exchange | None = None,
) -> Tensor | ContrastiveOutput:
    r"""NT-Xent (SimCLR): every view must find the other view of its sample among all 2M - 1 other views.

    :func:`info_nce` of the 2M rows ``cat(view_a, view_b)`` against themselves without the diagonal; the positive of row
    i is row i + M, and the other way round.

    Args:
        view_a: embeddings [M, D], float16, bfloat16, float32 or float64.
        view_b: embeddings [M, D] of the same samples.
        temperature: number > 0, or a one-element tensor (its gradient is exact, its value is not looked at).
        include_positive: False leaves the positive out of the sum (decoupled contrastive learning).
        normalize: cosine similarity; zero vectors have similarity 0 and gradient 0. False: plain dot products.
        label_smoothing: as in :func:`info_nce`.
        ids: integers [M]; samples with equal ids are no negatives of each other.
        sampling: as in :func:`info_nce`.
        excluded_pairs, negative_pairs: as in :func:`info_nce`, of rows and columns 0 to 2M - 1: view_a's, then
            view_b's. A pair (i, j) says nothing of the pair (j, i).
        weights: one weight >= 0 per sample [M], or a bool mask, as in :func:`info_nce`; both views of the sample get
            it, and remain negatives of the others.
        reduction: ``"mean"`` (weighted as in :func:`info_nce`), ``"sum"`` or ``"none"``, over the 2M rows.
        return_lse: return ``(loss, lse, top1)`` with [2M] by-products, see :class:`ContrastiveOutput`.
        workspace_mib: as in :func:`info_nce`.
        group, exchange: a batch whose samples lie on several ranks, as in :func:`info_nce`.

    Returns:
        float32 (float64 for float64 embeddings): a scalar, or [2M] for ``"none"``, view_a's rows first.
        A row without negatives (M = 1) has loss 0 and gradient 0.

    Raises:
        TypeError: an argument of the wrong type. ValueError: shapes, devices or options do not fit, temperature <= 0 or
            not finite, ``"mean"`` of an empty batch.

    Source: Chen et al., "A simple framework for contrastive learning of visual representations", 2020.

    Example:
        >>> x = torch.eye(2)
        >>> round(nt_xent_loss(x, x, temperature=1.0).item(), 4)  # log(e + 2) - 1
        0.5514
    """
    check_embeddings("view_a", view_a)
    check_embeddings("view_b", view_b, view_a, "view_a", rows=True)
    include_positive, normalize, return_lse = check_flags(
        include_positive=include_positive, normalize=normalize, return_lse=return_lse
    )
    rows = view_a.shape[0]
    if ids is not None:
        ids = check_integers("ids", ids, (rows,), view_a)
    check_sampling(sampling, normalize)
    workspace_mib, label_smoothing = check_shared(view_a, weights, workspace_mib, label_smoothing)
    pairs = checked_pairs(excluded_pairs, negative_pairs, 2 * rows, 2 * rows, view_a, group)
    scale = scale_of(temperature, view_a, result_dtype(view_a, view_b))
    form = SoftmaxOptions(include_positive, False, normalize, label_smoothing, True, sampling)
    both = None if weights is None else weights.repeat(2)
    if group is not None:
        x = view_a, view_b, scale, ids, both, form, reduction, return_lse, workspace_mib
        return across_ranks().nt_xent_loss(*x, group, exchange)
    dropped = dropped_rows(both)
    view_a, view_b = counted(view_a, dropped), counted(view_b, dropped)
    with full_precision(view_a):
        out = nt_xent_rows(view_a, view_b, scale, ids, form, workspace_mib, dropped, pairs=pairs)
    return reduce_output(out, both, reduction, return_lse)


class NTXentLoss(Loss):
    """Module form of :func:`nt_xent_loss`."""

    fn = staticmethod(nt_xent_loss)
