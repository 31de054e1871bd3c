"""What captioned images of all sources share: decoding, captions, splits by name, and the count of what was skipped."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

SPLITS = ("train", "val", "test")
HELD_OUT = (5, 5)  # in percent: val and test, where no folder or shard is called so
CAPTION_KEYS = ("text", "caption", "prompt")

logger = logging.getLogger("fastloss")

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")
OTHER_IMAGES = frozenset(  # images that are not read: they are counted, so that none is lost without a word
    "apng avif dng exr gif hdr heic heif ico jfif jp2 jxl pbm pgm pnm ppm psd svg tga tif tiff".split()
)
EMPTY = "its caption is empty"
_NAMED = 100  # warnings per data set; the rest is counted, and named at debug level


class Skipped(dict[str, str]):
    """Name and reason of each sample left out of the data set `source`; each is logged once. What a reason adds about
    this one sample stands in brackets or after a colon."""

    def __init__(self, source: str):
        super().__init__()
        self.source = source

    def add(self, name: str, reason: str) -> None:
        if name in self:
            return
        self[name] = reason
        level = logging.WARNING if len(self) <= _NAMED else logging.DEBUG
        logger.log(level, "%s: skipped %s: %s", self.source, name, reason)
        if len(self) == _NAMED:
            logger.warning("%s: %d samples skipped; more are counted, and named at debug level", self.source, _NAMED)

    def summary(self) -> str:
        """How many were left out for each reason, the most frequent first: "3 skipped: 2 x no caption, 1 x a link"."""
        kinds = Counter(reason.split(":")[0].split(" (")[0] for reason in self.values())
        counts = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
        return f"{len(self)} skipped: {counts}" if self else "none skipped"

    def nothing_left(self, what: str) -> ValueError:
        """The error for a data set without a usable sample."""
        first = "; ".join(f"{name}: {reason}" for name, reason in islice(self.items(), 3))
        return ValueError(
            f"{self.source}: {what}, {self.summary()}{f' ({first})' if first else ''}; wanted images "
            f"({', '.join(EXTENSIONS)}) with captions"
        )


def reason_of(error: BaseException) -> str:
    """One line on an error, without what libraries append to its arguments."""
    text = getattr(error, "strerror", None) or (error.args[0] if error.args else "")
    return f"{type(error).__name__}: {text}".splitlines()[0]


def unreadable(error: BaseException) -> str:
    """The reason for an image that a decoder refused."""
    return f"unreadable image ({reason_of(error)})"


def not_read(extension: str) -> str:
    """The reason for an image of a format that is left out."""
    return f"an image format that is not read (.{extension}; read are {', '.join(EXTENSIONS)})"


def split_of(name: str, given: str | None, named: Collection[str], held_out: tuple[int, int] = HELD_OUT) -> str:
    """The split of a sample: the one its folder or shard is called after where "train" is among those `named`, with
    splits that have no name there taken out of train; else by a hash of the name, 90 : 5 : 5, or as `held_out` says
    (in percent, for val and test).
    """
    if "train" in named and given not in (None, "train"):
        return str(given)
    bucket = _hash(name) % 100
    split = SPLITS[(bucket >= 100 - sum(held_out)) + (bucket >= 100 - held_out[1])]
    return "train" if "train" in named and split in named else split


def splits_of(
    names: Sequence[str], given: Sequence[str | None], named: Collection[str], held_out: tuple[int, int]
) -> dict[str, str]:
    """:func:`split_of` each name. Where few names leave val or test empty it gets one of train, the one whose hash is
    the largest, so that three images are enough for three splits."""
    found = {name: split_of(name, g, named, held_out) for name, g in zip(names, given, strict=True)}
    for split in SPLITS[1:]:
        train = [name for name in names if found[name] == "train"]
        if split not in found.values() and not ("train" in named and split in named) and len(train) > 1:
            found[max(train, key=_hash)] = split
    return found


def caption_ids(captions: Sequence[str]) -> Tensor:
    """(B,) int64 that are equal for equal captions, in this run and any other."""
    digests = (hashlib.blake2b(text.encode(), digest_size=7).digest() for text in captions)
    return torch.tensor([int.from_bytes(digest, "big") for digest in digests], dtype=torch.int64)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")


def caption_in(row: Any) -> str:
    """The caption in an object read from JSON, under one of `CAPTION_KEYS`. Raises ValueError, saying what came."""
    return clean(string_in(row, *CAPTION_KEYS))


def string_in(row: Any, *names: str) -> str:
    """The first string under one of the names in an object read from JSON. Raises ValueError, saying what came."""
    wanted = ("one of " if len(names) > 1 else "") + ", ".join(f'"{name}"' for name in names)
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with {wanted}, got {_said(row)}")
    given = [name for name in names if name in row]
    if not given:
        raise ValueError(f"expected {wanted} among the keys, got {', '.join(map(repr, row)) or 'none'}")
    for name in given:
        if isinstance(row[name], str):
            return row[name]
    raise ValueError("; ".join(f'expected a string under "{name}", got {_said(row[name])}' for name in given))


def _said(value: Any) -> str:
    """A value of a JSON file in words."""
    if value is None:
        return "null"
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    return json.dumps(value)[:40]


def text_of(content: bytes) -> str:
    """The caption in a text file: UTF-8, with or without a byte order mark."""
    return clean(content.decode("utf-8-sig"))


def clean(caption: str) -> str:
    return " ".join(caption.split())


def fault_of(path: Path) -> str | None:
    """Why an image file cannot be used, found without decoding where the format allows it; None if it seems sound."""
    from PIL import Image

    try:
        with open(path, "rb") as file, Image.open(file) as image:
            if image.format == "PNG":
                image.verify()  # the checksums of all chunks, to the last
            elif image.format != "JPEG" or not _ends_like_jpeg(file):
                image.load()
    except Exception as error:  # image decoders raise all kinds of errors on damaged files
        return unreadable(error)
    return None


def _ends_like_jpeg(file: BinaryIO) -> bool:
    position = file.tell()
    file.seek(-2, 2)
    end = file.read()
    file.seek(position)
    return end == b"\xff\xd9"


def decode(file: Path | BinaryIO, size: int, channels: int) -> Tensor:
    """An image file as float32 [channels, size, size] in [0, 1]: turned upright as its EXIF data say, its middle square
    cut out and resized, transparency laid on white. Raises whatever the decoder raises.
    """
    from PIL import Image, ImageOps

    with Image.open(file) as image:
        image.draft(None, (2 * size, 2 * size))  # lets JPEG decode large photographs at a fraction of their size
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16") or upright.mode == "I":  # 16-bit grey, which convert() would clip to white
            upright = Image.fromarray((np.asarray(upright) >> 8).clip(0, 255).astype(np.uint8))
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        square = ImageOps.fit(upright.convert("RGB" if channels == 3 else "L"), (size, size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(square)).view(size, size, channels)
    return pixels.permute(2, 0, 1).float().div(255)
