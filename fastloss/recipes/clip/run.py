"""The job behind the command line: a whole training run."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from ..data.splits import few
from ..training.checkpoint import BEST, load_checkpoint
from ..training.world import World, of_all_ranks
from .config import Config
from .evaluation import evaluate
from .report import Finished, write_report
from .train import Trainer, load_model

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
    figures = evaluate(model, config, splits["test"])
    ranks = f", {trainer.world.size} ranks" if trainer.world.size > 1 else ""
    notes = [f"{trainer.step} steps on {trainer.device}{ranks}. {splits.line()}."]
    if trainer.data.skipped:
        notes[0] += f" Of the training data {trainer.data.skipped.summary()}."
    notes += [warning] if warning else []
    best_step = load_checkpoint(folder / BEST)["progress"]["step"] if (folder / BEST).exists() else trainer.step
    line = write_report(Finished(folder, model, config, figures, best_step, splits, notes))
    return f"nothing was trained, its report was missing: {line}" if finished else line
