"""How a list of layers lies in memory, in plain numbers, for ops and kernels that walk the whole list in one call."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

SIGN_UNIT = 256  # a row of signs is padded to whole units of so many elements, 16 words of 32 bits


def layout_of(features: Sequence[Tensor], targets: Sequence[Tensor], reduction: str) -> list[int]:
    """Of each layer its rank, its sizes, and the strides in which kernels read it and write its gradients.

    They are the strides of the features or, if those leave gaps or overlap, of the targets; if those do too, row-major
    ones. What lies otherwise is copied. With one value a sample, the samples come first in memory too.
    """
    layout: list[int] = []
    for feature, target in zip(features, targets, strict=True):
        shape = feature.shape
        strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
        if not feature.is_contiguous():
            for own in (feature.stride(), target.stride()):
                if _walkable(shape, own, reduction == "none"):
                    strides = list(own)
                    break
        layout += [len(shape), *shape, *strides]
    return layout


def _walkable(shape: Sequence[int], strides: Sequence[int], samples_first: bool) -> bool:
    """The tensor fills its memory without gaps or overlaps."""
    left = [d for d in range(len(shape)) if shape[d] != 1]
    expected, outermost = 1, 0
    while left:  # not sorted by strides, which torch.compile cannot do where they change from call to call
        fitting = [d for d in left if strides[d] == expected]
        if not fitting:
            return False
        outermost = fitting[0]
        expected *= shape[outermost]
        left.remove(outermost)
    return not samples_first or shape[0] == 1 or outermost == 0


def layers_of(layout: list[int]) -> Iterator[tuple[list[int], list[int]]]:
    """(sizes, strides) of each layer."""
    at = 0
    while at < len(layout):
        rank = layout[at]
        yield layout[at + 1 : at + 1 + rank], layout[at + 1 + rank : at + 1 + 2 * rank]
        at += 1 + 2 * rank


def rows_of(shape: Sequence[int], reduction: str) -> tuple[int, int]:
    """How many sums a layer has, and of how many elements."""
    rows = shape[0] if reduction == "none" else 1
    return rows, math.prod(shape[1:] if reduction == "none" else shape)


def sign_words(length: int) -> int:
    """Words of 32 bits for the signs of a row: two bits an element. How they lie there is the kernels' own affair."""
    return (length + SIGN_UNIT - 1) // SIGN_UNIT * (SIGN_UNIT // 16)


def sign_count(layout: list[int], reduction: str) -> int:
    """Words of signs of all layers, one after the other."""
    rows = (rows_of(shape, reduction) for shape, _ in layers_of(layout))
    return sum(n * sign_words(length) for n, length in rows)
