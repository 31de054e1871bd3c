"""Quality of generated digits: an independent judge, diversity over z, and what the caption's words change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.checks import check_tensor
from ..data.digits import SLANTS, WEIGHTS, Digits, caption_of, load_digits, measure

Generate = Callable[[Sequence[str], int], Tensor]

_SIZE = 16
_GRID_SEEDS = 3


class DigitJudge:
    """A support vector machine on the pixels of the real training images: nothing that the generator is trained with.

    Example:
        >>> test = load_digits("test")
        >>> DigitJudge().accuracy(test.images, test.labels) > 0.97
        True
    """

    def __init__(self) -> None:
        from sklearn.svm import SVC

        real = load_digits("train")
        self._svm = SVC(C=10, gamma="scale").fit(self._pixels(real.images), real.labels.numpy())

    def predict(self, images: Tensor) -> Tensor:
        """The digit seen in each of `images` [N, 1, S, S] in [0, 1]: [N] int64, on the CPU."""
        check_tensor("images", images, ndim=4)
        if images.shape[1] != 1 or len(images) == 0:
            raise ValueError(f"images: expected [N, 1, S, S] with N >= 1, got shape {tuple(images.shape)}")
        if not bool(torch.isfinite(images).all()):
            raise ValueError("images: expected finite values, got NaN or infinity")
        return torch.as_tensor(self._svm.predict(self._pixels(images)), dtype=torch.int64)

    def accuracy(self, images: Tensor, labels: Tensor | Sequence[int]) -> float:
        """The share of the images in which the judge sees the digit of `labels`."""
        wanted = torch.as_tensor(labels).cpu()
        if wanted.shape != (len(images),):
            raise ValueError(f"labels: expected one per image, ({len(images)},), got shape {tuple(wanted.shape)}")
        return (self.predict(images) == wanted).float().mean().item()

    @staticmethod
    def _pixels(images: Tensor):
        small = F.interpolate(images.detach().float().cpu(), size=(_SIZE, _SIZE), mode="area")
        return small.clamp(0, 1).flatten(1).numpy()


@lru_cache(maxsize=1)
def judge() -> DigitJudge:
    """The judge, fitted once in a process."""
    return DigitJudge()


def quality(generate: Generate, split: str = "test", seed: int = 0) -> dict[str, float]:
    """Figures for a generator of digits, ``generate(captions, seed) -> [N, 1, S, S]`` in [0, 1].

    Two seeds draw two z for each caption of the split, three more for each of the 90 captions there are.

    Returns:
        ``accuracy``: share of the split's captions whose image the judge reads as the right digit (both seeds).
        ``grid_accuracy``: the same over the 90 captions, which weighs all digits and words alike.
        ``worst_digit_accuracy``: over all these images, that of the digit that does worst.
        ``z_diversity``: mean |difference| of two images of one caption; ``z_diversity_real``: that of real images.
        ``weight_effect``: mean stroke weight (share of the side) for "bold" less that for "thin", digits and slants
        alike; ``slant_effect``: mean slant for "leaning right" less that for "leaning left"; each with ``..._real``.

    Example:
        >>> figures = quality(lambda captions, seed: torch.zeros(len(captions), 1, 32, 32))
        >>> figures["z_diversity"]
        0.0
    """
    data = load_digits(split)
    seeds = range((2 + _GRID_SEEDS) * seed, (2 + _GRID_SEEDS) * (seed + 1))  # another `seed` shares none of them
    first, second = (_generated(generate, data.captions, s) for s in seeds[:2])
    combos = list(product(range(10), WEIGHTS, SLANTS))
    captions = [caption_of(*combo) for combo in combos]
    grid = torch.stack([_generated(generate, captions, s) for s in seeds[2:]])

    grid_labels = torch.tensor([label for label, _, _ in combos]).repeat(_GRID_SEEDS)
    seen = judge().predict(torch.cat([first, second, grid.flatten(0, 1)]))
    labels = torch.cat([data.labels, data.labels, grid_labels])
    right = (seen == labels).float()
    on_split = 2 * len(data)

    weight, slant = measure(grid.flatten(0, 1))
    shape = (_GRID_SEEDS, 10, len(WEIGHTS), len(SLANTS))
    weight = weight.view(shape).mean((0, 1, 3))  # one per word
    slant = slant.view(shape).mean((0, 1, 2))
    return {
        "accuracy": right[:on_split].mean().item(),
        "grid_accuracy": right[on_split:].mean().item(),
        "worst_digit_accuracy": min(right[labels == label].mean().item() for label in range(10)),
        "z_diversity": (first - second).abs().mean().item(),
        "weight_effect": (weight[-1] - weight[0]).item(),
        "slant_effect": (slant[-1] - slant[0]).item(),
        **_real_figures(),
    }


def counts(split: str = "test") -> dict[str, int]:
    """From how many images each figure of :func:`quality` is, pairs of images for `z_diversity`, and for the worst
    digit the fewest that a digit has."""
    data = load_digits(split)
    grid = _GRID_SEEDS * 10 * len(WEIGHTS) * len(SLANTS)
    each = min(2 * int((data.labels == digit).sum()) for digit in range(10)) + grid // 10
    return {
        "accuracy": 2 * len(data),
        "grid_accuracy": grid,
        "worst_digit_accuracy": each,
        "z_diversity": len(data),
        "weight_effect": 2 * grid // 3,
        "slant_effect": 2 * grid // 3,
    }


@lru_cache(maxsize=1)
def _real_figures() -> dict[str, float]:
    """What the real training images give, to compare with: they set the captions, so this is what is to be learnt."""
    data = load_digits("train")
    words = [_indices(data, combo) for combo in product(range(10), WEIGHTS, SLANTS)]
    shape = (10, len(WEIGHTS), len(SLANTS))
    weight = torch.stack([data.weight[own].mean() for own in words]).view(shape).mean((0, 2))
    slant = torch.stack([data.slant[own].mean() for own in words]).view(shape).mean((0, 1))
    # each image beside the next one of its caption, as one z beside another
    pairs = [(data.images[own] - data.images[own].roll(1, 0)).abs().mean() for own in words]
    return {
        "z_diversity_real": torch.stack(pairs).mean().item(),
        "weight_effect_real": (weight[-1] - weight[0]).item(),
        "slant_effect_real": (slant[-1] - slant[0]).item(),
    }


def _indices(data: Digits, combo: tuple[int, str, str]) -> list[int]:
    caption = caption_of(*combo)
    return [i for i, text in enumerate(data.captions) if text == caption]


def _generated(generate: Generate, captions: list[str], seed: int) -> Tensor:
    """Images for the captions, checked, on the CPU in float32."""
    images = generate(captions, seed)
    check_tensor("generate(...)", images, ndim=4)
    if len(images) != len(captions) or images.shape[1] != 1 or images.shape[2] != images.shape[3]:
        raise ValueError(
            f"generate(...): expected images [{len(captions)}, 1, S, S], one per caption, got {tuple(images.shape)}"
        )
    return images.detach().float().cpu().clamp(0, 1)
