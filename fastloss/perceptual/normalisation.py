"""How images are brought to what a network was trained on: their range, and a mean and standard deviation a channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.checks import check_number, check_numbers, check_same_length, is_sequence

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class FromImageNet(nn.Module):
    """From ImageNet's normalisation to that of another mean and standard deviation."""

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        exact = torch.promote_types(torch.get_default_dtype(), torch.float32)
        own_mean, own_std, theirs, their_std = (
            torch.tensor(x, dtype=exact).view(1, 3, 1, 1) for x in (mean, std, *IMAGENET)
        )
        self.register_buffer("scale", their_std / own_std, persistent=False)
        self.register_buffer("shift", (theirs - own_mean) / own_std, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale + self.shift).to(x.dtype)  # networks made in another default dtype take that


def numbers_or_none(name: str, values: Any) -> list[float] | None:
    if values is None:
        return None
    return check_numbers(name, values)


def range_of(values: Any) -> tuple[float, float]:
    got = numbers_or_none("input_range", values)
    if got is None or len(got) != 2 or not got[0] < got[1]:
        raise ValueError(f"input_range: expected (low, high) with low < high, got {values!r}")
    return got[0], got[1]


def normalisation(normalize: Any) -> tuple[Any, Any]:
    if isinstance(normalize, bool):
        return IMAGENET
    normalize = normalize.tolist() if hasattr(normalize, "tolist") else normalize  # an array or a tensor
    if not is_sequence(normalize) or len(normalize) != 2:
        raise TypeError(f"normalize: expected True, False or a pair (mean, std), got {normalize!r}")
    return normalize[0], normalize[1]


def affine(input_range: tuple[float, float], mean: Any, std: Any) -> tuple[list[float], list[float]]:
    """`shift` and `scale` of each channel such that (image - shift) / scale is the normalised image."""
    means, stds = numbers_or_none("mean", mean), numbers_or_none("std", std)
    if not means or not stds:
        raise ValueError("normalize: expected one number a channel in mean and std; False is for no normalisation")
    check_same_length("mean", means, "std", stds)
    for i, value in enumerate(stds):
        check_number(f"std[{i}]", value, 0, open_low=True)
    low, width = input_range[0], input_range[1] - input_range[0]
    return [low + width * m for m in means], [width * s for s in stds]
