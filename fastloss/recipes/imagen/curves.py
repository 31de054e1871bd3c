"""curves.png: the losses of the training steps with their weighted shares, and the figures of the validations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..training.pictures import pyplot, save_figure
from .config import WEIGHTS
from .figures import FIGURES

TRAIN, VALIDATION = "tab:blue", "tab:orange"
WINDOW = 50  # steps at most in the first and in the last window of a run
UNITS = {
    "contrastive": "nats",
    "perceptual": "features",
    "pixel": "squared difference",
    "smoothness": "difference to the next pixel",
    "diversity": "difference short of the margin",
    "mode_seeking": "dz / dx",
    "attention": "nats",
    "prior": "nats an image",
}
VALIDATED_UNITS = {name: "share" for name, figure in FIGURES.items() if figure.share} | {
    "mae": "abs difference, range 0 to 1",
    "score": "shares less mae",
    "z_diversity": "abs difference, range 0 to 1",
    "weight_effect": "share of the side",
    "slant_effect": "width per height",
}


class Windows(NamedTuple):
    """The means of the first and of the last steps, `n` in each; they have no step in common. For one step both are
    it, and `n` is 1."""

    first: dict[str, float]
    last: dict[str, float]
    n: int


def windows(curves: dict[str, list[float]]) -> Windows:
    n = max(1, min(WINDOW, len(curves["step"]) // 2))
    first = {name: sum(values[:n]) / n for name, values in curves.items()}
    return Windows(first, {name: sum(values[-n:]) / n for name, values in curves.items()}, n)


def shares(curves: dict[str, list[float]], weights: dict[str, float]) -> dict[str, float]:
    """Of the fused loss over the last window, the part of each loss times its weight."""
    last = windows(curves).last
    weighted = {name: weight * last[name] for name, weight in weights.items() if name in last}
    total = sum(abs(value) for value in weighted.values())
    return {name: abs(value) / total if total else 0.0 for name, value in weighted.items()}


def percent(share: float) -> str:
    """A share in whole percent: "42%", and "<1%" for what is not nothing."""
    return "<1%" if 0 < share < 0.01 else f"{share:.0%}"


def curves_figure(curves: dict[str, list[float]], path: Path, weights: dict[str, float], weighting: str) -> None:
    """A panel each for the fused loss, its parts, the learning rate and the figures of the validations; each has its
    own scale, a unit, and says whether lower or higher is better."""
    plt = pyplot()
    losses = ["loss", *(name for name in WEIGHTS if name in curves)]
    found = [name for name in (f"val_{figure}" for figure in FIGURES) if name in curves and points(curves, name)[0]]
    names = [*losses, "learning_rate", *found]
    columns = 3
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(13, 2.7 * rows), squeeze=False, sharex=True)
    part = shares(curves, weights) if weighting == "fixed" else {}
    for axis, name in zip(axes.flat, names, strict=False):
        if name in found:
            _validation_panel(axis, curves, name)
        else:
            _training_panel(axis, curves, name, part.get(name))
        axis.grid(alpha=0.3)
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("step", fontsize=8)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    figure.tight_layout()
    save_figure(figure, path)
    plt.close(figure)


def _training_panel(axis: Any, curves: dict[str, list[float]], name: str, part: float | None) -> None:
    exact = name == "learning_rate"
    if not exact:
        axis.plot(curves["step"], curves[name], linewidth=0.5, alpha=0.4, color=TRAIN)
    axis.plot(curves["step"], curves[name] if exact else smooth(curves[name]), linewidth=1.2, color=TRAIN)
    title = {"loss": "training loss, lower is better", "learning_rate": "learning rate"}.get(
        name, f"training {name.replace('_', ' ')}, lower is better"
    )
    if part is not None:
        title += f"; {percent(part)} of the loss"
    axis.set_title(title, fontsize=9)
    axis.set_ylabel({"loss": "weighted sum", "learning_rate": "of Adam"}.get(name) or UNITS[name], fontsize=8)


def _validation_panel(axis: Any, curves: dict[str, list[float]], name: str) -> None:
    figure = name.removeprefix("val_")
    steps, values = points(curves, name)
    axis.plot(steps, values, marker="o", markersize=3, linewidth=1.2, color=VALIDATION)
    axis.set_title(f"validation {figure.replace('_', ' ')}, {FIGURES[figure].better} is better", fontsize=9)
    axis.set_ylabel(VALIDATED_UNITS[figure], fontsize=8)
    if FIGURES[figure].share:
        axis.set_ylim(-0.03, 1.03)


def points(curves: dict[str, list[float]], name: str) -> tuple[list[float], list[float]]:
    pairs = [(step, v) for step, v in zip(curves["step"], curves[name], strict=True) if not math.isnan(v)]
    return [step for step, _ in pairs], [v for _, v in pairs]


def smooth(values: Sequence[float], keep: float = 0.8) -> list[float]:
    """Exponential mean without the pull to 0 at its start."""
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + 1 - keep
        out.append(mean / weight)
    return out
