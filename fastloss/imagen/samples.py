"""What captioned images of all sources share: decoding, captions, splits by name, and the count of what was skipped."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from .digits import SPLITS

logger = logging.getLogger("fastloss")

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")
_NAMED = 100  # warnings per data set; the rest is counted, and named at debug level


class Skipped(dict[str, str]):
    """Name and reason of each sample left out of the data set `source`; each is logged once."""

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

    def nothing_left(self, what: str) -> ValueError:
        """The error for a data set without a usable sample."""
        first = "; ".join(f"{name}: {reason}" for name, reason in islice(self.items(), 3))
        return ValueError(
            f"{self.source}: {what}, {len(self)} skipped{f' ({first})' if first else ''}; wanted images "
            f"({', '.join(EXTENSIONS)}) with captions"
        )


def reason_of(error: BaseException) -> str:
    """One line on an error, without what libraries append to its arguments."""
    text = getattr(error, "strerror", None) or (error.args[0] if error.args else "")
    return f"{type(error).__name__}: {text}".splitlines()[0]


def split_of(name: str, given: str | None, named: Collection[str]) -> str:
    """The split of a sample: the one its folder or shard is called after where "train" is among those `named`, with
    splits that have no name there taken out of train; else by a hash of the name, 90 : 5 : 5.
    """
    if "train" in named and given not in (None, "train"):
        return str(given)
    bucket = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") % 100
    split = SPLITS[(bucket >= 90) + (bucket >= 95)]
    return "train" if "train" in named and split in named else split


def caption_in(row: Any) -> str:
    """The caption in an object read from JSON: its "text", or its "caption"."""
    if not isinstance(row, dict) or not isinstance(row.get("text", row.get("caption")), str):
        raise ValueError('expected an object with a string "text" or "caption"')
    return clean(row["text"] if "text" in row else row["caption"])


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
        return reason_of(error)
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
