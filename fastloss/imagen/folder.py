"""A folder of captioned images."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from .digits import SPLITS
from .samples import EXTENSIONS, Skipped, caption_in, clean, decode, fault_of, logger, reason_of, split_of


class FolderData:
    """Images below a folder, with captions from metadata.jsonl files (lines of "file_name", relative to that file, and
    "text") or from a .txt beside the image. Folders train, val and test set the splits, else a hash of the name.

    Opening reads the captions and checks that the image files are complete. An image that turns out to be unreadable
    only when it is decoded is replaced by the next readable one, so that the length and the order stay as they are.
    """

    def __init__(self, root: str | Path, split: str, size: int, channels: int):
        self.root, self.split, self.size, self.channels = Path(root), split, size, channels
        if not self.root.is_dir():
            raise ValueError(f"folder: expected a folder of images, got {str(root)!r}")
        self.skipped = Skipped(f"folder:{root}")
        self._named = {name for name in SPLITS if (self.root / name).is_dir()}
        names, listed = self._scan()
        captions = [(name, self._caption(name, listed)) for name in names if self._in_split(name)]
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
        logger.info("%s: %d %s images, %d skipped", self.skipped.source, len(usable), split, len(self.skipped))

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
                faults.append((self.names[i], reason_of(error)))
        for fault in faults:
            self.skipped.add(*fault)
        raise self.skipped.nothing_left(f"none of its {len(self)} {self.split} images can be decoded")

    def _in_split(self, name: str) -> bool:
        first = name.split("/")[0]
        return split_of(name, first if first in self._named else None, self._named) == self.split

    def _scan(self) -> tuple[list[str], dict[str, str]]:
        """Names of all images below the root, sorted, and the captions that metadata files give."""
        names: list[str] = []
        listed: dict[str, str] = {}
        for folder, folders, files in os.walk(self.root):
            folders.sort()
            here = Path(folder).relative_to(self.root)
            names += [(here / file).as_posix() for file in files if Path(file).suffix.lower()[1:] in EXTENSIONS]
            if "metadata.jsonl" in files:
                listed.update(self._read_metadata(here))
        for name in sorted(listed.keys() - set(names)):
            if self._in_split(name):
                self.skipped.add(name, "listed in metadata.jsonl, but there is no such image")
        return sorted(names), listed

    def _read_metadata(self, folder: Path) -> dict[str, str]:
        """Caption by image name. A bad line is noted; if it names an image, that has the caption ""."""
        listed = {}
        name = (folder / "metadata.jsonl").as_posix()
        try:
            lines = (self.root / name).read_bytes().splitlines()
        except OSError as error:
            self.skipped.add(name, reason_of(error))
            return {}
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                image = (folder / row["file_name"]).as_posix()
            except (ValueError, KeyError, TypeError) as error:
                self.skipped.add(f"{name}:{number}", f"no JSON object with a file_name ({reason_of(error)})")
                continue
            try:
                listed[image] = caption_in(row)
            except ValueError:
                listed[image] = ""
        return listed

    def _caption(self, name: str, listed: dict[str, str]) -> str:
        """The caption of an image, or "" and a note of why it is skipped."""
        try:
            beside = (self.root / name).with_suffix(".txt")
            caption = listed[name] if name in listed else clean(beside.read_text("utf-8"))
            fault = "its caption is empty"
        except OSError:
            caption, fault = "", "no caption: neither in a metadata.jsonl nor in a .txt beside it"
        except ValueError as error:
            caption, fault = "", f"its .txt is not UTF-8 ({reason_of(error)})"
        if not caption:
            self.skipped.add(name, fault)
        return caption
