"""How the pictures look: one colour and marker per provider in all of them, rows whose marks hide none, text as text.

A file changes only where a figure did: axes end at round numbers, ids come from a fixed salt, and there is no date.
"""

from __future__ import annotations

import math
import pathlib
import textwrap
from collections.abc import Iterable, Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

INK, FAINT, LINE = "#7a828c", "#8a929c", "#8a929c55"  # greys that stand out from white and from near-black alike
OURS = "#2f7fe8"
LOOKS = {  # (colour, marker)
    "fastloss": (OURS, "o"),
    "eager": ("#d9892b", "s"),
    "torch.compile": ("#9a6ee0", "D"),
    "torch.compile max-autotune": ("#c25ec4", "d"),
    "torch.nn.functional": ("#b39b2e", "p"),
    "open_clip": ("#e0567a", "^"),
    "info-nce-pytorch": ("#1fa187", "v"),
    "pytorch-metric-learning": ("#a0724c", "P"),
    "lightly": ("#5aa02c", "X"),
    "piq": ("#3fb0c9", "<"),
    "kornia": ("#cc5a3a", ">"),
    "torchmetrics": ("#7fa32e", "h"),
    "pytorch-msssim": ("#d170b8", "*"),
    "lpips": ("#2f9e8f", "8"),
    "basicsr-style": ("#8b7bd8", "P"),
    "piq-style": ("#3fb0c9", "X"),
    "liger-kernel": ("#c9a227", "v"),
    "cut-cross-entropy": ("#6b8fd4", "^"),
    "inf_cl": ("#d4746b", "<"),
    "memeff": ("#58a06c", ">"),
    "siglip-kernel": ("#b06fae", "h"),
    "torch.cdist": ("#7d8a2e", "s"),
    "faiss": ("#4f7fbf", "X"),
}
OTHERS = (("#9c8a6a", "H"), ("#6f9aa8", "d"), ("#a86f7f", "p"))  # of who has no line above, in turn
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": LINE,
    "xtick.color": INK, "ytick.color": INK, "axes.facecolor": "none", "savefig.transparent": True,
    "svg.hashsalt": "fastloss", "svg.fonttype": "none",
}  # fmt: skip
FONTS = "'DejaVu Sans', Verdana, sans-serif"  # Verdana's letters are as wide
ROW, WIDTH, LEGEND_LINE = 0.52, 9.0, 0.2  # inches
LANE = 0.2  # of a row
LABEL_WIDTH, LABEL_LETTERS = 205, 48  # points, and letters of the small print
TICKS = tuple(m * 10.0**e for e in range(-12, 7) for m in (1, 2, 5))


