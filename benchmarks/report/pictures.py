"""Pictures of the results, readable on light and on dark pages.

speed.svg      time of each provider, as a multiple of fastloss's, of the headline rows
memory.svg     the same for peak memory
roofline.svg   how much of what the hardware allows (copy bandwidth, matrix products) each provider reaches
scaling.svg    time over size, up to where a provider ran out of memory (scaling_picture.py)
accuracy.svg   the largest errors of the gradient (accuracy_picture.py)
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator

import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.harness.results import RESULTS, read_all
from benchmarks.report import accuracy, look
from benchmarks.report.accuracy_picture import draw_errors
from benchmarks.report.scaling_picture import draw_scaling
from benchmarks.report.tables import DEVICES, Group, Key, grouped, is_headline, rows_of, shape_label, short

Groups = dict[Key, Group]


def draw_all() -> Iterator[pathlib.Path]:
    """Draw what the results allow; the files written."""
    for device, name in DEVICES.items():
        chosen = grouped(rows_of(device, "both", "step"))
        groups = {key: group for key, group in chosen.items() if is_headline(group["fastloss"])}
        folder = RESULTS / device
        with plt.rc_context(look.STYLE):
            if groups:
                rows = [group["fastloss"] for group in groups.values()]
                processors = " and ".join(dict.fromkeys(row["device"] for row in rows))
                where = f"{processors}, {rows[0]['threads']} threads" if device == "cpu" else name
                yield from _of_headlines(groups, folder, where)
            errors = accuracy.rows_of(device)
            if errors:
                yield draw_errors(errors, folder / "accuracy.svg", name)


def _of_headlines(groups: Groups, folder: pathlib.Path, where: str) -> Iterator[pathlib.Path]:
    yield _multiples(groups, "p50_ms", folder / "speed.svg", f"Time of forward + backward, {where}", "ms")
    yield _multiples(groups, "peak_mib", folder / "memory.svg", f"Peak memory beyond the inputs, {where}", "MiB")
    yield _roofline(groups, folder / "roofline.svg", where)
    scaled = [r for r in read_all(folder / "scaling") if r["mode"] == "both"]
    if any(r["p50_ms"] for r in scaled):
        yield draw_scaling(scaled, folder / "scaling.svg", where)


def _looks(groups: Groups) -> dict[str, tuple[str, str]]:
    return look.look(name for group in groups.values() for name, row in group.items() if row["p50_ms"])


def _labels(groups: Groups) -> list[tuple[str, str]]:
    return [(loss, ", ".join(filter(None, (short(o), shape_label(shape), dtype)))) for loss, o, shape, dtype in groups]


def _multiples(groups: Groups, column: str, path: pathlib.Path, title: str, unit: str) -> pathlib.Path:
    """A line per row, fastloss at 1 and every other provider at its multiple, on a logarithmic axis."""
    groups = {key: group for key, group in groups.items() if group["fastloss"][column]}
    looks = _looks(groups)
    rows = []
    for group in groups.values():
        ours = max(float(group["fastloss"][column]), 0.1 if unit == "MiB" else 1e-6)
        known = {n: float(r[column] or 0) for n, r in group.items() if n in looks}
        rows.append((ours, {name: value / ours for name, value in known.items() if value > 0}))
    subtitle = f"as a multiple of fastloss's, whose own {unit} stand at the right"
    figure, (axes,) = look.canvas(len(groups), title, subtitle, len(looks))
    low, high = look.round_limits(
        min(0.8, *(v for _, f in rows for v in f.values())), max(2.0, *(v for _, f in rows for v in f.values()))
    )
    axes.set_xscale("log")
    axes.set_xlim(low / 1.1, high * (high / low) ** 0.15)
    axes.xaxis.set_major_locator(FixedLocator([t for t in look.TICKS if low <= t <= high]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}\u00d7"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"{unit}, as a multiple of fastloss's (less is better)", size=9)
    axes.axvline(1, color=look.OURS, linewidth=1.2, alpha=0.7, zorder=1)
    decades = axes.get_xlim()[1] / axes.get_xlim()[0]
    for y, (ours, found) in enumerate(rows):
        ends = min(found.values()), max(found.values())
        axes.plot(ends, [y, y], color=look.LINE, linewidth=2.5, solid_capstyle="round", zorder=1)
        look.dots(axes, y, found, _near(decades), looks)
        look.at_the_right(axes, y, f"{look.number(ours)} {unit}")
    look.row_labels(axes, _labels(groups))
    look.legend(figure, looks)
    return look.save(figure, path)


def _near(ratio: float) -> float:
    """How many decades a mark is wide on a logarithmic axis whose ends have this ratio."""
    return math.log10(ratio) * 0.0215


def _roofline(groups: Groups, path: pathlib.Path, where: str) -> pathlib.Path:
    """The share of the ceiling: a bar for fastloss, marks for all."""
    groups = {key: group for key, group in groups.items() if group["fastloss"]["share"]}
    tops: dict[str, list[float]] = {}
    for row in (r for group in groups.values() for r in group.values() if r.get("ceiling")):
        tops.setdefault(row["unit"], []).append(float(row["ceiling"]))
    named = {"GB/s": "copying memory", "TFLOP/s": "a large product"}
    roofs = (f"{named[u]} ({look.number(min(t))} to {look.number(max(t))} {u})" for u, t in sorted(tops.items()))
    subtitle = f"of what {' or '.join(roofs)} reached beside the row"
    looks = _looks(groups)
    figure, (axes,) = look.canvas(len(groups), f"Share of the ceiling, {where}", subtitle, len(looks))
    shares = [{n: float(r["share"]) for n, r in g.items() if n in looks and r["share"]} for g in groups.values()]
    most = max(1.0, *(value for found in shares for value in found.values()))
    end = 0.2 * -(-most // 0.2)
    axes.set_xlim(-0.02 * end, end * 1.2)
    axes.set_xticks([t / 5 for t in range(round(5 * end) + 1)])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_xlabel("share of the ceiling (more is better)", size=9)
    axes.axvline(1, color=look.INK, linewidth=1.4, linestyle=(0, (4, 3)), zorder=1)
    for y, (found, group) in enumerate(zip(shares, groups.values(), strict=True)):
        axes.barh(y, found["fastloss"], height=0.16, color=look.OURS, alpha=0.35, zorder=2)
        look.dots(axes, y, found, 0.0215 * 1.2 * end, looks)
        row = group["fastloss"]
        look.at_the_right(axes, y, f"{look.number(float(row['rate']))} {row['unit']}")
    look.row_labels(axes, _labels(groups))
    look.legend(figure, looks)
    return look.save(figure, path)
