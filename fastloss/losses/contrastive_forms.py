"""The softmax forms, assembled from the statistics of their negatives in O(M D): InfoNCE, CLIP, NT-Xent, SupCon.

The positives' logits, the lengths of the embeddings and all that is one number per row are plain torch here, so that
autograd has their exact gradients, in float32 whatever the kernels' products are in.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core import check_not_empty, check_reduction, is_interpreting, result_dtype
from ..traced import filled
from .contrastive_checks import row_shares, without
from .contrastive_each import each_statistics
from .contrastive_own import NEGATIVES, contrastive_own
from .contrastive_plain import KEY, QUERY, SCALE, contrastive_plain
from .contrastive_reference import TINY_NORM, ContrastiveOutput, SoftmaxForm, embed, merged, row_losses
from .contrastive_softmax import softmax_statistics


def inverse_length(x: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / |x| of each row, 0 without gradient for zero vectors."""
    length = torch.linalg.vector_norm(x, dim=-1, dtype=dtype)
    return 1 / length.masked_fill(length <= TINY_NORM, math.inf)


def _inner(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return (a.to(dtype) * b.to(dtype)).sum(-1)


def widened(x: Tensor) -> Tensor:
    """On the CPU in float32: the parts of a gradient then add up before they are rounded."""
    on_cpu = x.device.type == "cpu" and not is_interpreting()
    return x.float() if on_cpu and x.dtype in (torch.bfloat16, torch.float16) else x


def against_themselves(x: Tensor, dtype: torch.dtype, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """What the op gets of rows that meet one another, and the inverse lengths that it is to multiply with, if any.

    float32 comes at unit length already. Half precision keeps its dtype, in which a device multiplies fastest.
    """
    x = widened(x)
    if normalize and x.dtype in (torch.bfloat16, torch.float16):
        return x, inverse_length(x, dtype)
    return embed(x, dtype if normalize else x.dtype, normalize), None


def are_bfloat16(one: Tensor, two: Tensor) -> bool:
    """Whether, on the CPU, both are bfloat16, so that their products may be made in it after all."""
    return one.device.type == "cpu" and one.dtype == two.dtype == torch.bfloat16


def _kind(diagonal: bool, moments: bool, symmetric: bool = False, bfloat16: bool = False) -> str:
    words = {"diagonal": diagonal, "moments": moments, "symmetric": symmetric, "bfloat16": bfloat16}
    return "+".join(word for word, there in words.items() if there)


def _sampling(form: SoftmaxForm) -> tuple[bool, float, float | None]:
    """Whether the form needs moments, its hardness, and its margin."""
    sampling = form.sampling
    if sampling is None:
        return form.label_smoothing > 0, 0.0, None
    moments = form.label_smoothing > 0 or sampling.tau_plus > 0 or sampling.hardness > 0
    return moments, float(sampling.hardness), sampling.margin


def scale_of_rows(lengths: Tensor | None, scale: Tensor | float, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor of each row's products: the scale, times the inverse lengths of normalised rows."""
    if lengths is not None:
        return lengths * scale
    if isinstance(scale, Tensor):
        return scale.expand(like.shape[0])
    return filled((like.shape[0],), scale, dtype, like.device)


def softmax_loss(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    scale: Tensor | float,
    targets: Tensor | None,
    weights: Tensor | None,
    form: SoftmaxForm,
    reduction: str,
    workspace_mib: float,
) -> Tensor | None:
    """The reduced loss of a form without options, of in-batch negatives or of each row's own (see
    :mod:`contrastive_plain` and :mod:`contrastive_own`); None where their ops do not serve."""
    if form.sampling is not None or form.label_smoothing != 0:
        return None
    own = negatives is not None
    embeddings = (query, key) if negatives is None else (query, key, negatives)
    if negatives is not None and negatives.ndim == 2:
        return None
    if own and (form.in_batch or targets is not None or key.shape[0] != query.shape[0]):
        return None
    op = contrastive_own if own else contrastive_plain
    if (backend := op.backend(*embeddings)) == "reference":
        return None
    check_reduction(reduction)
    rows, dtype = query.shape[0], result_dtype(*embeddings)
    if reduction == "mean":
        check_not_empty(rows)
    share = None if weights is None else row_shares(weights, reduction, dtype)
    if share is not None and reduction == "mean":
        reduction = "sum"
    learned = scale if isinstance(scale, Tensor) else None
    needs = 0
    if torch.is_grad_enabled():
        needs = sum(
            bit
            for bit, x in ((QUERY, query), (KEY, key), (SCALE, learned), (NEGATIVES, negatives))
            if x is not None and x.requires_grad
        )
    factor = scale if isinstance(scale, float) else 1.0
    if own:
        return contrastive_own(
            query, key, negatives, learned, share, factor, form.include_positive, form.normalize, reduction, needs,
            backend=backend,
        )  # fmt: skip
    return contrastive_plain(
        query, key, learned, share, targets, factor, form.include_positive, form.symmetric, form.normalize, reduction,
        needs, workspace_mib, backend=backend,
    )  # fmt: skip


def softmax_rows(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    scale: Tensor | float,
    bias: Tensor | float | None,
    targets: Tensor | None,
    ids: tuple[Tensor | None, Tensor | None],
    form: SoftmaxForm,
    workspace_mib: float,
    dropped: Tensor | None,
) -> ContrastiveOutput:
    """Row losses [M] of the forms with one positive per row; of a symmetric one the mean of the two directions.

    `ids` are the queries' and the keys', both or neither. Of `dropped` rows [M] nothing arrives in a sum over rows.
    """
    dtype = result_dtype(query, key, negatives)
    query_ids, key_ids = ids
    bfloat16 = (are_bfloat16(query, key), negatives is not None and are_bfloat16(query, negatives))
    query, key = widened(query), widened(key)
    rows, keys = query.shape[0], key.shape[0]
    moments, hardness, margin = _sampling(form)
    row_scale = scale_of_rows(inverse_length(query, dtype) if form.normalize else None, scale, query, dtype)
    key_scale = inverse_length(key, dtype) if form.normalize and form.in_batch else None
    columns = bias if isinstance(bias, Tensor) and bias.ndim == 1 else None
    own = slice(0, rows) if targets is None else targets
    paired = without(key[own] if targets is not None or keys > rows else key, dropped)
    positive = row_scale * _inner(query, paired, dtype)
    if form.normalize:
        positive = positive * (inverse_length(paired, dtype) if key_scale is None else key_scale[own])
    ceiling = None if margin is None else (positive + scale * margin).detach()
    if columns is not None:
        positive = positive + columns[own]
    stats = None
    if form.in_batch:
        row_ids, column_ids = (None, None) if key_ids is None else (query_ids, key_ids[:keys])
        stats = _left_out(dropped, softmax_statistics(
            query, key, row_scale, key_scale, None if columns is None else columns[:keys], targets, row_ids, column_ids,
            ceiling, _kind(targets is None, moments, form.symmetric, bfloat16[0]), hardness, workspace_mib,
        ))  # fmt: skip
    if negatives is not None and negatives.ndim == 3:
        extra = _left_out(dropped, each_statistics(query, negatives, row_scale, form, ceiling, moments, dropped))
        union = extra if stats is None else merged(stats[0], extra, moments, hardness)
        stats = torch.stack([union] if stats is None else [union, *stats[1:]])
    elif negatives is not None:
        negatives = widened(negatives)
        covered = key_ids is not None and key_ids.shape[0] > keys
        row_ids, column_ids = (query_ids, key_ids[keys:]) if covered else (None, None)  # type: ignore[index]
        extra = _left_out(dropped, softmax_statistics(
            query, negatives, row_scale, inverse_length(negatives, dtype) if form.normalize else None,
            None if columns is None else columns[keys:], None, row_ids, column_ids, ceiling,
            _kind(False, moments, bfloat16=bfloat16[1]), hardness, workspace_mib,
        ))  # fmt: skip
        if stats is not None:
            extra = torch.stack([merged(stats[0], extra[0], moments, hardness), *stats[1:]])
        stats = extra
    assert stats is not None
    positive = _left_out(dropped, positive)
    out = row_losses(positive, stats if form.symmetric else stats[0], scale, form)
    if form.symmetric:
        out = out._replace(loss=out.loss.mean(0))
    if bias is not None and columns is None:  # one number for all logits cancels
        out = out._replace(loss=out.loss + 0.0 * bias, lse=out.lse + bias)
    return out._replace(lse=_left_out(dropped, out.lse))


def _left_out(dropped: Tensor | None, rows: Tensor) -> Tensor:
    """[..., M] with 0 for dropped rows: what was NaN there has a gradient of 0 now, and not 0 times NaN."""
    return rows if dropped is None else rows.masked_fill(dropped, 0.0)


def nt_xent_rows(
    view_a: Tensor,
    view_b: Tensor,
    scale: Tensor | float,
    ids: Tensor | None,
    form: SoftmaxForm,
    workspace_mib: float,
    dropped: Tensor | None,
) -> ContrastiveOutput:
    """Row losses [2M]: each view of each sample against all the other views of the batch."""
    dtype = result_dtype(view_a, view_b)
    rows = view_a.shape[0]
    views, lengths = against_themselves(torch.cat((view_a, view_b)), dtype, form.normalize)
    moments, hardness, margin = _sampling(form)
    row_scale = scale_of_rows(lengths, scale, views, dtype)
    partner = torch.arange(2 * rows, device=views.device).roll(rows)
    positive = _inner(views[:rows], views[rows:], dtype).repeat(2) * row_scale
    if lengths is not None:
        positive = positive * lengths.roll(rows)
    ceiling = None if margin is None else (positive + scale * margin).detach()
    both = None if ids is None else ids.repeat(2)
    stats = softmax_statistics(
        views, views, row_scale, lengths, None, partner, both, both, ceiling, "upper" + "+moments" * moments, hardness,
        workspace_mib,
    )  # fmt: skip
    out = row_losses(_left_out(dropped, positive), _left_out(dropped, stats[0]), scale, form)
    return out._replace(lse=_left_out(dropped, out.lse))


def supcon_rows(
    features: Tensor,
    labels: Tensor,
    scale: Tensor | float,
    include_positive: bool,
    normalize: bool,
    return_lse: bool,
    workspace_mib: float,
    dropped: Tensor | None,
) -> ContrastiveOutput:
    """Row losses [M]: log-sum-exp over the other rows minus the mean logit of the row's positives.

    The mean comes from the sum of each label's rows, in O(M D). `top1` is right with `return_lse` only: it takes the
    largest logit of the rows of other labels beside that of all, a second call of the op.
    """
    dtype = result_dtype(features)
    rows, lengths = against_themselves(features, dtype, normalize)
    row_scale = scale_of_rows(lengths, scale, rows, dtype)
    vectors = rows.to(dtype) if lengths is None else rows * lengths[:, None]

    def statistics_of(others: bool) -> tuple[Tensor, ...]:
        ids = None if others else labels
        return softmax_statistics(
            rows, rows, row_scale, lengths, None, None, ids, ids, None, "upper", 0.0, workspace_mib
        )[0].unbind(0)

    lse, most = statistics_of(include_positive)
    ordered = labels.sort().values
    group, end = torch.searchsorted(ordered, labels), torch.searchsorted(ordered, labels, right=True)
    count = (end - group - 1).to(dtype)
    sums = _sums_of_groups(vectors, group)
    mean = scale * (vectors * (sums[group] - vectors)).sum(1) / count.clamp_min(1)
    some = lse != -math.inf
    loss = torch.where(some & (count > 0), lse.masked_fill(~some, 0.0) - mean, torch.zeros_like(mean))
    top1 = most > -math.inf
    if return_lse:
        with torch.no_grad():
            other = statistics_of(not include_positive)[1]
        top1 = most > other if include_positive else other > most
    return ContrastiveOutput(loss, _left_out(dropped, lse), top1 if dropped is None else top1 & ~dropped)


def _sums_of_groups(vectors: Tensor, group: Tensor) -> Tensor:
    """Row g: the sum of the vectors of group g. Always in the same order: index_add is not, on CUDA."""
    if vectors.is_cuda:
        return torch.zeros_like(vectors).index_put((group,), vectors, accumulate=True)
    return torch.zeros_like(vectors).index_add(0, group, vectors)
