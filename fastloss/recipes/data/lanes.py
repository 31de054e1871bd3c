"""Global batches from shards: which samples a batch has follows from seed and step, and a rank reads few of the shards.

The shards, in an order that is shuffled anew each time all were read, are dealt to lanes in turn, for ever: shard j of
that endless row goes to lane j mod L. A lane reads its shards one after the other and shuffles samples within a shard.
Sample g of the training (g = step x batch size + i) is the next one of lane g mod L, number g div L of that lane. L
depends on the number of shards alone, so the ranks change nothing: each loads its rows of a batch, ordered by lane, and
therefore opens only about L / W lanes. No lane ends, so no rank runs dry, however unequal shards are.

Where a lane stands after g samples is known without reading, up to the samples of a shard: those of shards that were
read once are counted, and one shard is read, not decoded, up to its place.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from typing import Any

from .shards import SHUFFLE_BUFFER, Raw, ShardData

LANES = 64  # at most; more ranks than lanes share them, and read what they share each
_LEAST_BUFFER = 32  # samples that a lane shuffles among, of many lanes
_EMPTY_PASSES = 100  # passes over all shards without a sample after which a lane gives up


def lanes_of(data: ShardData) -> int:
    return min(LANES, len(data.shards))


class Lanes:
    """The samples of a training by their number, on one rank."""

    def __init__(self, data: ShardData, seed: int) -> None:
        self.data, self.seed, self.count = data, seed, lanes_of(data)
        self._open: dict[int, _Lane] = {}

    def places(self, batch_size: int, step: int) -> list[int]:
        """The numbers of a global batch's samples, ordered by lane."""
        return sorted(range(step * batch_size, (step + 1) * batch_size), key=lambda g: g % self.count)

    def sample(self, g: int) -> dict[str, Any]:
        """Sample number g as `dict(image, caption, id)`; of each lane in rising order."""
        lane, number = g % self.count, g // self.count
        if lane not in self._open:
            self._open[lane] = _Lane(self.data, _endless(self.data, self.seed, lane, self.count, number), number)
        return self._open[lane].sample(number)


class _Lane:
    """Samples by their number in the lane. One that cannot be decoded is replaced by the next one that can, so that the
    numbers of the others stay as they are, whoever decodes them."""

    def __init__(self, data: ShardData, samples: Iterator[Raw], at: int) -> None:
        self.data, self._samples, self._at = data, samples, at
        self._ahead: deque[Raw] = deque()  # from number `at` on

    def sample(self, number: int) -> dict[str, Any]:
        for _ in range(number - self._at):
            self._peek(0)
            self._ahead.popleft()
        self._at = number
        further = 0
        while True:
            raw = self._peek(further)
            loaded = self.data.load(raw)
            if not isinstance(loaded, str):
                return {**loaded, "id": raw[0]}
            self.data.skipped.add(raw[0], loaded)
            further += 1

    def _peek(self, further: int) -> Raw:
        while len(self._ahead) <= further:
            self._ahead.append(next(self._samples))
        return self._ahead[further]


def _endless(data: ShardData, seed: int, lane: int, lanes: int, skip: int) -> Iterator[Raw]:
    """The samples of a lane from number `skip` on, not decoded."""
    shards, at, empty = data.shards, lane, 0
    buffer = max(SHUFFLE_BUFFER // lanes, _LEAST_BUFFER)
    while True:
        epoch, place = divmod(at, len(shards))
        url = random.Random(f"{seed} {epoch}").sample(shards, len(shards))[place]
        if url in data.counts and skip >= data.counts[url] > 0:
            skip -= data.counts[url]
        else:
            before = skip
            for raw in data.shuffled_shard(url, random.Random(f"{seed} {epoch} {place}"), buffer):
                skip -= 1
                if skip < 0:
                    yield raw
            skip = max(skip, 0)
            empty = 0 if data.counts[url] else empty + 1
            if empty > _EMPTY_PASSES * len(shards):
                what = f"its shards have no usable sample in their {data.split} split any more ({before} were to come)"
                raise data.skipped.nothing_left(what)
        at += lanes
