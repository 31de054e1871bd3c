"""What a run leaves to look at: retrieval.png, curves.png and report.md."""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import __version__
from ..data.splits import Splits
from ..imagen.curves import points, smooth, windows
from ..imagen.figures import interval
from ..training.metrics import read_metrics
from ..training.pictures import Section, draw_sections, pyplot, save_figure
from .config import Config
from .data import classes_in_words
from .evaluation import FIGURES, Embedded, embed_split, nearest_keys
from .model import TwoEncoders
from .step import learned_numbers

FIGURE_HEAD = "| figure | value | 95 % interval | n | what it is, higher is better |"
SHOWN = 10  # captions in retrieval.png
NEAREST = 8  # images beside each
TRAIN, VALIDATION, FAINT = "tab:blue", "tab:orange", 0.4


class Finished(NamedTuple):
    """A run that is done: its best model, and what is to be said of it."""

    folder: Path
    model: TwoEncoders
    config: Config
    figures: dict[str, float]  # of the test split
    best_step: int
    splits: Splits
    notes: list[str]


def write_report(run: Finished) -> str:
    """Write the three files; the line that sums the run up."""
    retrieval_figure(embed_split(run.model, run.config, run.splits["test"]), run.folder / "retrieval.png")
    curves = read_metrics(run.folder / "metrics.csv")
    curves_figure(curves, run.config, run.folder / "curves.png")
    line = summary(run.config, run.figures, len(curves["step"]))
    (run.folder / "report.md").write_text(_markdown(run, curves, line), encoding="utf-8")
    return line


def summary(config: Config, figures: dict[str, float], steps: int) -> str:
    said = [f"{name} {_share_in_words(figures, name)}" for name in ("top1", "top5", "image_recall5")]
    return f"{config.data}: {steps} steps, " + ", ".join([*said[:2], f"of {figures['classes']:.0f} classes", said[2]])


