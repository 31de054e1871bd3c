"""accuracy.svg: of each loss and provider the largest error of the gradient over all inputs, in two dtypes."""

from __future__ import annotations

import math
import pathlib

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.report import look
from benchmarks.report.accuracy import error_of, grouped

DTYPES = ("bfloat16", "float32")
LEAST = 1e-9  # what is exact, or more exact than this, stands here


def draw_errors(rows: tuple[dict[str, str], ...], path: pathlib.Path, where: str) -> pathlib.Path:
    worst: dict[str, dict[str, dict[str, float]]] = {}  # loss -> dtype -> provider
    for (loss, _, _, dtype, _), group in grouped(rows).items():
        for name, row in group.items():
            error = error_of(row, "gradient")
            if error is not None and dtype in DTYPES:
                found = worst.setdefault(loss, {}).setdefault(dtype, {})
                found[name] = max(found.get(name, LEAST), error)
    looks = look.look(n for by_dtype in worst.values() for found in by_dtype.values() for n in found)
    subtitle = "against float64 of the same inputs; of each loss the worst of all inputs and options that it has"
    figure, panels = look.canvas(len(worst), f"Largest error of the gradient, {where}", subtitle, len(looks), 2)
    for axes, dtype in zip(panels, DTYPES, strict=True):
        _panel(axes, dtype, [by_dtype.get(dtype, {}) for by_dtype in worst.values()], looks)
    states = {loss: len({key[4] for key in grouped(rows) if key[0] == loss}) for loss in worst}
    look.row_labels(panels[0], [(loss, f"{states[loss]} kinds of inputs") for loss in worst])
    look.legend(figure, looks)
    return look.save(figure, path)


def _panel(axes: Axes, dtype: str, rows: list[dict[str, float]], looks: dict[str, tuple[str, str]]) -> None:
    finite = [e for found in rows for e in found.values() if math.isfinite(e)] or [1.0]
    low, high = (10.0 ** math.floor(math.log10(min(finite))), 10.0 ** math.ceil(math.log10(max(finite))))
    beyond = high * 10 if any(math.isinf(e) for found in rows for e in found.values()) else high
    axes.set_title(dtype, size=10, loc="left", color=look.INK)
    axes.set_xscale("log")
    axes.set_xlim(low / 2, beyond * 2)
    step = 1 if math.log10(beyond / low) <= 5 else 2
    tens = [10.0**e for e in range(round(math.log10(low)), round(math.log10(high)) + 1) if e % step == 0]
    axes.xaxis.set_major_locator(FixedLocator([*tens, beyond] if beyond > high else tens))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: "not finite" if v > high else _tick(v)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("share of the gradient's norm (less is better)", size=8.5)
    near = math.log10(4 * beyond / low) * 0.045
    for y, found in enumerate(rows):
        shown = {name: error if math.isfinite(error) else beyond for name, error in found.items()}
        if shown:
            axes.plot([min(shown.values()), max(shown.values())], [y, y], color=look.LINE, linewidth=2.5, zorder=1)
            look.dots(axes, y, shown, near, looks)


def _tick(value: float) -> str:
    """`100 %`, `0.1 %`, `1e-6`."""
    return f"{100 * value:,g} %" if value >= 1e-4 else f"1e{round(math.log10(value))}"