def look(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """(colour, marker) by provider, in the order of the legend."""
    names = set(names)
    unknown = {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(sorted(names - set(LOOKS)))}
    return {name: found for name, found in (LOOKS | unknown).items() if name in names}


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def lanes(marks: dict[str, float], near: float) -> dict[str, int]:
    """A lane, 0, 1, -1, 2, ..., for each mark, so that those nearer than `near` have different ones."""
    found: dict[str, int] = {}
    for name in sorted(marks, key=lambda n: (n != "fastloss", marks[n])):
        taken = {found[other] for other in found if abs(marks[other] - marks[name]) < near}
        found[name] = next(lane for lane in (0, 1, -1, 2, -2, 3, -3, 4, -4) if lane not in taken)
    return found


def dots(axes: Axes, y: float, marks: dict[str, float], near: float, looks: dict[str, tuple[str, str]]) -> None:
    """A mark for each provider of a row, beside one another where they would hide one another.

    `near` is how close two may be, in decades of a logarithmic axis or else in units of the axis.
    """
    place = {n: math.log10(v) for n, v in marks.items()} if axes.get_xscale() == "log" else marks
    at = lanes(place, near)
    for name, value in marks.items():
        colour, marker = looks[name]
        axes.plot(
            value, y + LANE * at[name], marker, color=colour, markersize=size_of(name), markeredgewidth=0, zorder=4
        )


def size_of(name: str) -> float:
    """In points; a star's rays are thin."""
    return 8 if name == "fastloss" else 9 if LOOKS.get(name, ("", ""))[1] == "*" else 6.5


def round_limits(low: float, high: float) -> tuple[float, float]:
    """The ticks (1, 2 or 5 times a power of 10) around: they stay where they are while figures change a little."""
    return max(t for t in TICKS if t <= low * 1.0001), min(t for t in TICKS if t >= high * 0.9999)


def canvas(rows: int, title: str, subtitle: str, names: int, panels: int = 1) -> tuple[plt.Figure, list[Axes]]:
    """Panels beside one another with room for so many rows and, above them, a legend of so many names."""
    above = 0.86 + LEGEND_LINE * (math.ceil(names / abreast(names)) - 1) + (0.3 if panels > 1 else 0)
    height = ROW * rows + above + 0.66
    figure, grid = plt.subplots(1, panels, figsize=(WIDTH, height), squeeze=False)
    figure.subplots_adjust(left=0.33, right=0.965, top=1 - above / height, bottom=0.66 / height, wspace=0.08)
    headings(figure, title, subtitle)
    for axes in grid.flat:
        axes.set_ylim(rows - 0.5, -0.5)
        axes.yaxis.set_major_locator(NullLocator())
        bare(axes, "x")
        axes.spines["left"].set_visible(False)
    return figure, list(grid.flat)


def headings(figure: plt.Figure, title: str, subtitle: str) -> None:
    height = figure.get_size_inches()[1]
    figure.text(0.018, 1 - 0.20 / height, title, size=13, weight="bold", va="top")
    figure.text(0.018, 1 - 0.48 / height, subtitle, size=9, va="top", color=FAINT)


def bare(axes: Axes, grid: str) -> None:
    axes.tick_params(which="both", length=0, pad=5, labelsize=8.5)
    axes.grid(axis=grid, color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("right", "top"):
        axes.spines[side].set_visible(False)


def row_labels(axes: Axes, labels: Sequence[tuple[str, str]]) -> None:
    """Of each row a name and, smaller, in whole lines below, what else there is to say."""
    for y, (name, about) in enumerate(labels):
        lines = textwrap.wrap(about, LABEL_LETTERS)
        top = 4.5 * len(lines)
        for i, text in enumerate((name, *lines)):
            axes.annotate(
                text, (0, y), (-LABEL_WIDTH, top - 10 * i - (i > 0)), xycoords=("axes fraction", "data"),
                textcoords="offset points", size=7.5 if i else 10, color=FAINT if i else INK, va="center",
                annotation_clip=False,
            )  # fmt: skip


def at_the_right(axes: Axes, y: float, text: str) -> None:
    axes.annotate(
        text, (1, y), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points", size=8.5, va="center",
        ha="right", color=OURS, annotation_clip=False,
    )  # fmt: skip


def abreast(names: int) -> int:
    """Names in a line of the legend: as few lines as there can be, evenly filled."""
    return math.ceil(names / math.ceil(names / 6)) if names else 1


def legend(figure: plt.Figure, looks: dict[str, tuple[str, str]]) -> None:
    """Read along the lines."""
    names, columns = list(looks), abreast(len(looks))
    order = [name for column in range(columns) for name in names[column::columns]]
    handles = [
        plt.Line2D([], [], marker=looks[n][1], color=looks[n][0], label=n, linestyle="", markersize=size_of(n),
                   markeredgewidth=0) for n in order
    ]  # fmt: skip
    height = figure.get_size_inches()[1]
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.008, 1 - 0.66 / height), frameon=False, ncols=columns,
        fontsize=8.5, handletextpad=0.1, columnspacing=1.2, borderpad=0,
    )  # fmt: skip


def save(figure: plt.Figure, path: pathlib.Path) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = path.read_text(encoding="utf8").replace("'DejaVu Sans'", FONTS)
    path.write_text("\n".join(line.rstrip() for line in text.split("\n")), encoding="utf8")
    return path
