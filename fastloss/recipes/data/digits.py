"""scikit-learn's handwritten digits as a text-to-image data set: real scans, captions from label and measurements."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.checks import check_choice, check_tensor
from .samples import SPLITS

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WEIGHTS = ("thin", "", "bold")
SLANTS = ("leaning left", "upright", "leaning right")

_HELD_OUT = 200  # images in each of val and test
_SPLIT_SEED = 20  # numpy's legacy generator never changes its stream, so this seed fixes the split for good
_MEASURED_AT = 32  # captions do not depend on the size asked for


@dataclass(frozen=True)
class Digits:
    """One split. `weight` and `slant` are :func:`measure` of the 32x32 images, whatever the size of `images`."""

    images: Tensor  # [N, 1, size, size] float32 in [0, 1], ink is 1
    labels: Tensor  # [N] int64
    captions: list[str]
    weight: Tensor  # [N] float32, stroke thickness as a share of the image's side
    slant: Tensor  # [N] float32, horizontal shift per unit of height, > 0 leans right

    def __len__(self) -> int:
        return len(self.labels)


def caption_of(label: int, weight: str = "", slant: str = "upright") -> str:
    """The caption of a digit.

    Example:
        >>> caption_of(7, "bold", "leaning right")
        'a bold handwritten seven leaning right'
    """
    check_choice("label", label, range(10))
    check_choice("weight", weight, WEIGHTS)
    check_choice("slant", slant, SLANTS)
    return " ".join(word for word in ("a", weight, "handwritten", NAMES[label], slant) if word)


def measure(images: Tensor) -> tuple[Tensor, Tensor]:
    """Stroke weight and slant of bright strokes on a dark ground, ``[N,1,S,S]`` in [0, 1]; two ``[N]`` tensors.

    Weight is ``2 area / total variation``, the mean width of a stroke, as a share of the side: a stroke of width w and
    length l has area w l and an outline of 2 l, and the ratio does not depend on its contrast. Slant is the shear that
    the second moments give, ``-mu_xy / mu_yy`` with y downwards: positive when the top leans right. Both are 0 for an
    empty image.

    Example:
        >>> weight, slant = measure(torch.eye(8).flip(0)[None, None])
        >>> slant.item()
        1.0
    """
    check_tensor("images", images, ndim=4)
    if images.shape[1] != 1:
        raise ValueError(f"images: expected [N, 1, S, S], got shape {tuple(images.shape)}")
    images = images.detach().float()
    height, width = images.shape[-2:]
    x, y = (torch.arange(n, dtype=torch.float32, device=images.device) - (n - 1) / 2 for n in (width, height))
    area = images.sum((1, 2, 3))

    padded = F.pad(images, (1, 1, 1, 1))  # a stroke that touches the border has an edge there too
    dx = padded[..., :-1, 1:] - padded[..., :-1, :-1]
    dy = padded[..., 1:, :-1] - padded[..., :-1, :-1]
    variation = (dx * dx + dy * dy).sqrt().sum((1, 2, 3))
    weight = 2 * area / variation.clamp(min=1e-6) / width

    total = area.clamp(min=1e-6)
    ink = images[:, 0]
    mean_x = (ink * x).sum((1, 2)) / total
    mean_y = (ink * y[:, None]).sum((1, 2)) / total
    from_x = x - mean_x[:, None]  # [N, W]
    from_y = y - mean_y[:, None]  # [N, H]
    mu_xy = torch.einsum("nhw,nh,nw->n", ink, from_y, from_x)
    mu_yy = torch.einsum("nhw,nh->n", ink, from_y * from_y)
    return weight, -mu_xy / mu_yy.clamp(min=1e-6)


def upsample(scans: Tensor, size: int) -> Tensor:
    """The 8x8 scans ``[N,1,8,8]``, bicubically enlarged and clamped to [0, 1]."""
    return F.interpolate(scans, size=(size, size), mode="bicubic", align_corners=False).clamp(0, 1)


def split_indices(split: str) -> np.ndarray:
    """The positions in scikit-learn's data set of a split's images: 1397 train, 200 val, 200 test, always the same."""
    check_choice("split", split, SPLITS)
    order = np.random.RandomState(_SPLIT_SEED).permutation(len(_scans()[1]))
    first, second = len(order) - 2 * _HELD_OUT, len(order) - _HELD_OUT
    return {"train": order[:first], "val": order[first:second], "test": order[second:]}[split]


@lru_cache(maxsize=1)
def _scans() -> tuple[Tensor, Tensor]:
    """All 1797 scans ``[1797,1,8,8]`` in [0, 1], and their labels."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn, or fastloss[train]") from error
    data = datasets.load_digits()
    return torch.tensor(data.images / 16, dtype=torch.float32)[:, None], torch.tensor(data.target, dtype=torch.int64)


def _terciles(values: Tensor) -> Tensor:
    """Two bounds, each halfway between neighbouring values, so that rounding cannot move an image across one."""
    ordered = values.sort().values
    cuts = torch.tensor([len(values) // 3, 2 * len(values) // 3])
    return (ordered[cuts - 1] + ordered[cuts]) / 2


@lru_cache(maxsize=1)
def _measured() -> tuple[Tensor, Tensor, list[str]]:
    """Weight, slant and caption of all scans; the words are terciles within the class over the training split."""
    scans, labels = _scans()
    weight, slant = measure(upsample(scans, _MEASURED_AT))
    train = torch.zeros(len(labels), dtype=torch.bool)
    train[torch.from_numpy(split_indices("train"))] = True
    weight_rank, slant_rank = torch.zeros_like(labels), torch.zeros_like(labels)
    for label in range(10):
        own = labels == label
        for values, rank in ((weight, weight_rank), (slant, slant_rank)):
            rank[own] = torch.bucketize(values[own], _terciles(values[own & train]))
    ranks = zip(labels.tolist(), weight_rank.tolist(), slant_rank.tolist(), strict=True)
    return weight, slant, [caption_of(label, WEIGHTS[w], SLANTS[s]) for label, w, s in ranks]


def load_digits(split: str, size: int = 32) -> Digits:
    """A fixed split of scikit-learn's 1,797 handwritten digits, enlarged to ``size x size``, with captions.

    The words "thin" / (none) / "bold" and "leaning left" / "upright" / "leaning right" are the terciles of the measured
    stroke weight and slant among the training images of the same digit.

    Raises:
        ValueError: an unknown split, or a size below 8. ImportError: no scikit-learn.

    Example:
        >>> load_digits("test").images.shape
        torch.Size([200, 1, 32, 32])
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 8:
        raise ValueError(f"size: expected an integer >= 8, got {size!r}")
    indices = torch.from_numpy(split_indices(split))
    scans, labels = _scans()
    weight, slant, captions = _measured()
    return Digits(
        images=upsample(scans[indices], size),
        labels=labels[indices],
        captions=[captions[i] for i in indices.tolist()],
        weight=weight[indices],
        slant=slant[indices],
    )
