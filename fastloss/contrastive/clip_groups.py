"""CLIP with groups: several positives a row and a column, in O((M + N) D) beside the log-sum-exps of rows.

    loss_i = log sum_j exp(s_ij) - mean_{j in P_i} s_ij         P_i: the texts of image i's group; texts alike

The mean of the logits is the logit of the group's mean text, so that no pair is looked at beyond the statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..core import check_not_empty, full_precision, reduce_rows, result_dtype
from .checks import counted, dropped_rows
from .embeddings import are_bfloat16, inverse_norm, scale_of_rows, upcast_on_cpu
from .groups import sum_of_group
from .ops.softmax_stats import Inputs, softmax_statistics


class Side(NamedTuple):
    """Embeddings with the integers of their groups."""

    embeddings: Tensor  # [M, D]
    groups: Tensor  # [M] int64


class GroupedClip(NamedTuple):
    """The checked arguments of :func:`clip_loss` with groups."""

    image: Side
    text: Side
    scale: Tensor | float
    bias: Tensor | float | None  # cancels
    weights: Tensor | None  # [M], then there are as many texts
    normalize: bool
    label_smoothing: float
    reduction: str
    workspace_mib: float


def check_paired(image: Tensor, text: Tensor, weights: Tensor | None, reduction: str) -> None:
    """What is one number a pair needs pairs."""
    rows, columns = image.shape[0], text.shape[0]
    for name, asked in (("weights", weights is not None), ("reduction='none'", reduction == "none")):
        if asked and rows != columns:
            raise ValueError(f"{name}: expected as many texts as images, got {rows} images, {columns} texts")


Found = tuple[Tensor, Tensor, Tensor]  # of rows [M]: log-sum-exp, mean logit of the positives, how many these are


def rows_against(
    own: Side, other: Side, x: GroupedClip, dropped: Tensor | None, among: Callable[..., Found] | None = None
) -> Tensor:
    """The losses [M] of `own` rows against the other side's; 0 without gradient for a row without a positive.

    Of `dropped` rows [M] nothing arrives in a sum over rows. `among` looks among the columns of other ranks too.
    """
    dtype = result_dtype(own.embeddings, other.embeddings)
    bfloat16 = are_bfloat16(own.embeddings, other.embeddings)
    rows, columns = upcast_on_cpu(own.embeddings), upcast_on_cpu(other.embeddings)
    column_scale = inverse_norm(columns, dtype) if x.normalize else None
    row_scale = scale_of_rows(inverse_norm(rows, dtype) if x.normalize else None, x.scale, rows, dtype)
    inputs = Inputs(
        rows, columns, row_scale, column_scale, None, None, None, None, None,
        False, False, False, False, bfloat16, False, 0.0, x.workspace_mib,
    )  # fmt: skip
    lse, mean, count = (_among if among is None else among)(inputs, own.groups, other.groups, x.label_smoothing)
    left_out = count == 0 if dropped is None else (count == 0) | dropped
    return (lse - mean).masked_fill(left_out, 0.0)


def _among(x: Inputs, row_groups: Tensor, column_groups: Tensor, label_smoothing: float) -> Found:
    dtype = x.row_scale.dtype
    (stats,) = softmax_statistics(x)
    vectors = x.key.to(dtype) if x.column_scale is None else x.key * x.column_scale[:, None]
    target, count = means_of_groups(vectors, column_groups, row_groups)
    if label_smoothing > 0:
        target = target + label_smoothing * (vectors.sum(0) / max(vectors.shape[0], 1) - target)
    return stats[0], x.row_scale * (x.query.to(dtype) * target).sum(1), count


def means_of_groups(vectors: Tensor, groups: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """[M, D]: the mean of the `vectors` [N, D] of each `wanted` group [M], 0 where there are none; and how many."""
    sums, count = sum_of_group(vectors, groups, wanted)
    return sums / count.clamp_min(1).to(vectors.dtype)[:, None], count


def directions(
    own: tuple[Side, Side],
    everyone: tuple[Side, Side],
    x: GroupedClip,
    among: tuple[Callable[..., Found] | None, Callable[..., Found] | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """The losses of the `own` images [M] against everyone's texts, and of the own texts [N] against all images. `among`
    looks among texts and images where everyone's are not there."""
    dropped = dropped_rows(x.weights)
    of_images = rows_against(own[0], everyone[1], x, dropped, among[0])
    of_texts = rows_against(own[1], everyone[0], x, dropped, among[1])
    if x.bias is not None:
        of_images = of_images + 0.0 * x.bias
    return of_images, of_texts


def grouped_clip_loss(x: GroupedClip) -> Tensor:
    dropped = dropped_rows(x.weights)
    sides = (
        Side(counted(x.image.embeddings, dropped), x.image.groups),
        x.text._replace(embeddings=counted(x.text.embeddings, dropped)),
    )
    with full_precision(x.image.embeddings):
        of_images, of_texts = directions(sides, sides, x)
        if x.weights is not None or x.reduction == "none":
            return reduce_rows((of_images + of_texts) / 2, x.weights, x.reduction)
        if x.reduction == "mean":
            check_not_empty(min(of_images.shape[0], of_texts.shape[0]))
        return (reduce_rows(of_images, None, x.reduction) + reduce_rows(of_texts, None, x.reduction)) / 2
