"""Data sets of captioned images by name, and batches of them in an order that a seed fixes.

Samples that cannot be used (unreadable image, no caption) are recorded in `dataset.skipped`, named in the log
"fastloss" and left out; only a data set with nothing usable is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...core.checks import check_choice
from .digits import load_digits
from .folder import FolderData
from .glyphs import GlyphsData
from .samples import HELD_OUT, SPLITS, Skipped
from .shards import ShardData

Batch = dict[str, Any]


class DigitsData:
    """A split of the digits, in memory."""

    def __init__(self, split: str, size: int, channels: int):
        digits = load_digits(split, size)
        self.split = split
        self.images = digits.images.expand(-1, channels, -1, -1).contiguous()
        self.labels = digits.labels
        self.captions = digits.captions
        self.skipped = Skipped("digits")

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "caption": self.captions[index]}


def open_dataset(
    spec: str, split: str, size: int, channels: int, held_out: tuple[int, int] = HELD_OUT
) -> DigitsData | GlyphsData | FolderData | ShardData:
    """A split of a data set, whose samples are ``dict(image=[channels, size, size] in [0, 1], caption=str)``.

    Args:
        spec: ``"digits"`` (scikit-learn's, see `digits.py`), ``"glyphs"`` (characters of fonts, see `glyphs.py`),
            ``"folder:PATH"`` (see :class:`FolderData`) or ``"wds:SHARDS"``, e.g. ``"wds:shards"`` or
            ``"wds:shards/train-{0000..0015}.tar"`` (see :class:`ShardData`).
        split: ``"train"``, ``"val"`` or ``"test"``. size: side in pixels, >= 8. channels: 1 or 3.
        held_out: percent of the images in val and in test, where no folder or shard is called so; the splits of
            digits and glyphs are fixed.

    Raises:
        ValueError: a bad argument, no such folder, or no usable sample.

    Example:
        >>> data = open_dataset("digits", "val", size=32, channels=1)
        >>> len(data), tuple(data[0]["image"].shape)
        (200, (1, 32, 32))
    """
    check_choice("split", split, SPLITS)
    check_choice("channels", channels, (1, 3))
    if isinstance(size, bool) or not isinstance(size, int) or size < 8:
        raise ValueError(f"size: expected an integer >= 8, got {size!r}")
    kind, _, where = spec.partition(":")
    if spec == "digits":
        return DigitsData(split, size, channels)
    if spec == "glyphs":
        return GlyphsData(split, size, channels)
    if kind == "folder" and where:
        return FolderData(where, split, size, channels, held_out)
    if kind == "wds" and where:
        return ShardData(where, split, size, channels, held_out)
    raise ValueError(f"data: expected 'digits', 'glyphs', 'folder:PATH' or 'wds:SHARDS', got {spec!r}")


def batches(
    dataset: DigitsData | GlyphsData | FolderData | ShardData,
    batch_size: int,
    seed: int,
    epoch: int,
    device: str | torch.device = "cpu",
    skip: int = 0,
    *,
    num_workers: int = 0,
    shuffle: bool | None = None,
    drop_last: bool | None = None,
) -> Iterator[Batch]:
    """One pass over a data set, as ``dict(image=[B, C, S, S] on device, caption=list of B strings)``.

    The order depends on `seed` and `epoch` alone, so that `skip` (batches already seen of this epoch) resumes exactly;
    shards have to be read and decoded up to there. By default the training split is shuffled and its last incomplete
    batch dropped, and others are neither. `num_workers` are processes for folders and threads for shards.

    Raises:
        ValueError: a bad argument, or too few samples for one batch.

    Example:
        >>> data = open_dataset("digits", "train", size=32, channels=1)
        >>> len(list(batches(data, 64, seed=0, epoch=0)))
        21
    """
    lowest = (("batch_size", batch_size, 1), ("epoch", epoch, 0), ("skip", skip, 0), ("num_workers", num_workers, 0))
    for name, value, low in lowest:
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}")
    device = torch.device(device)
    shuffle = dataset.split == "train" if shuffle is None else shuffle
    drop_last = dataset.split == "train" if drop_last is None else drop_last
    if isinstance(dataset, ShardData):
        samples = dataset.read(seed, epoch, shuffle, threads=num_workers)
        return _shard_batches(samples, batch_size, device, skip, drop_last)
    if drop_last and len(dataset) < batch_size:
        raise too_few(batch_size, len(dataset))
    order = epoch_order(len(dataset), seed, epoch) if shuffle else torch.arange(len(dataset))
    chunks = list(order.split(batch_size))
    if drop_last and len(chunks[-1]) < batch_size:
        chunks.pop()
    return batches_of(dataset, chunks[skip:], device, num_workers)


def batches_of(
    dataset: DigitsData | GlyphsData | FolderData, chunks: Iterable[Tensor], device: torch.device, num_workers: int = 0
) -> Iterator[Batch]:
    """A batch for each tensor of indices."""
    if isinstance(dataset, (DigitsData, GlyphsData)):
        return _memory_batches(dataset, chunks, device)
    return _folder_batches(dataset, chunks, device, num_workers)


def epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """The indices of all samples in the order of an epoch."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(samples, generator=generator)


def too_few(batch_size: int, samples: int) -> ValueError:
    return ValueError(f"batch_size: expected at most the number of samples, {samples}, got {batch_size}")


def _memory_batches(
    dataset: DigitsData | GlyphsData, chunks: Iterable[Tensor], device: torch.device
) -> Iterator[Batch]:
    images = dataset.images = dataset.images.to(device)  # a few MB: kept where they are used
    for chunk in chunks:
        image = images[chunk.to(device)]
        image = image if image.is_floating_point() else image.float() / 255
        yield {"image": image, "caption": [dataset.captions[i] for i in chunk.tolist()]}


class _FolderReader(Dataset):
    """Whole batches by their indices, with what was passed over: workers are processes and keep no count."""

    def __init__(self, dataset: FolderData):
        self.dataset = dataset

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, list[str], list[tuple[str, str]]]:
        images, captions, faults = zip(*(self.dataset.load(i) for i in indices.tolist()), strict=True)
        return torch.stack(images), list(captions), [fault for some in faults for fault in some]


def _folder_batches(
    dataset: FolderData, chunks: Iterable[Tensor], device: torch.device, num_workers: int
) -> Iterator[Batch]:
    pin = device.type == "cuda"
    loader: DataLoader = DataLoader(
        _FolderReader(dataset), batch_size=None, sampler=chunks, num_workers=num_workers, pin_memory=pin
    )
    for images, captions, faults in loader:
        for fault in faults:
            dataset.skipped.add(*fault)
        yield {"image": images.to(device, non_blocking=pin), "caption": captions}


def _shard_batches(
    samples: Iterator[dict[str, Any]], batch_size: int, device: torch.device, skip: int, drop_last: bool
) -> Iterator[Batch]:
    count = 0
    held: list[dict[str, Any]] = []

    def batch() -> Batch:
        return {"image": torch.stack([s["image"] for s in held]).to(device), "caption": [s["caption"] for s in held]}

    for sample in samples:
        count += 1
        held.append(sample)
        if len(held) == batch_size:
            if count > skip * batch_size:
                yield batch()
            held.clear()
    if drop_last and count < batch_size:
        raise too_few(batch_size, count)
    if held and not drop_last and count > skip * batch_size:
        yield batch()
