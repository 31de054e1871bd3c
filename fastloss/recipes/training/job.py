"""The job behind `fastloss train` and `fastloss train-clip`: a whole run, to its report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..data.splits import few
from .checkpoint import BEST, load_checkpoint
from .run import Run
from .world import World, of_all_ranks

log = logging.getLogger("fastloss")
R = TypeVar("R", bound=Run)


def train(
    trainer_type: type[R],
    report: Callable[[R, int, list[str]], str],
    config: Any,
    explicit: dict[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> str:
    """Train, then judge the best model on the test split and write the report; the line with the figures.

    Under torchrun all ranks call it, and have the line.

    Args:
        trainer_type: the recipe's trainer.
        report: judges the best model of a trainer, of the step given, and writes the report with these notes.
        config: the recipe's options; `explicit` are those that were given, which `resume` applies to the run's own.

    Raises:
        ValueError: an option does not fit; the folder has a run and neither `resume` nor `overwrite` is set.
    """
    started_at = time.perf_counter()
    world = World.join(config.device)
    if resume and overwrite:
        raise of_all_ranks(ValueError("overwrite: expected one of --resume and --overwrite, got both"))
    if resume:
        trainer = trainer_type.resume(Path(config.out), explicit or {}, world=world)
    else:
        trainer = trainer_type(config, overwrite=overwrite, world=world)
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
    line = world.first(lambda: report(trainer, _best_step(trainer), _notes(trainer, warning)))
    if finished:
        line = f"nothing was trained, its report was missing: {line}"
    return f"{line}, {time.perf_counter() - started_at:.0f} s -> {trainer.folder}"


def _best_step(trainer: Run) -> int:
    best = trainer.folder / BEST
    return load_checkpoint(best)["progress"]["step"] if best.exists() else trainer.step


def _notes(trainer: Run, warning: str) -> list[str]:
    """What the report says of the run."""
    ranks = f", {trainer.world.size} ranks" if trainer.world.size > 1 else ""
    note = f"{trainer.step} steps on {trainer.device}{ranks}. {trainer.splits.line()}."
    if trainer.data.skipped:
        note += f" Of the training data {trainer.data.skipped.summary()}."
    return [note, warning] if warning else [note]
