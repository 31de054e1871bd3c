"""CLIP with groups of a batch whose rows lie on several ranks: each direction against the columns of all of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..contrastive.clip_groups import GroupedClip, Side, directions, grouped_clip_loss
from ..core import check_not_empty, full_precision, reduce_rows, result_dtype
from .losses import _floats
from .ranks import Ranks, needs


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
    gathered, counts = ranks.meet(same, numbers, sizes, travels)
    everyone = (
        Side(gathered["image"], gathered["image groups"]),
        Side(gathered["text"], gathered["text groups"]),
    )
    weights = ranks.shares(x.weights, x.reduction, result_dtype(image, text), counts)
    x = x._replace(scale=ranks.number(x.scale), bias=ranks.number(x.bias), weights=weights)
    with full_precision(image):
        of_images, of_texts = directions((x.image, x.text), everyone, x)
        if weights is not None or x.reduction == "none":
            rows = reduce_rows((of_images + of_texts) / 2, weights, "none" if x.reduction == "none" else "sum")
            return ranks.reduced(rows, weights, x.reduction, counts)
        images = texts = 1
        if x.reduction == "mean":
            images, texts = counts.total(0), counts.total(1)
            check_not_empty(min(images, texts))
        return ranks.reduced((of_images.sum() / images + of_texts.sum() / texts) / 2, None, "sum", counts)
