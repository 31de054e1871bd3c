"""Grids of captioned images."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

LABEL_INCHES, CELL_INCHES, TITLE_INCHES = 2.6, 0.8, 0.62


class Section(NamedTuple):
    """A block of rows with a title: a caption and as many images as there are columns, None where there is none."""

    title: str
    columns: list[str]
    captions: Sequence[str]
    images: Sequence[Sequence[Tensor | None]]  # each (C, S, S) in [0, 1]


def draw_sections(sections: Sequence[Section], path: Path) -> None:
    """Write the sections below one another. The format is that of the name's ending, PNG where it is none."""
    plt = pyplot()
    columns = max(len(section.columns) for section in sections)
    width = LABEL_INCHES + CELL_INCHES * columns + 0.1
    heights = [TITLE_INCHES + CELL_INCHES * len(section.captions) for section in sections]
    height = sum(heights) + 0.05
    figure = plt.figure(figsize=(width, height))
    top = height
    for section in sections:
        figure.text(0.08 / width, (top - 0.2) / height, section.title, fontsize=10, weight="bold", va="center")
        for k, name in enumerate(section.columns):
            x = LABEL_INCHES + CELL_INCHES * (k + 0.5)
            figure.text(x / width, (top - 0.48) / height, name, fontsize=8, ha="center", va="center")
        for i, caption in enumerate(section.captions):
            bottom = top - TITLE_INCHES - CELL_INCHES * (i + 1)
            text = textwrap.shorten(caption, 90, placeholder="...")
            at = (LABEL_INCHES - 0.1) / width, (bottom + CELL_INCHES / 2) / height
            figure.text(*at, textwrap.fill(text, 32), fontsize=9, ha="right", va="center", parse_math=False)
            for k, image in enumerate(section.images[i]):
                x = LABEL_INCHES + CELL_INCHES * k
                side = CELL_INCHES * 0.95
                axis = figure.add_axes((x / width, bottom / height, side / width, side / height))
                _draw(axis, image)
        top -= TITLE_INCHES + CELL_INCHES * len(section.captions)
    save_figure(figure, path)
    plt.close(figure)


def _draw(axis: Any, image: Tensor | None) -> None:
    axis.axis("off")
    if image is None:
        axis.text(0.5, 0.5, "none", fontsize=8, color="grey", ha="center", va="center", transform=axis.transAxes)
        return
    pixels = image.detach().cpu().float().clamp(0, 1).permute(1, 2, 0).squeeze(-1)
    axis.imshow(pixels, cmap="gray", vmin=0, vmax=1)


def save_figure(figure: Any, path: Path) -> None:
    """Under the name as it is given: a matplotlib of its own would add .png to "picture" or refuse "picture.v2"."""
    ending = path.suffix.lower()[1:]
    known = ending in figure.canvas.get_supported_filetypes()
    figure.savefig(path, dpi=100, format=ending if known else "png")


def caption_rows(
    captions: Sequence[str], images: Tensor, real: Sequence[Tensor | None] | None, nearest: Tensor | None = None
) -> tuple[list[str], list[list[Tensor | None]]]:
    """Columns and rows of a section: the real image, then each generated one (N, K, C, S, S), each followed by its
    nearest training image where these are given."""
    count = images.shape[1]
    columns = ["real"] if real is not None else []
    for k in range(count):
        columns += [f"z {k + 1}", "nearest"] if nearest is not None else [f"z {k + 1}"]
    rows: list[list[Tensor | None]] = []
    for i in range(len(captions)):
        row: list[Tensor | None] = [real[i]] if real is not None else []
        for k in range(count):
            row += [images[i, k], nearest[i, k]] if nearest is not None else [images[i, k]]
        rows.append(row)
    return columns, rows


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def stacked(images: Sequence[Tensor]) -> Tensor:
    """K times (N, C, S, S) as (N, K, C, S, S), on the CPU."""
    return torch.stack([some.cpu() for some in images], 1)
