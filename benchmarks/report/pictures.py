"""Pictures of the results, readable on light and on dark pages: speed, memory, share of the ceiling, scaling.

speed.svg      time of each provider, as a multiple of fastloss's, of the headline rows
memory.svg     the same for peak memory
roofline.svg   how much of what the hardware allows (copy bandwidth, matrix products) each provider reaches
scaling.svg    time over size, up to where a provider ran out of memory
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.harness.results import RESULTS, read_all
from benchmarks.report.tables import BASE, DEVICES, Group, Key, grouped, is_headline, rows_of, shape_label, short

INK, FAINT, LINE = "#7a828c", "#8a929c", "#8a929c55"  # greys that stand out from white and from near-black alike
OURS = "#2f7fe8"
COLOURS = {
    "eager": "#d9892b",
    "torch.compile": "#9a6ee0",
    "torch.compile max-autotune": "#c25ec4",
    "torch.nn.functional": "#b39b2e",
}
LIBRARIES = ("#1fa187", "#e0567a", "#5aa02c", "#3fb0c9", "#a0724c")
MARKERS = ("s", "D", "^", "v", "P")
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": LINE,
    "xtick.color": INK, "ytick.color": INK, "axes.facecolor": "none", "savefig.transparent": True,
    "svg.hashsalt": "fastloss",
}  # fmt: skip
ROW, WIDTH, LEGEND_LINE = 0.46, 9.0, 0.2  # inches
ABREAST = 7  # names in a line of the legend


def draw_all() -> Iterator[pathlib.Path]:
    """Draw what the results allow; the files written."""
    for device, name in DEVICES.items():
        groups = {
            key: group
            for key, group in grouped(rows_of(device, "both", "step")).items()
            if is_headline(group["fastloss"])
        }
        if not groups:
            continue
        sample = next(iter(groups.values()))["fastloss"]
        where = f"{sample['device']}, {sample['threads']} threads" if device == "cpu" else name
        folder = RESULTS / device
        with plt.rc_context(STYLE):
            yield _multiples(groups, "p50_ms", folder / "speed.svg", f"Time of forward + backward, {where}", "ms")
            title = f"Peak memory beyond the inputs, {where}"
            yield _multiples(groups, "peak_mib", folder / "memory.svg", title, "MiB")
            yield _roofline(groups, folder / "roofline.svg", where)
            scaled = [r for r in read_all(folder / "scaling") if r["mode"] == "both"]
            if any(r["p50_ms"] for r in scaled):
                yield _scaling(scaled, folder, where)


def _short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _look(names: list[str]) -> dict[str, tuple[str, str]]:
    """(colour, marker) by provider, the same in all pictures of a device."""
    libraries = sorted(n for n in names if n not in BASE and n != "fastloss")
    look = {name: (colour, "o") for name, colour in COLOURS.items()} | {"fastloss": (OURS, "o")}
    for i, name in enumerate(libraries):
        look[name] = (LIBRARIES[i % len(LIBRARIES)], MARKERS[i // len(LIBRARIES) % len(MARKERS)])
    return {name: look[name] for name in ("fastloss", *COLOURS, *libraries) if name in names}


def _names(groups: dict[Key, Group]) -> list[str]:
    return list({name: 0 for group in groups.values() for name, row in group.items() if row["p50_ms"]})


def _canvas(rows: int, title: str, subtitle: str, names: int) -> tuple[plt.Figure, Axes]:
    """Axes with room for so many rows and, above them, a legend of so many names."""
    legend = LEGEND_LINE * math.ceil(names / ABREAST)
    height = ROW * rows + 1.35 + legend
    figure, axes = plt.subplots(figsize=(WIDTH, height))
    figure.subplots_adjust(left=0.33, right=0.965, top=1 - (0.78 + legend) / height, bottom=0.52 / height)
    figure.text(0.018, 1 - 0.20 / height, title, size=13, weight="bold", va="top")
    figure.text(0.018, 1 - 0.50 / height, subtitle, size=9.5, va="top", color=FAINT)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.yaxis.set_major_locator(NullLocator())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(length=0, pad=6)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x", color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _row_labels(axes: Axes, keys: list[Key]) -> None:
    """Loss in the first line; options, shape and dtype, smaller, in the second."""
    for y, (loss, options, shape, dtype) in enumerate(keys):
        about = ", ".join(x for x in (short(options), shape_label(shape), dtype) if x)
        about = about if len(about) < 48 else about[:46] + "\u2026"
        axes.annotate(
            loss,
            (0, y),
            (-203, 5),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            size=10,
            va="center",
            annotation_clip=False,
        )
        axes.annotate(
            about,
            (0, y),
            (-203, -7),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            size=7.5,
            va="center",
            color=FAINT,
            annotation_clip=False,
        )


def _at_the_right(axes: Axes, y: float, text: str) -> None:
    axes.annotate(
        text,
        (1, y),
        (4, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        size=8.5,
        va="center",
        ha="right",
        color=OURS,
        annotation_clip=False,
    )


def _legend(figure: plt.Figure, look: dict[str, tuple[str, str]]) -> None:
    handles = [
        plt.Line2D([], [], marker=marker, color=colour, linestyle="", markersize=7, label=name)
        for name, (colour, marker) in look.items()
    ]
    height = figure.get_size_inches()[1]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.008, 1 - 0.70 / height),
        frameon=False,
        ncols=min(len(look), ABREAST),
        fontsize=8.5,
        handletextpad=0.1,
        columnspacing=1.2,
        borderpad=0,
    )


def _save(figure: plt.Figure, path: pathlib.Path) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return path


def _times(value: float, _: object = None) -> str:
    return f"{value:g}\u00d7"


def _multiples(groups: dict[Key, Group], column: str, path: pathlib.Path, title: str, unit: str) -> pathlib.Path:
    """A line per row, fastloss at 1 and every other provider at its multiple, on a logarithmic axis."""
    groups = {key: group for key, group in groups.items() if group["fastloss"][column]}
    look = _look(_names(groups))
    subtitle = "as a multiple of fastloss's, whose own stands at the right"
    figure, axes = _canvas(len(groups), title, subtitle, len(look))
    low, high = 0.8, 2.0
    for y, group in enumerate(groups.values()):
        ours = max(float(group["fastloss"][column]), 0.1 if unit == "MiB" else 1e-6)
        known = {n: float(r[column] or 0) for n, r in group.items() if n in look}
        found = {name: value / ours for name, value in known.items() if value > 0}
        low, high = min(low, *found.values()), max(high, *found.values())
        axes.plot([min(found.values()), max(found.values())], [y, y], color=LINE, linewidth=3, solid_capstyle="round")
        for name, value in found.items():
            colour, marker = look[name]
            axes.plot(
                value,
                y,
                marker,
                color=colour,
                markersize=9 if name == "fastloss" else 7.5,
                zorder=4 if name == "fastloss" else 3,
            )
        _at_the_right(axes, y, f"{_short(ours)} {unit}")
    axes.set_xscale("log")
    axes.set_xlim(low / 1.15, high**1.18 * 1.15)
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if low / 1.15 <= t <= high * 1.3]
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(_times))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axvline(1, color=OURS, linewidth=1.2, alpha=0.7, zorder=1)
    _row_labels(axes, list(groups))
    _legend(figure, look)
    return _save(figure, path)


def _roofline(groups: dict[Key, Group], path: pathlib.Path, where: str) -> pathlib.Path:
    """The share of the ceiling: a bar for fastloss, marks for the others."""
    groups = {key: group for key, group in groups.items() if group["fastloss"]["share"]}
    tops: dict[str, list[float]] = {}
    for row in (r for group in groups.values() for r in group.values() if r.get("ceiling")):
        tops.setdefault(row["unit"], []).append(float(row["ceiling"]))
    named = {"GB/s": "copying memory", "TFLOP/s": "a large matrix product"}
    roofs = (f"{named[unit]} ({_short(min(t))} to {_short(max(t))} {unit})" for unit, t in sorted(tops.items()))
    subtitle = f"100 % is what {' and '.join(roofs)} reached beside the row"
    look = _look(_names(groups))
    figure, axes = _canvas(len(groups), f"Share of the ceiling, {where}", subtitle, len(look))
    most = 1.0
    for y, group in enumerate(groups.values()):
        for name, row in group.items():
            if name not in look or not row["share"]:
                continue
            colour, marker = look[name]
            share = float(row["share"])
            most = max(most, share)
            if name == "fastloss":
                axes.barh(y, share, height=0.34, color=colour, alpha=0.75, zorder=2)
                _at_the_right(axes, y, f"{_short(float(row['rate']))} {row['unit']}")
            else:
                axes.plot(share, y, marker, color=colour, markersize=7.5, zorder=4)
    axes.set_xlim(0, most * 1.22)
    axes.set_xticks([t / 5 for t in range(int(5 * most * 1.02) + 1)])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.axvline(1, color=INK, linewidth=1.4, linestyle=(0, (4, 3)))
    _row_labels(axes, list(groups))
    _legend(figure, look)
    return _save(figure, path)


def _size(shape: str) -> int:
    """The number that scaling changes: rows, pixels or tokens."""
    numbers = [int(n) for n in shape.split("+")[0].split("x")]
    return numbers[0] if len(numbers) < 4 else numbers[-1] if len(numbers) == 4 else numbers[2]


def _scaling(rows: list[dict[str, str]], folder: pathlib.Path, where: str) -> pathlib.Path:
    """Time over size, a panel per loss; the end of a line that ran out of memory is crossed out."""
    most = max(int(r["threads"] or 0) for r in rows if r["p50_ms"])
    rows = [r for r in rows if int(r["threads"] or 0) == most]
    losses = list({r["loss"]: 0 for r in rows if r["p50_ms"]})
    columns = min(3, len(losses))
    lines = math.ceil(len(losses) / columns)
    height = 2.7 * lines + 1.2
    figure, grid = plt.subplots(lines, columns, figsize=(WIDTH, height), squeeze=False)
    margins = {"left": 0.075, "right": 0.985, "top": 1 - 1.35 / height, "bottom": 0.55 / height}
    figure.subplots_adjust(**margins, wspace=0.28, hspace=0.5)
    figure.text(0.018, 1 - 0.20 / height, f"Time over size, {where}", size=13, weight="bold", va="top")
    figure.text(
        0.018,
        1 - 0.50 / height,
        "ms of forward + backward over rows, pixels or tokens; a cross is the last size that fitted in memory",
        size=9.5,
        va="top",
        color=FAINT,
    )
    look = _look(list({r["provider"]: 0 for r in rows if r["p50_ms"]}))
    for axes in grid.flat[len(losses) :]:
        axes.set_visible(False)
    for loss, axes in zip(losses, grid.flat, strict=False):
        axes.set_title(loss, size=10, loc="left", color=INK)
        for name, (colour, marker) in look.items():
            own = [r for r in rows if r["loss"] == loss and r["provider"] == name]
            timed = [(_size(r["shape"]), float(r["p50_ms"])) for r in own if r["p50_ms"]]
            if timed:
                axes.plot(
                    *zip(*timed, strict=True),
                    marker=marker,
                    color=colour,
                    markersize=4,
                    linewidth=2.2 if name == "fastloss" else 1.3,
                    zorder=4 if name == "fastloss" else 3,
                )
                if any(r["note"].startswith("out of memory") for r in own):
                    axes.plot(*timed[-1], "x", color=colour, markersize=11, markeredgewidth=2.2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.tick_params(length=0, labelsize=8)
        axes.grid(color=LINE, linewidth=0.7)
        for side in ("right", "top"):
            axes.spines[side].set_visible(False)
    _legend(figure, look)
    return _save(figure, folder / "scaling.svg")
