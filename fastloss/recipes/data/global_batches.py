"""The batches of a training, shared by its ranks: which samples one has follows from seed and step alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .batches import Batch, DigitsData, batches_of, epoch_order, too_few
from .folder import FolderData
from .glyphs import GlyphsData
from .lanes import Lanes
from .shards import ShardData


def global_batches(
    dataset: DigitsData | GlyphsData | FolderData | ShardData,
    batch_size: int,
    seed: int,
    step: int = 0,
    device: str | torch.device = "cpu",
    *,
    own: range | None = None,
) -> Iterator[Batch]:
    """Batches for ever, from that of `step` on, as ``dict(image=[b, C, S, S] on device, caption=list of b strings,
    row=[b] int64, id=list of b)``.

    `own` are the places in the global batch of this rank's rows, as :meth:`World.own` gives them; None: all of them.
    `row` are these, and `id` tells the samples of the data set apart: numbers, or names in shards. A data set with a
    length is shuffled anew each epoch, whose last incomplete batch is dropped; of shards see `lanes.py`.

    Raises:
        ValueError: too few samples for one batch.

    Example:
        >>> data = open_dataset("digits", "train", size=32, channels=1)
        >>> next(global_batches(data, 64, seed=0, step=1000, own=range(16, 32)))["image"].shape
        torch.Size([16, 1, 32, 32])
    """
    own = range(batch_size) if own is None else own
    device = torch.device(device)
    rows = torch.arange(own.start, own.stop, device=device)
    if isinstance(dataset, ShardData):
        return _of_shards(Lanes(dataset, seed), batch_size, step, own, rows)
    if len(dataset) < batch_size:
        raise too_few(batch_size, len(dataset))
    return _by_indices(dataset, batch_size, seed, step, own, rows)


def batch_indices(samples: int, batch_size: int, seed: int, step: int) -> Iterator[Tensor]:
    """The indices [batch_size] of the samples in each global batch, from that of `step` on, for ever."""
    per_epoch = samples // batch_size
    epoch, place = divmod(step, per_epoch)
    while True:
        order = epoch_order(samples, seed, epoch)
        for at in range(place, per_epoch):
            yield order[at * batch_size : (at + 1) * batch_size]
        epoch, place = epoch + 1, 0


def _by_indices(
    dataset: DigitsData | GlyphsData | FolderData, batch_size: int, seed: int, step: int, own: range, rows: Tensor
) -> Iterator[Batch]:
    indices = batch_indices(len(dataset), batch_size, seed, step)
    said = batch_indices(len(dataset), batch_size, seed, step)
    chunks = (chunk[own.start : own.stop] for chunk in indices)
    for batch, ids in zip(batches_of(dataset, chunks, rows.device), said, strict=False):
        yield {**batch, "row": rows, "id": ids[own.start : own.stop].tolist()}


def _of_shards(lanes: Lanes, batch_size: int, step: int, own: range, rows: Tensor) -> Iterator[Batch]:
    while True:
        places = lanes.places(batch_size, step)[own.start : own.stop]
        samples = [lanes.sample(g) for g in places]
        images = torch.stack([sample["image"] for sample in samples]).to(rows.device)
        named = {name: [sample[name] for sample in samples] for name in ("caption", "id")}
        yield {"image": images, **named, "row": rows}
        step += 1
