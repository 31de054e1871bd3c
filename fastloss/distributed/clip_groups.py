"""CLIP with groups of a batch whose rows lie on several ranks: each direction against the columns of all of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..contrastive.clip_groups import Found, GroupedClip, Side, directions, grouped_clip_loss
from ..contrastive.groups import sizes as sizes_of_groups
from ..contrastive.ops.softmax_stats import Inputs
from ..core import check_not_empty, full_precision, reduce_rows, result_dtype
from .gathered import statistics_in_pieces
from .losses import _counted, _floats
from .ranks import Meeting, Ranks, needs


def clip_loss(x: GroupedClip, group: Any, exchange: Any) -> Tensor:
    """Both sides and their groups travel. A group may lie on several ranks."""
    ranks = Ranks.of(group, exchange)
    if ranks.size == 1:
        return grouped_clip_loss(x)
    image, text = x.image.embeddings, x.text.embeddings
    same: dict[str, Any] = {
        "loss": "clip_loss with groups", "normalize": x.normalize, "reduction": x.reduction,
        "weights": x.weights is not None, "gradients of": needs(image=image, text=text, scale=x.scale, bias=x.bias),
    }  # fmt: skip
    numbers = {"label_smoothing": x.label_smoothing, **_floats(x.scale, x.bias)}
    travels = {"image": image, "image groups": x.image.groups, "text": text, "text groups": x.text.groups}
    sizes = {"image": image.shape[0], "text": text.shape[0]}
    meeting = ranks.meet(same, numbers, sizes, travels)
    weights, nobody = meeting.shares(x.weights, x.reduction, result_dtype(image, text))
    own = (
        x.image._replace(embeddings=_counted(image, nobody)),
        x.text._replace(embeddings=_counted(text, nobody)),
    )
    x = x._replace(scale=ranks.number(x.scale), bias=ranks.number(x.bias), weights=weights)
    everyone: Any = own
    among: Any = (None, None)
    if meeting.strategy == "gather":
        gathered = meeting.gather(travels | {"image": own[0].embeddings, "text": own[1].embeddings})
        everyone = tuple(Side(gathered[name], gathered[f"{name} groups"]) for name in sizes)
    else:
        among = tuple(
            partial(_in_pieces, meeting=meeting, name=name, wire=wire)
            for name, wire in (("text", text.dtype), ("image", image.dtype))
        )
    counts = meeting.counts
    with full_precision(image):
        of_images, of_texts = directions(own, everyone, x, among)
        if weights is not None or x.reduction == "none":
            rows = reduce_rows((of_images + of_texts) / 2, weights, "none" if x.reduction == "none" else "sum")
            return ranks.reduced(rows, weights, x.reduction, counts)
        images = texts = 1
        if x.reduction == "mean":
            images, texts = counts.total(0), counts.total(1)
            check_not_empty(min(images, texts))
        return ranks.reduced((of_images.sum() / images + of_texts.sum() / texts) / 2, None, "sum", counts)


def _in_pieces(
    x: Inputs,
    row_groups: Tensor,
    column_groups: Tensor,
    label_smoothing: float,
    *,
    meeting: Meeting,
    name: str,
    wire: torch.dtype,
) -> Found:
    """What the family finds among columns, among those of all ranks; the mean of all logits from their sum."""
    x = x._replace(moments=label_smoothing > 0)
    (stats,), total = statistics_in_pieces(x, meeting, name, wire, (row_groups, column_groups))
    everyone = meeting.gather({f"{name} groups": column_groups})[f"{name} groups"]
    count = sizes_of_groups(row_groups, everyone)
    assert total is not None
    mean = total / count.clamp_min(1).to(total.dtype)
    if label_smoothing > 0:
        mean = mean + label_smoothing * (stats[2] / max(sum(meeting.counts_of(name)), 1) - mean)
    return stats[0], mean, count
