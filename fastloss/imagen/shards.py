"""WebDataset tar shards of captioned images."""

from __future__ import annotations

import json
import random
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from typing import Any

from .digits import SPLITS
from .samples import EXTENSIONS, Skipped, caption_in, clean, decode, reason_of, split_of

_SHUFFLE_BUFFER = 1000

Raw = tuple[str, bytes, str]  # name, image file, caption


class ShardData:
    """Shards read in sequence: `00017.jpg` (or png, webp, bmp) with `00017.txt`, or `00017.json` with "text".

    Shards called after a split ("train-0003.tar", "val/0.tar") belong to it; without such names, samples are divided by
    a hash of shard and key. In training, shards are shuffled, then samples within a buffer of 1000.
    """

    def __init__(self, shards: str, split: str, size: int, channels: int):
        try:
            import webdataset
        except ImportError as error:
            raise ImportError("wds: needs webdataset: pip install webdataset, or fastloss[train]") from error
        self._wds = webdataset
        self.split, self.size, self.channels = split, size, channels
        self.skipped = Skipped(f"wds:{shards}")
        urls = list(webdataset.shardlists.expand_urls(shards))
        given = {url: _split_in(url) for url in urls}
        self._named = {name for name in given.values() if name}
        # a shard of another split need not be read
        usual = (None, "train", split) if split not in self._named or split == "train" else (split,)
        self._given = {url: name for url, name in given.items() if "train" not in self._named or name in usual}
        if next(self.read(shuffle=False), None) is None:
            raise self.skipped.nothing_left(f"no usable sample in its {split} split, shards: {len(urls)} in all")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.read(shuffle=False)

    def read(self, seed: int = 0, epoch: int = 0, shuffle: bool = True, threads: int = 0) -> Iterator[dict[str, Any]]:
        """The samples of one pass, in an order that seed and epoch fix, whatever the number of decoding threads."""
        rng = random.Random(f"{seed} {epoch}")
        urls = rng.sample(list(self._given), len(self._given)) if shuffle else list(self._given)
        samples: Iterable[Raw] = (sample for url in urls for sample in self._shard(url))
        if shuffle:
            samples = self._wds.shuffle(_SHUFFLE_BUFFER, initial=_SHUFFLE_BUFFER, rng=rng)(samples)
        for sample, (name, _, _) in _ahead(self._load, samples, threads):
            if isinstance(sample, str):
                self.skipped.add(name, sample)
            else:
                yield sample

    def _shard(self, url: str) -> Iterator[Raw]:
        """The samples of one shard that are in the split and have an image and a caption."""

        def note(error: Exception) -> bool:
            self.skipped.add(url, reason_of(error))
            return True

        shard = url.split("/")[-1]
        # one reader per shard: after a truncated one, the next shard's files must not complete its last sample
        for sample in self._wds.WebDataset([url], shardshuffle=False, empty_check=False, handler=note):
            name = f"{shard}/{sample['__key__']}"
            if split_of(name, self._given[url], self._named) != self.split:
                continue
            image = next((sample[key] for key in EXTENSIONS if key in sample), None)
            try:
                caption = clean(sample["txt"].decode()) if "txt" in sample else caption_in(json.loads(sample["json"]))
                fault = "its caption is empty"
            except (ValueError, KeyError) as error:
                caption, fault = "", f"no caption ({reason_of(error)})"
            if image is None:
                self.skipped.add(name, "no image")
            elif not caption:
                self.skipped.add(name, fault)
            else:
                yield name, image, caption

    def _load(self, raw: Raw) -> dict[str, Any] | str:
        """The sample, or what is wrong with it."""
        try:
            return {"image": decode(BytesIO(raw[1]), self.size, self.channels), "caption": raw[2]}
        except Exception as error:  # image decoders raise all kinds of errors on damaged files
            return reason_of(error)


def _split_in(url: str) -> str | None:
    """The split that a shard's own name or its folder's is called after."""
    words = re.split("[^a-z]+", "/".join(url.split("/")[-2:]).lower())
    return next((split for split in SPLITS if split in words), None)


def _ahead(fn: Callable[[Raw], Any], items: Iterable[Raw], threads: int) -> Iterator[tuple[Any, Raw]]:
    """`(fn(item), item)` in order, computed ahead by threads (image decoders release the interpreter lock)."""
    if threads < 1:
        yield from ((fn(item), item) for item in items)
        return
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[tuple[Future, Raw]] = deque()
        for item in items:
            pending.append((pool.submit(fn, item), item))
            if len(pending) > 4 * threads:
                future, done = pending.popleft()
                yield future.result(), done
        for future, done in pending:
            yield future.result(), done
