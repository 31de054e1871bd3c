"""The captions whose images a run shows: held-out ones, some seen in training, and a few over the steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.batches import batches
from ..data.shards import ShardData
from ..data.splits import Splits
from .build import generate
from .config import DIGITS, Config
from .model import Imagen

HELD_OUT, SEEN, FOLLOWED = 12, 4, 3  # rows of a picture
KEPT = 16  # pictures of the progress; of more, every second goes
NEAREST_OF = 2000  # training images among which the nearest one is sought
DIGIT_WORDS = (("bold", "leaning right"), ("thin", "upright"), ("", "leaning left"))


class Examples(NamedTuple):
    """Captions and a real image of each, None where the data have none."""

    captions: list[str]
    real: list[Tensor | None]


def held_out_examples(config: Config, splits: Splits) -> Examples:
    """Of the test split: every digit, or the first captions."""
    data = splits["test"]
    if config.data != DIGITS:
        batch = next(iter(batches(data, HELD_OUT, 0, 0)))
        return Examples(batch["caption"], list(batch["image"].cpu()))
    from ..data.digits import caption_of

    chosen = [caption_of(label, *DIGIT_WORDS[label % 3]) for label in range(10)]
    chosen += [caption_of(7, "bold", "leaning left"), caption_of(7, "thin", "leaning right")]
    return Examples(chosen, real_images(chosen, data))


def real_images(captions: list[str], data: Any) -> list[Tensor | None]:
    """For each caption the first image of the data set that has it, or None."""
    samples = data if isinstance(data, ShardData) else (data[i] for i in range(len(data)))
    found: dict[str, Tensor] = {}
    for sample in samples:
        if sample["caption"] in captions:
            found.setdefault(sample["caption"], sample["image"].cpu())
            if len(found) == len(set(captions)):
                break
    return [found.get(caption) for caption in captions]


def seen_examples(splits: Splits) -> Examples:
    """The first images of the training split."""
    batch = next(iter(batches(splits["train"], SEEN, 0, 0, shuffle=False, drop_last=False)))
    return Examples(batch["caption"], list(batch["image"].cpu()))


def nearest_training_images(images: Tensor, splits: Splits) -> tuple[Tensor, int]:
    """For each image (N, C, S, S) the nearest, by mean absolute difference, of the first `NEAREST_OF` training images;
    and of how many."""
    best = torch.full((len(images),), torch.inf)
    nearest, seen = torch.zeros_like(images), 0
    for batch in batches(splits["train"], 100, 0, 0, shuffle=False, drop_last=False):
        real = batch["image"].cpu()
        distance, at = torch.cdist(images.flatten(1), real.flatten(1), p=1).min(1)
        closer = distance < best
        best, nearest[closer] = torch.where(closer, distance, best), real[at[closer]]
        seen += len(real)
        if seen >= NEAREST_OF:
            break
    return nearest, seen


class Progress:
    """Images of the first held-out captions, from one z, at the validations of a run."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.captions: list[str] = []
        self.images: list[Tensor] = []  # uint8 (FOLLOWED, C, S, S) each

    def add(self, step: int, model: Imagen, config: Config, splits: Splits) -> None:
        if not self.captions:
            self.captions = held_out_examples(config, splits).captions[:FOLLOWED]
        images = generate(model, self.captions, seed=0).clamp(0, 1).mul(255).round().byte().cpu()
        self.steps, self.images = [*self.steps, step], [*self.images, images]
        if len(self.steps) > KEPT:
            self.steps, self.images = self.steps[::2], self.images[::2]

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "captions": self.captions, "images": self.images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
