"""How well the embeddings of images and texts meet: zero-shot classification, and retrieval both ways."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.batches import batches
from .config import Config
from .data import same_ids, zero_shot_classes
from .model import TwoEncoders

PAIRS = 8192  # of a split that are looked at
_ROWS = 1024  # embedded at a time, and compared with all others at a time
FIVE = 5


class Figure(NamedTuple):
    meaning: str
    share: bool = True


FIGURES = {
    "score": Figure("mean of top1, caption_recall1 and image_recall1; what the best checkpoint goes by", share=False),
    "top1": Figure("images whose class is the nearest of all classes"),
    "top5": Figure("images whose class is among the five nearest"),
    "caption_recall1": Figure("images whose nearest caption of the split is theirs or one of the same thing"),
    "caption_recall5": Figure("the same among the five nearest captions"),
    "image_recall1": Figure("captions whose nearest image of the split shows them"),
    "image_recall5": Figure("the same among the five nearest images"),
}


class Embedded(NamedTuple):
    """The pairs of a split, at most PAIRS."""

    images: Tensor  # [N, C, S, S], on the CPU
    captions: list[str]
    ids: Tensor  # [N] int64, equal for captions of the same thing
    image: Tensor  # [N, E]
    text: Tensor  # [distinct captions, E]
    texts: list[str]  # the distinct captions
    text_ids: Tensor  # [distinct captions]


@torch.no_grad()
def embed_split(model: TwoEncoders, config: Config, data: Any) -> Embedded:
    """The embeddings of a split, in its order.

    Raises:
        ValueError: the split is empty.
    """
    device = model.log_scale.device
    training = model.training
    model.eval()
    images, captions, image = [], list[str](), []
    for batch in islice(batches(data, _ROWS, 0, 0, device), PAIRS // _ROWS):
        with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
            image.append(model.embed_images(batch["image"]))
        images.append(batch["image"].cpu())
        captions += batch["caption"]
    if not captions:
        raise ValueError(f"data: the {data.split} split of {config.data} is empty")
    texts = list(dict.fromkeys(captions))
    text = embed_captions(model, config, texts)
    model.train(training)
    ids, text_ids = (same_ids(data, some).to(device) for some in (captions, texts))
    return Embedded(torch.cat(images), captions, ids, torch.cat(image), text, texts, text_ids)


@torch.no_grad()
def embed_captions(model: TwoEncoders, config: Config, captions: list[str]) -> Tensor:
    """[N, E] of length 1."""
    device = model.log_scale.device
    parts = [captions[at : at + _ROWS] for at in range(0, len(captions), _ROWS)]
    with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
        return torch.cat([model.embed_tokens(model.tokens(part)) for part in parts])


@torch.no_grad()
def evaluate(model: TwoEncoders, config: Config, data: Any) -> dict[str, float]:
    """Figures of a split by the names of FIGURES; `n` and `n_NAME` say from how many images or captions each is, and
    `classes`, `captions` among how many classes and captions it chose."""
    split = embed_split(model, config, data)
    classes = zero_shot_classes(config, data, split.texts)
    names = embed_captions(model, config, classes.captions)
    sums = names.new_zeros(classes.number, names.shape[1]).index_add_(0, classes.of.to(names.device), names)
    labels = torch.tensor([classes.by_caption[caption] for caption in split.captions], device=names.device)
    indices = torch.arange(classes.number, device=names.device)
    figures = _hits("top", split.image, F.normalize(sums, dim=1), labels, indices)
    figures |= _hits("caption_recall", split.image, split.text, split.ids, split.text_ids)
    figures |= _hits("image_recall", split.text, split.image, split.text_ids, split.ids)
    figures["score"] = (figures["top1"] + figures["caption_recall1"] + figures["image_recall1"]) / 3
    counts = {"n": len(split.captions), "classes": classes.number, "captions": len(split.texts)}
    return figures | counts | {f"n_image_recall{k}": len(split.texts) for k in (1, FIVE)}


def _hits(name: str, queries: Tensor, keys: Tensor, wanted: Tensor, ids: Tensor) -> dict[str, float]:
    """The shares of queries with a key of their id as the nearest, and among the five nearest."""
    found = torch.cat([wanted[rows, None] == ids[nearest] for rows, nearest in nearest_keys(queries, keys)])
    shares = {1: found[:, 0], FIVE: found.any(1)}
    return {f"{name}{k}": share.float().mean().item() for k, share in shares.items()}


def nearest_keys(queries: Tensor, keys: Tensor, most: int = FIVE) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows of the queries at a time, and the places [rows, at most `most`] of their nearest keys."""
    for rows in torch.arange(len(queries), device=queries.device).split(_ROWS):
        yield rows, (queries[rows] @ keys.T).topk(min(most, len(keys)), dim=1).indices
