"""WebDataset tar shards of captioned images."""

from __future__ import annotations

import glob
import json
import random
import re
import tarfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from .samples import (
    CAPTION_KEYS,
    EMPTY,
    EXTENSIONS,
    HELD_OUT,
    OTHER_IMAGES,
    SPLITS,
    Skipped,
    caption_in,
    decode,
    logger,
    not_read,
    reason_of,
    split_of,
    text_of,
    unreadable,
)

SHUFFLE_BUFFER = 1000
_WAITING = 64  # samples with the same name up to the first dot that may wait for their other files, held in memory
_CAPTIONS = ("txt", *CAPTION_KEYS, "json")  # extensions, the first that a sample has counts
_ARCHIVES = ("*.tar", "*.tar.gz", "*.tgz")
_IMAGES = (*EXTENSIONS, *sorted(OTHER_IMAGES))

Raw = tuple[str, bytes, str]  # name, image file, caption
Files = dict[str, bytes | str]  # by extension: the content, or why it cannot be had


class Member(NamedTuple):
    """A file of a shard that may belong to a sample."""

    first: str  # its name up to the first dot
    key: str  # its name up to the last dot
    extension: str
    content: bytes | str  # or why it cannot be had


class ShardData:
    """Shards read in sequence: `00017.jpg` (or png, webp, bmp) with `00017.txt`, or `00017.json` with "text",
    "caption" or "prompt"; a caption may also be a file of one of these extensions. Text is UTF-8, with or without a
    byte order mark.

    `shards` is a folder (all .tar, .tar.gz and .tgz below it), a file, a glob (`shards/*.tar`), braces
    (`train-{0000..0015}.tar`), or an address that webdataset opens.

    An image and its caption are what has the same name before the last dot, so that `photo.001.png` and `photo.001.txt`
    are a sample and `photo.002.png` and `photo.002.txt` another. WebDataset itself cuts at the first dot, and there
    `00017.seg.png` is one more field of the sample 00017: so it is here, for it has no caption of its own and 00017 is
    a sample without it. The files of a sample stand together in the shard, in any order.

    Shards called after a split ("train-0003.tar", "val/0.tar") belong to it; without such names, samples are divided by
    a hash of shard and key, with `held_out` percent in val and test. In training, shards are shuffled, then samples
    within a buffer of 1000.

    Every image of the split that is not used is in `skipped` as "shard/name", with the reason: no caption, an empty
    one, one that is no string, an unreadable file, a format that is not read, a name that came before, a link. Further
    images of a sample are counted by shard, "shard/*.seg.png". A shard that cannot be read is there by its address.
    """

    def __init__(self, shards: str, split: str, size: int, channels: int, held_out: tuple[int, int] = HELD_OUT):
        try:
            import webdataset
        except ImportError as error:
            raise ImportError("wds: needs webdataset: pip install webdataset, or fastloss[train]") from error
        self._wds = webdataset
        self.split, self.size, self.channels, self._held_out = split, size, channels, held_out
        self.skipped = Skipped(f"wds:{shards}")
        urls = self.urls = _expanded(shards, webdataset.shardlists.expand_urls)
        given = {url: _split_in(url) for url in urls}
        self._named = {name for name in given.values() if name}
        # a shard of another split need not be read
        usual = (None, "train", split) if split not in self._named or split == "train" else (split,)
        self._given = {url: name for url, name in given.items() if "train" not in self._named or name in usual}
        names = Counter(map(_file_name, urls))
        self._shown = {url: url if names[_file_name(url)] > 1 else _file_name(url) for url in urls}
        self._summed_up = False
        #: samples of each shard that was read to its end, so that a resumed run need not read those before its own
        self.counts: dict[str, int] = {}
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
            samples = self._wds.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=rng)(samples)
        count = 0
        for sample, (name, _, _) in _ahead(self.load, samples, threads):
            if isinstance(sample, str):
                self.skipped.add(name, sample)
            else:
                count += 1
                yield sample
        if self.skipped and not self._summed_up:
            self._summed_up = True
            logger.warning("%s: %d %s images, %s", self.skipped.source, count, self.split, self.skipped.summary())

    @property
    def shards(self) -> list[str]:
        """The addresses of the shards that may have samples of the split."""
        return list(self._given)

    def shuffled_shard(self, url: str, rng: random.Random, buffer: int) -> Iterator[Raw]:
        """The samples of one shard, not decoded, shuffled within a buffer of so many."""
        count = 0

        def counted() -> Iterator[Raw]:
            nonlocal count
            for sample in self._shard(url):
                count += 1
                yield sample

        yield from self._wds.shuffle(buffer, initial=buffer, rng=rng)(counted())
        self.counts[url] = count

    def _shard(self, url: str) -> Iterator[Raw]:
        """The samples of one shard that are in the split and have an image and a caption."""

        def note(error: Exception) -> bool:
            self.skipped.add(url, reason_of(error))
            return True

        shown = self._shown[url]
        taken: Counter[str] = Counter()
        further: Counter[str] = Counter()
        # one reader per shard: after a truncated one, the next shard's files must not complete its last sample
        for key, files, fields in _samples(_members(self._wds.tariterators.url_opener, url, note)):
            if not self._in_split(url, key):
                continue
            further.update(fields)
            if not files:
                continue
            image, caption, fault, others = _judge(files)
            further.update(others)
            name = f"{shown}/{key}"
            if not fault:
                taken[key] += 1
                if taken[key] > 1:
                    name, fault = f"{name} ({taken[key]})", "a sample of this name came before in the shard"
            if fault:
                self.skipped.add(name, fault)
            else:
                yield name, image, caption
        for kind, count in further.items():
            self.skipped.add(f"{shown}/*.{kind}", f"further images of samples that have one ({count} images)")

    def _in_split(self, url: str, key: str) -> bool:
        name = f"{_file_name(url)}/{key}"
        return split_of(name, self._given[url], self._named, self._held_out) == self.split

    def load(self, raw: Raw) -> dict[str, Any] | str:
        """The sample, or what is wrong with it."""
        try:
            return {"image": decode(BytesIO(raw[1]), self.size, self.channels), "caption": raw[2]}
        except Exception as error:  # image decoders raise all kinds of errors on damaged files
            return unreadable(error)


