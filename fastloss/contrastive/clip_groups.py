"""CLIP with groups: several positives a row and a column, in O((M + N) D) beside the log-sum-exps of rows.

    loss_i = log sum_j exp(s_ij) - mean_{j in P_i} s_ij         P_i: the texts of image i's group; texts alike

The mean of the logits is the logit of the group's mean text, so that no pair is looked at beyond the statistics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core import check_not_empty, full_precision, reduce_rows, result_dtype
from .checks import counted, dropped_rows
from .embeddings import are_bfloat16, inverse_norm, scale_of_rows, upcast_on_cpu
from .groups import sums_of_groups
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


def rows_against(own: Side, other: Side, x: GroupedClip, dropped: Tensor | None) -> Tensor:
    """The losses [M] of `own` rows against the other side's; 0 without gradient for a row without a positive.

    Of `dropped` rows [M] nothing arrives in a sum over rows.
    """
    dtype = result_dtype(own.embeddings, other.embeddings)
    bfloat16 = are_bfloat16(own.embeddings, other.embeddings)
    rows, columns = upcast_on_cpu(own.embeddings), upcast_on_cpu(other.embeddings)
    column_scale = inverse_norm(columns, dtype) if x.normalize else None
    row_scale = scale_of_rows(inverse_norm(rows, dtype) if x.normalize else None, x.scale, rows, dtype)
    (stats,) = softmax_statistics(Inputs(
        rows, columns, row_scale, column_scale, None, None, None, None, None,
        False, False, False, False, bfloat16, 0.0, x.workspace_mib,
    ))  # fmt: skip
    vectors = columns.to(dtype) if column_scale is None else columns * column_scale[:, None]
    target, count = means_of_groups(vectors, other.groups, own.groups)
    if x.label_smoothing > 0:
        target = target + x.label_smoothing * (vectors.sum(0) / max(vectors.shape[0], 1) - target)
    loss = stats[0] - row_scale * (rows.to(dtype) * target).sum(1)
    left_out = count == 0 if dropped is None else (count == 0) | dropped
    return loss.masked_fill(left_out, 0.0)


def means_of_groups(vectors: Tensor, groups: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """[M, D]: the mean of the `vectors` [N, D] of each `wanted` group [M], 0 where there are none; and how many."""
    ordered = groups.sort().values
    first, end = torch.searchsorted(ordered, wanted), torch.searchsorted(ordered, wanted, right=True)
    count = end - first
    if vectors.shape[0] == 0:
        return vectors.new_zeros(wanted.shape[0], vectors.shape[1]), count
    sums = sums_of_groups(vectors, torch.searchsorted(ordered, groups))
    means = sums[first.clamp_max(vectors.shape[0] - 1)] / count.clamp_min(1).to(vectors.dtype)[:, None]
    return means.masked_fill((count == 0)[:, None], 0.0), count


def directions(own: tuple[Side, Side], everyone: tuple[Side, Side], x: GroupedClip) -> tuple[Tensor, Tensor]:
    """The losses of the `own` images [M] against everyone's texts, and of the own texts [N] against all images."""
    dropped = dropped_rows(x.weights)
    of_images = rows_against(own[0], everyone[1], x, dropped)
    of_texts = rows_against(own[1], everyone[0], x, dropped)
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
