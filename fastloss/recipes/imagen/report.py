"""What a run leaves to look at: samples.png, curves.png and report.md."""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ... import __version__
from ..data.splits import Splits
from ..training.metrics import read_metrics
from ..training.pictures import Section, caption_rows, draw_sections, stacked
from .build import generate
from .config import DIGITS, WEIGHTS, Config
from .curves import curves_figure, percent, shares, windows
from .examples import Progress, held_out_examples, nearest_training_images, seen_examples
from .figures import rows, shown
from .model import Imagen

SAMPLES = 4  # images of each caption in samples.png


class Finished(NamedTuple):
    """A run that is done: its best model, and what is to be said of it."""

    folder: Path
    model: Imagen
    config: Config
    figures: dict[str, float]  # of the test split
    best_step: int
    splits: Splits
    progress: Progress
    notes: list[str]


def write_report(run: Finished) -> str:
    """Write the three files; the line that sums the run up."""
    nearest_of = samples_figure(run)
    curves = read_metrics(run.folder / "metrics.csv")
    weights = WEIGHTS | run.config.loss_weights()
    curves_figure(curves, run.folder / "curves.png", weights, run.config.weighting)
    line = summary(run.config, run.figures, curves)
    text = _markdown(run, curves, line, nearest_of)
    (run.folder / "report.md").write_text(text, encoding="utf-8")
    return line


def summary(config: Config, figures: dict[str, float], curves: dict[str, list[float]]) -> str:
    parts = [f"{config.data}: {len(curves['step'])} steps"]
    if config.data == DIGITS:
        parts += [f"right digit {shown('accuracy', figures)}"]
        names = (("z_diversity", "z diversity"), ("weight_effect", "bold - thin"), ("slant_effect", "right - left"))
        parts += [f"{text} {shown(name, figures)} (real {figures[f'{name}_real']:.4f})" for name, text in names]
    else:
        parts += [f"caption retrieval {shown('retrieval', figures)}", f"mean error {shown('mae', figures)}"]
    return ", ".join(parts)


def samples_figure(run: Finished) -> int:
    """Write samples.png: held-out and seen captions, each image beside its nearest training image, and the progress
    over the steps. Returns among how many training images the nearest ones were sought."""
    sections, nearest_of = [], 0
    examples = (
        ("Held-out captions", held_out_examples(run.config, run.splits)),
        ("Seen in training", seen_examples(run.splits)),
    )
    for title, (captions, real) in examples:
        images = stacked([generate(run.model, captions, seed) for seed in range(SAMPLES)])
        nearest, nearest_of = nearest_training_images(images.flatten(0, 1), run.splits)
        columns, cells = caption_rows(captions, images, real, nearest.unflatten(0, images.shape[:2]))
        said = f"{title}: real, then each sample and its nearest of {nearest_of} training images"
        sections.append(Section(said, columns, captions, cells))
    if run.progress.steps:
        count = len(run.progress.steps)
        wanted = 1 + 2 * SAMPLES
        kept = sorted({round(k * (count - 1) / (wanted - 1)) for k in range(wanted)})
        images = stacked([run.progress.images[k].float() / 255 for k in kept])
        columns = [f"step {run.progress.steps[k]}" for k in kept]
        title = "Over the steps: z 1 at the validations"
        sections.append(Section(title, columns, run.progress.captions, [list(row) for row in images]))
    draw_sections(sections, run.folder / "samples.png")
    return nearest_of


def resolved(config: Config) -> dict[str, Any]:
    """The options as the run had them: nothing is "auto" or left to a default elsewhere."""
    perceptual = (WEIGHTS | config.loss_weights())["perceptual"] > 0
    names = config.backbone_names()
    own = "in the package" if names == ["digits"] else "downloaded"
    return dataclasses.asdict(config) | {
        "weights": ",".join(f"{name}={value:g}" for name, value in (WEIGHTS | config.loss_weights()).items()),
        "channels": config.image_channels(),
        "tokenizer": "the text encoder's" if config.text_encoder else "word" if config.word_tokens() else "byte",
        "text_encoder": config.text_encoder or "trained here",
        "backbones": ",".join(names) if perceptual else "none",
        "backbone_weights": _bold_random(config.backbone_weights or own) if perceptual else "none",
        "device": str(config.torch_device()),
        **({"val_percent": "a fixed split", "test_percent": "a fixed split"} if config.data == DIGITS else {}),
    }


def random_backbones(config: Config) -> list[str]:
    """The networks of the perceptual loss that have random weights."""
    names, files = config.backbone_names(), config.backbone_weights.split(",")
    if names == ["digits"] or (WEIGHTS | config.loss_weights())["perceptual"] == 0:
        return []
    return [name for name, file in zip(names, files * (len(names) if len(files) == 1 else 1), strict=False)
            if file == "random"]  # fmt: skip


def _bold_random(files: str) -> str:
    return ",".join("**random**" if file == "random" else file for file in files.split(","))


def _table(head: str, align: str, lines: list[tuple[Any, ...]]) -> list[str]:
    return [head, align, *("| " + " | ".join(map(str, line)) + " |" for line in lines), ""]


def _markdown(run: Finished, curves: dict[str, list[float]], line: str, nearest_of: int) -> str:
    config = run.config
    weights = WEIGHTS | config.loss_weights()
    window = windows(curves)
    part = shares(curves, weights) if config.weighting == "fixed" else {}
    losses = [
        (name, f"{weight:g}", f"{window.first[name]:.4g}", f"{window.last[name]:.4g}",
         percent(part[name]) if name in part else "")
        for name, weight in weights.items() if name in curves
    ]  # fmt: skip
    steps = "the only step" if len(curves["step"]) == 1 else f"the first and of the last {window.n} steps"
    random = ", ".join(random_backbones(config))
    speed = sum(curves["samples_per_second"]) / len(curves["step"])
    warning = [f"**The backbone {random} has random weights: the perceptual loss compares random features.**", ""]
    network = ",".join(config.backbone_names()) + (" (random weights)" if random else "")
    frechet = (
        f"frechet is of the {network} network's last features, averaged over the image, and falls with n: compare it "
        "at the same n only."
        if "frechet" in run.figures
        else "No Fréchet distance: the run has no perceptual network."
    )
    return "\n".join(
        [
            f"# Text to image on {config.data}",
            "",
            f"{line}.",
            "",
            *(warning if random else []),
            *(f"{note}\n" for note in run.notes),
            "The figures are those of the model with the best validation score, from step "
            f"{run.best_step}, on the test split. Mean throughput {speed:.0f} images a second with the "
            f"{config.losses} losses.",
            "",
            *_table(
                "| figure | value | 95 % interval | of real images | n | better | what it is |",
                "|---|--:|--:|--:|--:|---|---|",
                rows(run.figures, config),
            ),
            f"n is the number of images, for z_diversity of pairs; intervals are Wilson's. {frechet}",
            "",
            f"## Losses, means of {steps}",
            "",
            *_table("| loss | weight | first | last | share of the loss |", "|---|--:|--:|--:|--:|", losses),
            "![curves](curves.png)",
            "",
            f"## Samples, each beside the nearest of {nearest_of} training images (mean absolute difference)",
            "",
            "![samples](samples.png)",
            "",
            "## Options",
            "",
            *_table("| option | value |", "|---|---|", list(resolved(config).items())),
            f"fastloss {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
            f"{platform.machine()}, {torch.get_num_threads()} threads.",
            "",
        ]
    )
