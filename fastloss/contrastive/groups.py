"""Groups of images and texts: every image of a group and every text of it are a positive pair."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_integers

GROUPS = ("image_groups", "text_groups")  # the arguments


def checked_both(
    names: tuple[str, str], given: tuple[Tensor | None, Tensor | None], image: Tensor, text: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Integers of the images and of the texts as int64, both or neither: what is given alone serves both."""
    rows, columns = image.shape[0], text.shape[0]
    of_images, of_texts = given
    for name, integers, count in zip(names, given, (rows, columns), strict=True):
        if integers is not None:
            check_integers(name, integers, (count,), image)
        elif rows != columns and (of_images is None) != (of_texts is None):
            other = names[1 - names.index(name)]
            raise ValueError(f"{name}: expected it beside {other}, as there are {rows} images, {columns} texts")
    one = of_texts if of_images is None else of_images
    two = of_images if of_texts is None else of_texts
    return (None, None) if one is None or two is None else (one.long(), two.long())


def check_alone(names: tuple[str, str], given: tuple[Tensor | None, ...], **others: bool) -> bool:
    """Whether there are groups; then none of the `others` may be asked for."""
    there = [name for name, groups in zip(names, given, strict=True) if groups is not None]
    for name, asked in others.items():
        if there and asked:
            raise ValueError(f"{name}: expected it without {there[0]}, whose equal groups are the positives")
    return bool(there)


def sizes(groups: Tensor, among: Tensor, counted: Tensor | None = None) -> Tensor:
    """[M]: how many of `among` [N] are of each of the `groups` [M]. Of those only the `counted` [N] (bool) count.

    By sorting, in O((M + N) log N) and without waiting for a device, whatever the integers are.
    """
    ordered, order = among.sort()
    first, end = torch.searchsorted(ordered, groups), torch.searchsorted(ordered, groups, right=True)
    if counted is None:
        return end - first
    before = torch.nn.functional.pad(counted[order].long().cumsum(0), (1, 0))
    return before[end] - before[first]


def sums_of_groups(vectors: Tensor, group: Tensor) -> Tensor:
    """Row g: the sum of the vectors of group g. Always in the same order: index_add is not, on CUDA."""
    if vectors.is_cuda:
        return torch.zeros_like(vectors).index_put((group,), vectors, accumulate=True)
    return torch.zeros_like(vectors).index_add(0, group, vectors)


def sum_of_group(vectors: Tensor, groups: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """[M, D]: the sum of the `vectors` [N, D] of each `wanted` group [M], 0 where there are none; and how many."""
    ordered = groups.sort().values
    first, end = torch.searchsorted(ordered, wanted), torch.searchsorted(ordered, wanted, right=True)
    count = end - first
    if vectors.shape[0] == 0:
        return vectors.new_zeros(wanted.shape[0], vectors.shape[1]), count
    sums = sums_of_groups(vectors, torch.searchsorted(ordered, groups))
    return sums[first.clamp_max(vectors.shape[0] - 1)].masked_fill((count == 0)[:, None], 0.0), count
