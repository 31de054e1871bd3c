"""CLIP with groups of a batch whose rows lie on several ranks: own images against the texts of all of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..contrastive.clip_groups import Found, GroupedClip, directions, grouped_clip_loss
from ..contrastive.groups import sizes as sizes_of_groups
from ..contrastive.ops.softmax_stats import Inputs
from ..core import check_not_empty, full_precision, reduce_rows, result_dtype
from .gathered import statistics_in_pieces, statistics_of_gathered
from .losses import _counted, _floats
from .pieces import Groups
from .ranks import Meeting, Ranks, dtypes, needs


def clip_loss(x: GroupedClip, group: Any, exchange: Any) -> Tensor:
    """The texts travel, and the groups of both sides. A group may lie on several ranks."""
    ranks = Ranks.of(group, exchange)
    if ranks.size == 1:
        return grouped_clip_loss(x)
    image, text = x.image.embeddings, x.text.embeddings
    same: dict[str, Any] = {
        "loss": "clip_loss with groups", "normalize": x.normalize, "reduction": x.reduction,
        "gradients of": needs(image=image, text=text, scale=x.scale, bias=x.bias),
        **dtypes(image=image, weights=x.weights),
    }  # fmt: skip
    numbers = {"label_smoothing": x.label_smoothing, **_floats(x.scale, x.bias)}
    small = {"image groups": x.image.groups, "text groups": x.text.groups}
    sizes = {"image": image.shape[0], "text": text.shape[0]}
    meeting = ranks.meet(same, numbers, sizes, {"text": text} | small)
    weights, nobody = meeting.shares(x.weights, x.reduction, result_dtype(image, text))
    own = x.image._replace(embeddings=_counted(image, nobody))
    columns = x.text._replace(embeddings=_counted(text, nobody))
    x = x._replace(scale=ranks.number(x.scale), bias=ranks.number(x.bias), weights=weights)
    gathered = meeting.gather(({"text": columns.embeddings} if meeting.strategy == "gather" else {}) | small)
    if "text" in gathered:
        columns = columns._replace(embeddings=gathered["text"])
    among = partial(
        _among_all, everyone=(gathered["image groups"], gathered["text groups"]), meeting=meeting, wire=text.dtype
    )
    counts = meeting.counts
    with full_precision(image):
        of_images, of_texts = directions(own, columns, x, among)
        if weights is not None or x.reduction == "none":
            rows = reduce_rows((of_images + of_texts) / 2, weights, "none" if x.reduction == "none" else "sum")
            return ranks.reduced(rows, weights, x.reduction, counts)
        images = texts = 1
        if x.reduction == "mean":
            images, texts = counts.total(0), counts.total(1)
            check_not_empty(min(images, texts))
        return ranks.reduced((of_images.sum() / images + of_texts.sum() / texts) / 2, None, "sum", counts)


def _among_all(
    x: Inputs,
    image_groups: Tensor,
    text_groups: Tensor,
    label_smoothing: float,
    *,
    everyone: tuple[Tensor, Tensor],
    meeting: Meeting,
    wire: torch.dtype,
) -> list[Found]:
    """What the family finds of own images and texts, among those of all ranks: `everyone`'s groups. The mean of all
    logits comes from their sum."""
    x, groups = x._replace(moments=label_smoothing > 0), Groups(image_groups, everyone[1])
    if meeting.strategy == "gather":
        stats = statistics_of_gathered(x, meeting, "text", groups)
    else:
        stats = statistics_in_pieces(x, meeting, "text", wire, groups)
    found = []
    for of_side, own, other in zip(stats, (image_groups, text_groups), everyone[::-1], strict=True):
        count = sizes_of_groups(own, other)
        mean = of_side[-1] / count.clamp_min(1).to(of_side.dtype)
        if label_smoothing > 0:
            mean = mean + label_smoothing * (of_side[2] / max(other.shape[0], 1) - mean)
        found.append(Found(of_side[0], mean, count))
    return found
