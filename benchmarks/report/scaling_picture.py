"""scaling.svg: time over size, a panel per loss; a cross is the last size of who then ran out of memory."""

from __future__ import annotations

import math
import pathlib
import textwrap

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.report import look

COLUMNS = 3
UNITS = {"rows": "rows", "side": "pixels along a side", "tokens": "tokens"}


def draw_scaling(rows: list[dict[str, str]], path: pathlib.Path, where: str) -> pathlib.Path:
    most = max(int(r["threads"] or 0) for r in rows if r["p50_ms"])
    rows = [r for r in rows if int(r["threads"] or 0) == most]
    losses = list({r["loss"]: 0 for r in rows if r["p50_ms"]})
    columns = min(COLUMNS, len(losses))
    lines = math.ceil(len(losses) / columns)
    height = 2.7 * lines + 1.0
    figure, grid = plt.subplots(lines, columns, figsize=(look.WIDTH, height), squeeze=False)
    margins = {"left": 0.085, "right": 0.985, "top": 1 - 1.3 / height, "bottom": 0.6 / height}
    figure.subplots_adjust(**margins, wspace=0.33, hspace=0.52)
    subtitle = "ms of forward + backward; a cross is the last size of who then ran out of memory"
    look.headings(figure, f"Time over size, {where}", subtitle)
    looks = look.look(r["provider"] for r in rows if r["p50_ms"])
    for axes in grid.flat[len(losses) :]:
        axes.set_visible(False)
    for i, (loss, axes) in enumerate(zip(losses, grid.flat, strict=False)):
        _panel(axes, loss, [r for r in rows if r["loss"] == loss], looks)
        if i % columns == 0:
            axes.set_ylabel("ms", size=9)
    look.legend(figure, looks)
    return look.save(figure, path)


def _panel(axes: Axes, loss: str, rows: list[dict[str, str]], looks: dict[str, tuple[str, str]]) -> None:
    """Lines with hollow marks, ours filled and small, so that those in one place are all seen."""
    axes.set_title("\n".join(textwrap.wrap(loss, 26)), size=9.5, loc="left", color=look.INK)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes: list[int] = []
    times: list[float] = []
    for name, (colour, marker) in looks.items():
        own = [r for r in rows if r["provider"] == name]
        timed = [(size_of(r["shape"]), float(r["p50_ms"])) for r in own if r["p50_ms"]]
        if not timed:
            continue
        sizes += [size for size, _ in timed]
        times += [time for _, time in timed]
        ours = name == "fastloss"
        axes.plot(
            *zip(*timed, strict=True), marker=marker, color=colour, markersize=4 if ours else 6.5,
            markerfacecolor=colour if ours else "none", linewidth=1.8 if ours else 1.1, zorder=4 if ours else 3,
        )  # fmt: skip
        if any(r["note"].startswith("out of memory") for r in own):
            axes.plot(*timed[-1], "x", color=colour, markersize=11, markeredgewidth=1.8, zorder=5)
    _axes_of(axes, rows[0]["shape"], sizes, times)


def _axes_of(axes: Axes, shape: str, sizes: list[int], times: list[float]) -> None:
    """Ticks at every second power of two and, over time, at every power of ten, or at 1, 2, 5 where it is short."""
    first, last = math.log2(min(sizes)), math.log2(max(sizes))
    step = 1 if last - first <= 4 else 2
    axes.set_xlim(2 ** (first - 0.4), 2 ** (last + 0.4))
    axes.xaxis.set_major_locator(FixedLocator([2**e for e in range(math.ceil(first), int(last) + 1, step)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = look.round_limits(min(times) / 1.2, max(times) * 1.2)
    axes.set_ylim(low, high)
    inside = [t for t in look.TICKS if low <= t <= high]
    tens = [t for t in inside if f"{t:e}".startswith("1.000")]
    axes.yaxis.set_major_locator(FixedLocator(tens if len(inside) > 7 else inside))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    look.bare(axes, "both")
    axes.set_xlabel(UNITS[unit_of(shape)], size=8.5, labelpad=3)


def unit_of(shape: str) -> str:
    """What scaling changes of a shape like this."""
    axes = shape.split("+")[0].count("x") + 1
    return "rows" if axes < 4 else "side" if axes == 4 else "tokens"


def size_of(shape: str) -> int:
    """The number of them."""
    numbers = [int(n) for n in shape.split("+")[0].split("x")]
    return {"rows": numbers[0], "side": numbers[-1], "tokens": numbers[min(2, len(numbers) - 1)]}[unit_of(shape)]
