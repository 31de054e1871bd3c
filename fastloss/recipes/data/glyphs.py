"""The characters of matplotlib's fonts as captioned images: 54,215 of them, their Unicode names as captions.

matplotlib has DejaVu Sans, Sans Mono and Serif and STIX in four styles each, and Python the names. Two fonts are held
out of the training, so that validation and test have drawings that the model has never seen, of characters that it
knows. A held-out character is in one of the two splits, whichever font draws it.
"""

from __future__ import annotations

import unicodedata
import zlib
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .samples import Skipped

FONTS = tuple(
    [f"DejaVuSans{kind}{style}" for kind in ("", "Mono") for style in ("", "-Bold", "-Oblique", "-BoldOblique")]
    + [f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")]
    + [f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")]
)
HELD_OUT_FONTS = ("DejaVuSerif-Italic", "STIXGeneralBol")
_HEIGHT = 0.75  # of the font, as a share of the image's side


class Glyphs(NamedTuple):
    """All characters in all fonts, font by font."""

    images: Tensor  # [N, 1, size, size] uint8, ink is 255
    codes: Tensor  # [N] int64, of Unicode
    fonts: Tensor  # [N] int64, places in FONTS


class GlyphsData:
    """A split, in memory. `same_as` gives of a caption the one that stands for its class: characters of several scripts
    with one shape, such as the Latin, Greek and Cyrillic capital A, are one class."""

    def __init__(self, split: str, size: int = 24, channels: int = 1):
        glyphs = draw_glyphs(size)
        held = torch.isin(glyphs.fonts, torch.tensor([FONTS.index(font) for font in HELD_OUT_FONTS]))
        in_test = torch.tensor([zlib.crc32(str(code).encode()) % 2 == 1 for code in range(int(glyphs.codes.max()) + 1)])
        known = torch.isin(glyphs.codes, glyphs.codes[~held])
        rows = {
            "train": ~held,
            "val": held & known & ~in_test[glyphs.codes],
            "test": held & known & in_test[glyphs.codes],
        }
        self.split = split
        chosen = rows[split].nonzero()[:, 0]
        self.images = glyphs.images[chosen].expand(-1, channels, -1, -1)
        self.codes = glyphs.codes[chosen]
        self.captions = [caption_of(code) for code in self.codes.tolist()]
        self.same_as = classes(size)
        self.skipped = Skipped("glyphs")

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index].float() / 255, "caption": self.captions[index]}


def caption_of(code: int) -> str:
    """ "latin capital letter a"; "" for a character without a name or without a shape."""
    character = chr(code)
    if unicodedata.category(character)[0] in "ZC":  # spaces, controls
        return ""
    return unicodedata.name(character, "").lower()


@lru_cache(maxsize=2)
def draw_glyphs(size: int = 24) -> Glyphs:
    """Every character that has a name, in the middle of an image; those with no ink are left out.

    Raises:
        ImportError: no matplotlib, Pillow or fontTools.
    """
    import matplotlib
    from fontTools.ttLib import TTFont
    from PIL import ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    images, codes, fonts = [], [], []
    for place, name in enumerate(FONTS):
        path = str(folder / f"{name}.ttf")
        font = ImageFont.truetype(path, round(size * _HEIGHT))
        with TTFont(path, lazy=True) as tables:
            characters = sorted(tables.getBestCmap())
        for code in filter(caption_of, characters):
            mask = font.getmask(chr(code), mode="L")
            ink = np.asarray(mask, dtype=np.uint8).reshape(mask.size[::-1])
            if ink.any():
                images.append(_centred(ink, size))
                codes.append(code)
                fonts.append(place)
    return Glyphs(torch.from_numpy(np.stack(images))[:, None], torch.tensor(codes), torch.tensor(fonts))


def _centred(ink: np.ndarray, size: int) -> np.ndarray:
    """The drawing in the middle of a square, cut where it is larger."""
    image = np.zeros((size, size), np.uint8)
    top, left = ((size - length) // 2 for length in ink.shape)
    kept = ink[max(-top, 0) : max(-top, 0) + size, max(-left, 0) : max(-left, 0) + size]
    top, left = max(top, 0), max(left, 0)
    image[top : top + kept.shape[0], left : left + kept.shape[1]] = kept
    return image


@lru_cache(maxsize=2)
def classes(size: int = 24) -> dict[str, str]:
    """Of each caption the first one, by code, whose characters look the same.

    Two characters look the same where all fonts that have both draw them alike, and so do two that a third one looks
    the same as. Held-out fonts count too: there as well nobody could tell them apart.
    """
    glyphs = draw_glyphs(size)
    drawn: dict[int, dict[int, bytes]] = defaultdict(dict)  # by code: by font
    alike: dict[tuple[int, bytes], list[int]] = defaultdict(list)  # by font and drawing
    for image, code, font in zip(glyphs.images, glyphs.codes.tolist(), glyphs.fonts.tolist(), strict=True):
        drawn[code][font] = image.numpy().tobytes()
        alike[font, drawn[code][font]].append(code)
    first = {code: code for code in drawn}

    def root(code: int) -> int:
        while first[code] != code:
            code = first[code]
        return code

    for codes in alike.values():
        for code in codes[1:]:
            for other in codes[: codes.index(code)]:
                both = drawn[code].keys() & drawn[other].keys()
                if root(code) != root(other) and all(drawn[code][font] == drawn[other][font] for font in both):
                    low, high = sorted((root(code), root(other)))
                    first[high] = low
    return {caption_of(code): caption_of(root(code)) for code in sorted(drawn)}
