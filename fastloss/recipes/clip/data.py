"""Which captions name the same thing, and the classes that images are told apart by."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.digits import NAMES, SLANTS, WEIGHTS, caption_of
from ..data.samples import caption_ids
from .config import DIGITS, GLYPHS, Config


class Classes(NamedTuple):
    """The classes of a zero-shot classification, each with the captions that name it. The class of an image is that of
    its caption."""

    captions: list[str]  # of all classes
    of: Tensor  # [captions] int64: the class of each
    by_caption: dict[str, int]
    number: int


def same_ids(data: Any, captions: list[str]) -> Tensor:
    """(B,) int64, equal where two captions name the same thing: such a pair is not a negative of the loss."""
    same: dict[str, str] = getattr(data, "same_as", {})
    return caption_ids([same.get(caption, caption) for caption in captions])


def zero_shot_classes(config: Config, data: Any, captions: list[str]) -> Classes:
    """Of the digits the ten digits, of glyphs all classes of characters, of other data the captions of the split."""
    if config.data == DIGITS:
        named = {caption_of(i, w, s): NAMES[i] for i in range(len(NAMES)) for w in WEIGHTS for s in SLANTS}
    elif config.data == GLYPHS:
        named = data.same_as
    else:
        named = {caption: caption for caption in captions}
    places = {name: i for i, name in enumerate(dict.fromkeys(named.values()))}
    by_caption = {caption: places[name] for caption, name in named.items()}
    return Classes(list(by_caption), torch.tensor(list(by_caption.values())), by_caption, len(places))


def classes_in_words(config: Config) -> str:
    if config.data == DIGITS:
        return "the ten digits, each named by the mean embedding of its nine captions"
    if config.data == GLYPHS:
        return "all characters of the training, those of one shape in one class, named by their names' mean"
    return "the distinct captions of the split"