def retrieval_figure(split: Embedded, path: Path) -> None:
    """Captions of the split, spread over it, each with an image of its own and the nearest ones of the split; a frame
    is around those that show something else."""
    count = min(SHOWN, len(split.texts))
    places = [k * len(split.texts) // count for k in range(count)]
    queries = torch.tensor(places, device=split.text.device)
    ((_, nearest),) = nearest_keys(split.text[queries], split.image, NEAREST)
    rows: list[list[Tensor | None]] = []
    for place, found in zip(places, nearest.tolist(), strict=True):
        own = split.captions.index(split.texts[place])
        wanted = split.text_ids[place]
        seen = [_framed(split.images[i], wrong=bool(split.ids[i] != wanted)) for i in found]
        rows.append([split.images[own], *seen, *[None] * (NEAREST - len(found))])
    columns = ["own", *(f"nearest {k + 1}" if k < 1 else f"{k + 1}" for k in range(NEAREST))]
    title = f"Test captions and their nearest of {len(split.captions)} test images; a frame: of another caption"
    draw_sections([Section(title, columns, [split.texts[place] for place in places], rows)], path)


def _framed(image: Tensor, wrong: bool) -> Tensor:
    """The image in colours, with a red border where it is wrong."""
    coloured = image.expand(3, -1, -1).clone()
    if wrong:
        edge = max(1, image.shape[-1] // 24)
        inside = torch.zeros(image.shape[-2:], dtype=torch.bool)
        inside[edge:-edge, edge:-edge] = True
        coloured[:, ~inside] = torch.tensor([[0.9], [0.1], [0.1]])
    return coloured


def curves_figure(curves: dict[str, list[float]], config: Config, path: Path) -> None:
    """Panels for the loss, what it learned, the learning rate and the figures of the validations."""
    plt = pyplot()
    trained = ["loss", *learned_numbers(config), "learning_rate"]
    found = [name for name in FIGURES if points(curves, f"val_{name}")[0]]
    columns = 3
    rows = -(-(len(trained) + len(found)) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(13, 2.7 * rows), squeeze=False, sharex=True)
    for axis, name in zip(axes.flat, [*trained, *found], strict=False):
        if name in trained:
            _training_panel(axis, curves, name)
        else:
            axis.plot(*points(curves, f"val_{name}"), marker="o", markersize=3, color=VALIDATION)
            axis.set_title(f"validation {name}, higher is better", fontsize=9)
            axis.set_ylabel("share", fontsize=8)
            axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.3)
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("step", fontsize=8)
    for axis in axes.flat[len(trained) + len(found) :]:
        axis.set_visible(False)
    figure.tight_layout()
    save_figure(figure, path)
    plt.close(figure)


def _training_panel(axis: Any, curves: dict[str, list[float]], name: str) -> None:
    titles = {
        "loss": ("training loss, lower is better", "nats"),
        "scale": ("learned scale of the similarities", "factor"),
        "bias": ("learned bias of the similarities", "logit"),
        "learning_rate": ("learning rate", "of AdamW"),
    }
    title, unit = titles[name]
    if name == "loss":
        axis.plot(curves["step"], curves[name], linewidth=0.5, alpha=FAINT, color=TRAIN)
    values = smooth(curves[name]) if name == "loss" else curves[name]
    axis.plot(curves["step"], values, linewidth=1.2, color=TRAIN)
    axis.set_title(title, fontsize=9)
    axis.set_ylabel(unit, fontsize=8)


def _share_in_words(figures: dict[str, float], name: str) -> str:
    n = int(figures.get(f"n_{name}", figures["n"]))
    low, high = interval(figures[name], n)
    return f"{figures[name]:.1%} ({100 * low:.0f} to {100 * high:.0f}%, n {n})"


def _figure_rows(figures: dict[str, float]) -> list[tuple[Any, ...]]:
    """Name, value, interval, n and meaning."""
    rows: list[tuple[Any, ...]] = []
    for name, figure in FIGURES.items():
        n = int(figures.get(f"n_{name}", figures["n"]))
        low, high = interval(figures[name], n)
        bounds = f"{low:.3f} to {high:.3f}" if figure.share else ""
        rows.append((name, f"{figures[name]:.4f}", bounds, n if figure.share else "", figure.meaning))
    return rows


def _table(head: str, align: str, lines: list[tuple[Any, ...]]) -> list[str]:
    return [head, align, *("| " + " | ".join(map(str, line)) + " |" for line in lines), ""]


def _meaning(run: Finished) -> str:
    figures = run.figures
    return (
        f"top1 and top5 choose among {figures['classes']:.0f} classes: {classes_in_words(run.config)}. caption_recall "
        f"chooses among the {figures['captions']:.0f} distinct captions of the split, image_recall among its "
        f"{figures['n']:.0f} images. n is the number of images, for image_recall of captions; intervals are Wilson's."
    )


def _markdown(run: Finished, curves: dict[str, list[float]], line: str) -> str:
    config = run.config
    window = windows(curves)
    numbers = [(name, f"{window.first[name]:.4g}", f"{window.last[name]:.4g}")
               for name in ("loss", *learned_numbers(config))]  # fmt: skip
    steps = "the only step" if len(curves["step"]) == 1 else f"the first and of the last {window.n} steps"
    speed = sum(curves["samples_per_second"]) / len(curves["step"])
    of_images, of_texts = config.encoders()
    options = dataclasses.asdict(config) | {
        "channels": config.image_channels(),
        "image_encoder": of_images,
        "text_encoder": of_texts,
        "device": str(config.torch_device()),
        **({"val_percent": "a fixed split", "test_percent": "a fixed split"} if config.embedded() else {}),
    }
    return "\n".join(
        [
            f"# Image-text pre-training on {config.data}",
            "",
            f"{line}.",
            "",
            *(f"{note}\n" for note in run.notes),
            "The figures are those of the model with the best validation score, from step "
            f"{run.best_step}, on the test split. Mean throughput {speed:.0f} pairs a second.",
            "",
            *_table(FIGURE_HEAD, "|---|--:|--:|--:|---|", _figure_rows(run.figures)),
            _meaning(run),
            "",
            f"## Training, means of {steps}",
            "",
            *_table("| number | first | last |", "|---|--:|--:|", numbers),
            "![curves](curves.png)",
            "",
            "## Captions and their nearest images",
            "",
            "![retrieval](retrieval.png)",
            "",
            "## Options",
            "",
            *_table("| option | value |", "|---|---|", list(options.items())),
            f"fastloss {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
            f"{platform.machine()}, {torch.get_num_threads()} threads.",
            "",
        ]
    )
