"""What a run leaves to look at: samples.png, curves.png and report.md."""

from __future__ import annotations

import dataclasses
import platform
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import __version__
from ..data.batches import batches, open_dataset
from ..training.checkpoint import BEST, load_checkpoint
from ..training.metrics import read_metrics
from .build import generate
from .config import DIGITS, WEIGHTS, Config
from .model import Imagen

ROWS, COLUMNS = 12, 6
DIGIT_WORDS = (("bold", "leaning right"), ("thin", "upright"), ("", "leaning left"))


def write_report(folder: Path, model: Imagen, config: Config, figures: dict[str, float], note: str) -> str:
    """Write the three files; the line that sums the run up."""
    captions, real = example_captions(config)
    generated = torch.stack([generate(model, captions, seed).cpu() for seed in range(COLUMNS)], 1)
    grid_figure(captions, generated, folder / "samples.png", real)
    curves = read_metrics(folder / "metrics.csv")
    curves_figure(curves, folder / "curves.png")
    line = summary(config, figures, curves)
    best_step = load_checkpoint(folder / BEST)["progress"]["step"] if (folder / BEST).exists() else len(curves["step"])
    (folder / "report.md").write_text(_markdown(config, figures, curves, best_step, note, line), encoding="utf-8")
    return line


def summary(config: Config, figures: dict[str, float], curves: dict[str, list[float]]) -> str:
    parts = [f"{config.data}: {len(curves['step'])} steps"]
    if config.data == DIGITS:
        parts += [
            f"right digit for {figures['accuracy']:.1%} of held-out captions",
            f"z diversity {figures['z_diversity']:.3f} (real {figures['z_diversity_real']:.3f})",
            f"bold - thin {figures['weight_effect']:+.3f} (real {figures['weight_effect_real']:+.3f})",
            f"right - left {figures['slant_effect']:+.3f} (real {figures['slant_effect_real']:+.3f})",
        ]
    else:
        parts += [f"caption retrieval {figures['retrieval']:.1%}", f"mean error {figures['mae']:.4f}"]
    return ", ".join(parts)


def example_captions(config: Config) -> tuple[list[str], Tensor | None]:
    """Captions of the grid, and a real image of the test split for each: every digit, or the split's first captions."""
    data: Any = open_dataset(config.data, "test", config.size, config.image_channels())
    if config.data == DIGITS:
        from ..data.digits import caption_of

        chosen = [caption_of(label, *DIGIT_WORDS[label % 3]) for label in range(10)]
        chosen += [caption_of(7, "bold", "leaning left"), caption_of(7, "thin", "leaning right")]
        real = {data[i]["caption"]: data[i]["image"] for i in range(len(data))}
        none = torch.zeros(1, config.size, config.size)
        return chosen, torch.stack([real.get(text, none) for text in chosen])
    batch = next(iter(batches(data, ROWS, 0, 0)))
    return batch["caption"], batch["image"]


def grid_figure(captions: Sequence[str], images: Tensor, path: Path, real: Tensor | None = None) -> None:
    """A row for each caption: the caption, a real image of it where there is one, and images (N, K, C, S, S)."""
    plt = _pyplot()
    columns = images.shape[1] + (real is not None)
    size = (1.0 * columns + 3.2, 1.0 * len(captions) + 0.5)
    figure, axes = plt.subplots(len(captions), columns, figsize=size, squeeze=False)
    for row, caption in zip(axes, captions, strict=True):
        row[0].text(-0.15, 0.5, textwrap.fill(caption, 30), transform=row[0].transAxes, ha="right", va="center")
    for i, row in enumerate(axes):
        shown = list(images[i]) if real is None else [real[i], *images[i]]
        for axis, image in zip(row, shown, strict=True):
            axis.imshow(image.clamp(0, 1).float().permute(1, 2, 0).squeeze(-1), cmap="gray", vmin=0, vmax=1)
            axis.axis("off")
    if real is not None:
        axes[0][0].set_title("real", fontsize=10)
    for k, axis in enumerate(axes[0][real is not None :]):
        axis.set_title(f"z {k + 1}", fontsize=10)
    figure.subplots_adjust(left=3.0 / size[0], right=0.99, bottom=0.01, top=1 - 0.4 / size[1], wspace=0.06, hspace=0.06)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def curves_figure(curves: dict[str, list[float]], path: Path) -> None:
    """The fused loss and each part over the steps, a panel each, every panel with its own scale."""
    plt = _pyplot()
    names = ["loss", *(name for name in WEIGHTS if name in curves), "learning_rate"]
    columns = 3
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(12, 2.6 * rows), squeeze=False, sharex=True)
    for axis, name in zip(axes.flat, names, strict=False):
        exact = name == "learning_rate"
        axis.plot(curves["step"], curves[name], linewidth=0.5, alpha=1 if exact else 0.4, color="tab:blue")
        if not exact:
            axis.plot(curves["step"], _smooth(curves[name]), linewidth=1.2, color="tab:blue")
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _smooth(values: Sequence[float], keep: float = 0.8) -> list[float]:
    """Exponential mean without the pull to 0 at its start."""
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + 1 - keep
        out.append(mean / weight)
    return out


def _markdown(
    config: Config, figures: dict[str, float], curves: dict[str, list[float]], best_step: int, note: str, line: str
) -> str:
    weights = WEIGHTS | config.loss_weights()
    tail = min(50, len(curves["step"]))
    losses = [
        f"| {name} | {weight:g} | {_mean(curves[name][:tail]):.4g} | {_mean(curves[name][-tail:]):.4g} |"
        for name, weight in weights.items()
        if name in curves
    ]
    speed = _mean(curves["samples_per_second"])
    options = [f"| {name} | {value} |" for name, value in dataclasses.asdict(config).items() if value != ""]
    return "\n".join(
        [
            f"# Text to image on {config.data}",
            "",
            f"{line}.",
            "",
            f"{note} The figures are those of the model with the best validation score, from step {best_step}, on the "
            f"test split. Mean throughput {speed:.0f} images a second with the {config.losses} losses.",
            "",
            "| figure | value |",
            "|---|--:|",
            *(f"| {name} | {value:.4f} |" for name, value in figures.items()),
            "",
            f"## Losses, mean of the first and last {tail} steps",
            "",
            "| loss | weight | first | last |",
            "|---|--:|--:|--:|",
            *losses,
            "",
            "![curves](curves.png)",
            "",
            "## Samples: a real image, then six z",
            "",
            "![samples](samples.png)",
            "",
            "## Options",
            "",
            "| option | value |",
            "|---|---|",
            *options,
            "",
            f"fastloss {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
            f"{platform.machine()}, {torch.get_num_threads()} threads.",
            "",
        ]
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
