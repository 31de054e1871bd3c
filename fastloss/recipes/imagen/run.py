"""The jobs behind the command line: a whole training run and samples; tuning is in tune.py."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.splits import Splits, few
from ..training.checkpoint import BEST, load_checkpoint
from ..training.pictures import Section, caption_rows, draw_sections, stacked
from ..training.run_folder import started
from ..training.world import World, of_all_ranks
from .build import generate, load_model
from .config import Config
from .examples import real_images
from .image_quality import image_figures
from .report import Finished, write_report
from .train import Trainer
from .validation import validate

log = logging.getLogger("fastloss")


def train(config: Config, explicit: dict[str, Any] | None = None, resume: bool = False, overwrite: bool = False) -> str:
    """Train, then judge the best model on the test split and write the report; the line with the figures.

    Under torchrun all ranks call it, and have the line.

    Raises:
        ValueError: an option does not fit; the folder has a run and neither `resume` nor `overwrite` is set.
    """
    started_at = time.perf_counter()
    world = World.join(config.device)
    if resume and overwrite:
        raise of_all_ranks(ValueError("overwrite: expected one of --resume and --overwrite, got both"))
    if resume:
        trainer = Trainer.resume(Path(config.out), explicit or {}, world=world)
    else:
        trainer = Trainer(config, overwrite=overwrite, world=world)
    finished = trainer.finished() if resume else ""
    if finished and world.first(lambda: (trainer.folder / "report.md").exists()):
        return f"nothing was trained: {trainer.folder} has a finished run, {finished}"
    warning = world.first(lambda: few(trainer.splits.count("val"), trainer.splits.count("test")))
    if warning:
        log.info(warning)
    if not finished:
        trainer.run()
    for skipped in world.every(dict(trainer.data.skipped)):
        for name, reason in skipped.items():
            trainer.data.skipped.add(name, reason)
    line = world.first(lambda: _report(trainer, warning, finished))
    return f"{line}, {time.perf_counter() - started_at:.0f} s -> {trainer.folder}"


def _report(trainer: Trainer, warning: str, finished: str) -> str:
    """Judge the best model on the test split and write the report; the line with the figures."""
    config, folder, splits = trainer.config, trainer.folder, trainer.splits
    model, _ = load_model(folder, trainer.device)
    figures = validate(model, config, "test", splits["test"])
    figures |= image_figures(model, config, splits["test"], trainer.losses.perceptual)
    ranks = f", {trainer.world.size} ranks" if trainer.world.size > 1 else ""
    notes = [f"{trainer.step} steps on {trainer.device}{ranks}. {splits.line()}."]
    if trainer.data.skipped:
        notes[0] += f" Of the training data {trainer.data.skipped.summary()}."
    notes += [warning] if warning else []
    best_step = load_checkpoint(folder / BEST)["progress"]["step"] if (folder / BEST).exists() else trainer.step
    line = write_report(Finished(folder, model, config, figures, best_step, splits, trainer.progress, notes))
    if finished:
        line = f"nothing was trained, its report was missing: {line}"
    return line


def sample(
    checkpoint: Path, captions: Sequence[str], out: Path, count: int, seed: int, device: str, real: bool = False
) -> str:
    """Write a picture with `count` images of each caption, beside a real one of that caption where `real` is set and
    the test or training data of the checkpoint's run have one."""
    if not captions:
        raise ValueError("captions: expected at least one")
    for caption in captions:
        if not caption.strip():
            raise ValueError(f"captions: expected words, got {caption!r}")
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    if out.is_dir():
        raise ValueError(f"out: expected a file to write, got the folder {out}")
    where = Config(device=device).torch_device()
    model, config = load_model(checkpoint, where)
    images = stacked([generate(model, captions, seed + k) for k in range(count)])
    found = None
    if real:
        splits = Splits(config)
        test, training = (real_images(list(captions), splits[split]) for split in ("test", "train"))
        found = [first if first is not None else other for first, other in zip(test, training, strict=True)]
    columns, cells = caption_rows(captions, images, found)
    with started(out.parent):
        draw_sections([Section(f"{config.data}, seed {seed}", columns, captions, cells)], out)
    return f"{len(captions)} captions x {count} images of {config.size} x {config.size} -> {out}"
