"""The splits of a run's data: each opened once, and counted in one line."""

from __future__ import annotations

from itertools import islice
from typing import Any, Protocol

from .batches import open_dataset
from .shards import ShardData

COUNTED = 512  # samples of shards are read one by one to be counted; from here on it is "at least"
FEW = 50  # images, below which a figure says little


class Source(Protocol):
    """What a configuration says of its data."""

    data: str
    size: int

    def image_channels(self) -> int: ...

    def held_out(self) -> tuple[int, int]: ...


class Splits:
    """``splits["train"]``, ``["val"]`` and ``["test"]`` of the data set that a configuration names."""

    def __init__(self, config: Source) -> None:
        self.config = config
        self._open: dict[str, Any] = {}
        self._counts: dict[tuple[str, int], int] = {}

    def __getitem__(self, split: str) -> Any:
        if split not in self._open:
            config = self.config
            try:
                self._open[split] = open_dataset(
                    config.data, split, config.size, config.image_channels(), config.held_out()
                )
            except ValueError as error:
                if split == "train":
                    raise
                more = f"; a larger --{split}-percent, or a folder or shards called {split}, gives it some"
                raise ValueError(f"{error}{more}") from None
        return self._open[split]

    def count(self, split: str, enough: int = COUNTED) -> int:
        """Samples of the split; of shards, which do not know it, at most `enough`."""
        data = self[split]
        if not isinstance(data, ShardData):
            return len(data)
        if (split, enough) not in self._counts:
            self._counts[split, enough] = sum(1 for _ in islice(data, enough))
        return self._counts[split, enough]

    def capped(self, split: str, n: int) -> str:
        return f"at least {n}" if n >= COUNTED and isinstance(self[split], ShardData) else f"{n}"

    def line(self) -> str:
        """ "folder:photos: 54 train, 3 val and 3 test images, none skipped"."""
        counts = {split: self.count(split) for split in ("train", "val", "test")}
        said = {split: f"{self.capped(split, n)} {split}" for split, n in counts.items()}
        skipped: dict[str, str] = {}
        for data in self._open.values():
            skipped |= data.skipped
        left_out = f"{len(skipped)} skipped" if skipped else "none skipped"
        return f"{self.config.data}: {said['train']}, {said['val']} and {said['test']} images, {left_out}"


def few(val: int, test: int) -> str:
    """A sentence where the held-out images are too few for their figures to say much, or ""."""
    if min(val, test) >= FEW:
        return ""
    return (
        f"There are {val} validation and {test} test images: figures of fewer than {FEW} images say little, as their "
        "intervals show."
    )
