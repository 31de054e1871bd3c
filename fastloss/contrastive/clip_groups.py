"""CLIP with groups: several positives a row and a column, in O((M + N) D) beside the log-sum-exps of both directions.

    loss_i = log sum_j exp(s_ij) - mean_{j in P_i} s_ij         P_i: the texts of image i's group; texts alike

The mean of the logits is the logit of the group's mean text, so that no pair is looked at beyond the statistics, which
both directions have from the same similarities (:mod:`blocks`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..core import check_not_empty, full_precision, reduce_rows, result_dtype
from .blocks import of_both
from .checks import counted, dropped_rows
from .embeddings import are_bfloat16, inverse_norm, scale_of_rows, upcast_on_cpu
from .groups import sum_of_group
from .ops.softmax_stats import Inputs


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


class Found(NamedTuple):
    """Of the rows of one direction, [M] each."""

    lse: Tensor
    mean: Tensor  # of the positives' logits
    number: Tensor  # of the positives

    def losses(self, dropped: Tensor | None) -> Tensor:
        """[M], 0 without gradient for a row without a positive, and for `dropped` ones: 0 times NaN would be NaN."""
        left_out = self.number == 0 if dropped is None else (self.number == 0) | dropped
        return (self.lse - self.mean).masked_fill(left_out, 0.0)


def found_here(x: Inputs, image_groups: Tensor, text_groups: Tensor, label_smoothing: float) -> list[Found]:
    """Of the images among the texts, and of the texts among the images."""
    dtype, found = x.row_scale.dtype, []
    images = x.query.to(dtype) * x.row_scale[:, None]
    texts = x.key.to(dtype) if x.column_scale is None else x.key * x.column_scale[:, None]
    sides = (images, image_groups), (texts, text_groups)
    for stats, (rows, of_rows), (columns, of_columns) in zip(of_both(x), sides, sides[::-1], strict=True):
        target, count = means_of_groups(columns, of_columns, of_rows)
        if label_smoothing > 0:
            target = target + label_smoothing * (columns.sum(0) / max(columns.shape[0], 1) - target)
        found.append(Found(stats[0], (rows * target).sum(1), count))
    return found


def means_of_groups(vectors: Tensor, groups: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """[M, D]: the mean of the `vectors` [N, D] of each `wanted` group [M], 0 where there are none; and how many."""
    sums, count = sum_of_group(vectors, groups, wanted)
    return sums / count.clamp_min(1).to(vectors.dtype)[:, None], count


def directions(
    image: Side, text: Side, x: GroupedClip, among: Callable[..., list[Found]] = found_here
) -> tuple[Tensor, Tensor]:
    """The losses of the images [M] and of the texts [N]. `among` looks among those of other ranks too."""
    dtype = result_dtype(image.embeddings, text.embeddings)
    bfloat16 = are_bfloat16(image.embeddings, text.embeddings)
    rows, columns = upcast_on_cpu(image.embeddings), upcast_on_cpu(text.embeddings)
    column_scale = inverse_norm(columns, dtype) if x.normalize else None
    row_scale = scale_of_rows(inverse_norm(rows, dtype) if x.normalize else None, x.scale, rows, dtype)
    inputs = Inputs(
        rows, columns, row_scale, column_scale, None, None, None, None, None,
        False, True, False, False, bfloat16, False, 0.0, x.workspace_mib,
    )  # fmt: skip
    dropped = dropped_rows(x.weights)
    found = among(inputs, image.groups, text.groups, x.label_smoothing)
    of_images, of_texts = (direction.losses(dropped) for direction in found)
    return of_images if x.bias is None else of_images + 0.0 * x.bias, of_texts


def grouped_clip_loss(x: GroupedClip) -> Tensor:
    dropped = dropped_rows(x.weights)
    sides = (
        Side(counted(x.image.embeddings, dropped), x.image.groups),
        x.text._replace(embeddings=counted(x.text.embeddings, dropped)),
    )
    with full_precision(x.image.embeddings):
        of_images, of_texts = directions(*sides, x)
        if x.weights is not None or x.reduction == "none":
            return reduce_rows((of_images + of_texts) / 2, x.weights, x.reduction)
        if x.reduction == "mean":
            check_not_empty(min(of_images.shape[0], of_texts.shape[0]))
        return (reduce_rows(of_images, None, x.reduction) + reduce_rows(of_texts, None, x.reduction)) / 2
