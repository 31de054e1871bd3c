"""The job behind the command line: a whole training run."""

from __future__ import annotations

import functools

from ..training import job
from .evaluation import evaluate
from .report import Finished, write_report
from .train import Trainer, load_model


def _report(trainer: Trainer, best_step: int, notes: list[str]) -> str:
    """Judge the best model on the test split and write the report; the line with the figures."""
    config, folder, splits = trainer.config, trainer.folder, trainer.splits
    model, _ = load_model(folder, trainer.device)
    figures = evaluate(model, config, splits["test"])
    return write_report(Finished(folder, model, config, figures, best_step, splits, notes))


train = functools.partial(job.train, Trainer, _report)
