"""A folder of captioned images."""

from __future__ import annotations

import codecs
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .samples import (
    EMPTY,
    EXTENSIONS,
    HELD_OUT,
    OTHER_IMAGES,
    SPLITS,
    Skipped,
    caption_in,
    decode,
    fault_of,
    logger,
    not_read,
    reason_of,
    split_of,
    splits_of,
    string_in,
    text_of,
    unreadable,
)

NO_CAPTION = "no caption: neither in a metadata.jsonl nor in a .txt beside it"


class Listed(NamedTuple):
    """What a line of a metadata.jsonl says of an image."""

    caption: str
    fault: str  # why there is no caption
    where: str  # file and line


class FolderData:
    """Images below a folder, with captions from metadata.jsonl files (lines of "file_name", relative to that file, and
    "text", "caption" or "prompt") or from a .txt beside the image. Folders train, val and test set the splits, else a
    hash of the name, with `held_out` percent in val and test and at least one image in each. Text files are UTF-8, with
    or without a byte order mark.

    Every image of the split that is not used is in `skipped` by its name, with the reason: no caption, an empty one,
    one that is no string, an unreadable file, a format that is not read. So are lines of a metadata.jsonl that name no
    image, or one that a later line names again (the last line counts), and linked folders, which are not followed.

    Opening reads the captions and checks that the image files are complete. An image that turns out to be unreadable
    only when it is decoded is replaced by the next readable one, so that the length and the order stay as they are.
    """

    def __init__(self, root: str | Path, split: str, size: int, channels: int, held_out: tuple[int, int] = HELD_OUT):
        self.root, self.split, self.size, self.channels = Path(root), split, size, channels
        self._held_out = held_out
        if not self.root.is_dir():
            raise ValueError(f"folder: expected a folder of images, got {str(root)!r}")
        self.skipped = Skipped(f"folder:{root}")
        self._named = {name for name in SPLITS if (self.root / name).is_dir()}
        names, listed = self._scan()
        splits = splits_of(names, [self._given(name) for name in names], self._named, held_out)
        captions = [(name, self._caption(name, listed)) for name in names if splits[name] == split]
        captioned = [(name, caption) for name, caption in captions if caption]
        with ThreadPoolExecutor(8) as pool:
            faults = list(pool.map(fault_of, [self.root / name for name, _ in captioned]))
        for (name, _), fault in zip(captioned, faults, strict=True):
            if fault:
                self.skipped.add(name, fault)
        usable = [sample for sample, fault in zip(captioned, faults, strict=True) if not fault]
        if not usable:
            raise self.skipped.nothing_left(f"no usable image in its {split} split, {len(names)} images found in all")
        self.names = [name for name, _ in usable]
        self.captions = [caption for _, caption in usable]
        level = logging.WARNING if self.skipped else logging.DEBUG
        logger.log(level, "%s: %d %s images, %s", self.skipped.source, len(usable), split, self.skipped.summary())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, caption, faults = self.load(index)
        for fault in faults:
            self.skipped.add(*fault)
        return {"image": image, "caption": caption}

    def load(self, index: int) -> tuple[Tensor, str, list[tuple[str, str]]]:
        """Image and caption, and the names and faults of images passed over, for the process that keeps the count."""
        index = range(len(self))[index]
        faults: list[tuple[str, str]] = []
        for i in (*range(index, len(self)), *range(index)):
            try:
                return decode(self.root / self.names[i], self.size, self.channels), self.captions[i], faults
            except Exception as error:  # image decoders raise all kinds of errors on damaged files
                faults.append((self.names[i], unreadable(error)))
        for fault in faults:
            self.skipped.add(*fault)
        raise self.skipped.nothing_left(f"none of its {len(self)} {self.split} images can be decoded")

    def _given(self, name: str) -> str | None:
        first = name.split("/")[0]
        return first if first in self._named else None

    def _in_split(self, name: str) -> bool:
        return split_of(name, self._given(name), self._named, self._held_out) == self.split

    def _scan(self) -> tuple[list[str], dict[str, Listed]]:
        """Names of all images below the root, sorted, and what metadata files say of images."""
        names: list[str] = []
        listed: dict[str, Listed] = {}
        for folder, folders, files in os.walk(self.root):
            folders.sort()
            here = Path(folder).relative_to(self.root)
            for linked in (name for name in folders if (self.root / here / name).is_symlink()):
                self.skipped.add((here / linked).as_posix(), "a link to a folder, which is not followed")
            for file in files:
                name, extension = (here / file).as_posix(), Path(file).suffix.lower()[1:]
                if extension in EXTENSIONS:
                    names.append(name)
                elif extension in OTHER_IMAGES and self._in_split(name):
                    self.skipped.add(name, not_read(extension))
            if "metadata.jsonl" in files:
                self._read_metadata(here, listed)
        for name in sorted(listed.keys() - set(names)):
            if self._in_split(name):
                is_file = (self.root / name).is_file()
                reason = not_read(Path(name).suffix[1:]) if is_file else "there is no such image"
                self.skipped.add(name, f"listed in metadata.jsonl, but {reason}")
        return sorted(names), listed

    def _read_metadata(self, folder: Path, listed: dict[str, Listed]) -> None:
        """Add to `listed` what a metadata.jsonl says; a bad line is noted."""
        name = (folder / "metadata.jsonl").as_posix()
        try:
            lines = (self.root / name).read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
        except OSError as error:
            self.skipped.add(name, reason_of(error))
            return
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{name}:{number}"
            try:
                row = json.loads(line)
                image = (folder / string_in(row, "file_name")).as_posix()
            except ValueError as error:
                self.skipped.add(where, f"names no image ({error})")
                continue
            if image in listed:
                self.skipped.add(listed[image].where, f"its image is named again (in {where}, which counts)")
            try:
                caption = caption_in(row)
                listed[image] = Listed(caption, "" if caption else EMPTY, where)
            except ValueError as error:
                listed[image] = Listed("", f"no caption ({where}: {error})", where)

    def _caption(self, name: str, listed: dict[str, Listed]) -> str:
        """The caption of an image, or "" and a note of why it is skipped."""
        if name in listed:
            caption, fault, _ = listed[name]
        else:
            caption, fault = self._beside(name)
        if not caption:
            self.skipped.add(name, fault)
        return caption

    def _beside(self, name: str) -> tuple[str, str]:
        """The caption in the .txt beside an image, and what is wrong with it."""
        try:
            caption = text_of((self.root / name).with_suffix(".txt").read_bytes())
            return caption, "" if caption else EMPTY
        except FileNotFoundError:
            return "", NO_CAPTION
        except OSError as error:
            return "", f"its .txt cannot be read ({reason_of(error)})"
        except ValueError as error:
            return "", f"its .txt is not UTF-8 ({reason_of(error)})"