def _expanded(shards: str, braces: Callable[[str], list[str]]) -> list[str]:
    """The addresses of the shards, those of a folder or a glob sorted."""
    found: list[str] = []
    for part in [shards] if Path(shards).exists() else braces(shards):
        path = Path(part)
        if path.is_dir():
            found += sorted(str(file) for ending in _ARCHIVES for file in path.rglob(ending))
        elif not path.exists() and "://" not in part and not part.startswith("pipe:") and glob.has_magic(part):
            found += sorted(glob.glob(part, recursive=True))
        else:
            found.append(part)
    if not found:
        raise ValueError(
            f"data: expected shards, a folder with {', '.join(_ARCHIVES)} in it, a glob such as 'wds:shards/*.tar' or "
            f"braces such as 'wds:train-{{0000..0015}}.tar', got 'wds:{shards}', which matches none"
        )
    return found


def _file_name(url: str) -> str:
    return url.split("/")[-1]


def _split_in(url: str) -> str | None:
    """The split that a shard's own name or its folder's is called after."""
    words = re.split("[^a-z]+", "/".join(url.split("/")[-2:]).lower())
    return next((split for split in SPLITS if split in words), None)


def _members(open_url: Callable[..., Any], url: str, note: Callable[[Exception], bool]) -> Iterator[Member]:
    """The images, captions and links of a shard in their order; `note` gets what ends it early."""
    for source in open_url([{"url": url}], handler=note):
        try:
            tar = tarfile.open(fileobj=source["stream"], mode="r|*")
            for entry in tar:
                tar.members = []  # type: ignore[attr-defined]  # or it keeps the headers of all it has read
                folder, slash, file = entry.name.rpartition("/")
                stem, dot, extension = file.rpartition(".")
                extension = extension.lower()
                if not dot or entry.isdir() or re.match("__[^/]*__($|/)", entry.name):  # "__...__" is WebDataset's own
                    continue
                content: bytes | str
                if extension not in (*_CAPTIONS, *_IMAGES):
                    continue
                if not entry.isreg():
                    content = "a link in the archive, not a file"
                elif extension in OTHER_IMAGES:
                    content = not_read(extension)
                else:
                    content = tar.extractfile(entry).read()  # type: ignore[union-attr]
                yield Member(folder + slash + file.partition(".")[0], folder + slash + stem, extension, content)
        except Exception as error:  # whatever a damaged archive or its stream raises
            note(error)


def _samples(members: Iterable[Member]) -> Iterator[tuple[str, Files, list[str]]]:
    """Key and files of each sample, or its key, no files and the names of further images of it.

    The files of one key, up to the last dot, are a sample, except that those without an image or a caption are fields
    of the sample whose key ends at the first dot, where that one has both.
    """
    first, waiting = "", dict[str, Files]()
    for member in members:
        if member.first != first:
            yield from _settled(first, waiting, list(waiting))
            first, waiting = member.first, {}
        files = waiting.setdefault(member.key, {})
        if member.extension not in files:
            files[member.extension] = member.content
        elif member.extension in _IMAGES:
            yield member.key, {}, [member.extension]
        if len(waiting) > _WAITING:
            yield from _settled(first, waiting, [next(key for key in waiting if key != first)])
    yield from _settled(first, waiting, list(waiting))


def _settled(first: str, waiting: dict[str, Files], keys: list[str]) -> Iterator[tuple[str, Files, list[str]]]:
    """Take the samples of `keys` out of those that wait."""
    has_whole = _is_whole(waiting.get(first, {}))
    for key in keys:
        files = waiting.pop(key)
        if key != first and has_whole and not _is_whole(files):
            yield first, {}, [f"{key[len(first) + 1 :]}.{kind}" for kind in files if kind in _IMAGES]
        else:
            yield key, files, []


def _is_whole(files: Files) -> bool:
    return any(kind in files for kind in _IMAGES) and any(kind in files for kind in _CAPTIONS)


def _judge(files: Files) -> tuple[bytes, str, str, list[str]]:
    """Image and caption of a sample, or what is wrong with it, and the extensions of images beside the one taken."""
    images = sorted((kind for kind in _IMAGES if kind in files), key=lambda kind: isinstance(files[kind], str))
    if not images:
        return b"", "", "a caption without an image", []
    image, others = files[images[0]], images[1:]
    if isinstance(image, str):
        return b"", "", image, others
    caption, fault = _caption(files)
    return image, caption, fault, others


def _caption(files: Files) -> tuple[str, str]:
    """The caption, from the .txt before the .json, and what is wrong with it."""
    kind = next((kind for kind in _CAPTIONS if kind in files), None)
    if kind is None:
        return "", "no caption: no .txt or .json of its name stands beside it in the shard"
    content = files[kind]
    if isinstance(content, str):
        return "", f"its .{kind} is {content}"
    try:
        caption = caption_in(json.loads(content)) if kind == "json" else text_of(content)
    except UnicodeDecodeError as error:
        return "", f"its .{kind} is not UTF-8 ({reason_of(error)})"
    except ValueError as error:
        return "", f"no caption (its .{kind}: {error})"
    return caption, "" if caption else EMPTY


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
