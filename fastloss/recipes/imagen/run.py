"""The jobs behind the command line: a whole training run, tuning, sampling."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..training.checkpoint import prepare_folder
from .build import generate, load_model
from .config import Config
from .report import grid_figure, write_report
from .train import Trainer
from .validation import validate

TUNED = {  # range of each fusion weight; the others keep their values
    "contrastive": (0.01, 1.0),
    "perceptual": (0.01, 1.0),
    "pixel": (0.01, 10.0),
    "smoothness": (1e-4, 0.1),
    "attention": (1e-3, 0.1),
    "prior": (3e-4, 0.03),
}


def train(config: Config, explicit: dict[str, Any] | None = None, resume: bool = False) -> str:
    """Train, then judge the best model on the test split and write the report; the line with the figures."""
    started = time.perf_counter()
    trainer = Trainer.resume(Path(config.out), explicit or {}) if resume else Trainer(config)
    trainer.run()
    config = trainer.config
    model, _ = load_model(trainer.folder, trainer.device)
    figures = validate(model, config, "test")
    note = f"{trainer.step} steps on {trainer.device}."
    if trainer.data.skipped:
        note += f" Of the training data {trainer.data.skipped.summary()}."
    line = write_report(trainer.folder, model, config, figures, note)
    return f"{line}, {time.perf_counter() - started:.0f} s -> {trainer.folder}"


def tune(config: Config, trials: int, report: Callable[[str], None] = print) -> str:
    """Search the fusion weights with short runs, by the validation score, which no weight enters.

    The study is a database in the out folder: a second call goes on with it until there are `trials` trials.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError("tune needs optuna") from error
    folder = Path(config.out)
    prepare_folder(folder)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=f"{config.data}-{config.size}-{config.steps}",
        storage=f"sqlite:///{folder / 'tune.db'}",
        direction="maximize",
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=config.seed),
    )
    fixed = config.loss_weights()

    def objective(trial: Any) -> float:
        weights = fixed | {
            name: trial.suggest_float(name, *bounds, log=True) for name, bounds in TUNED.items() if name not in fixed
        }
        text = ",".join(f"{name}={value:.4g}" for name, value in weights.items())
        out = str(folder / f"trial-{trial.number:03d}")
        Trainer(dataclasses.replace(config, weights=text, out=out, patience=0), quiet=True).run()
        score = float(torch.load(Path(out) / "checkpoint.pt", weights_only=True)["progress"]["best"])
        report(f"trial {trial.number}: score {score:.4f} with {text}")
        return score

    complete = (optuna.trial.TrialState.COMPLETE,)  # interrupted trials do not count
    left = max(0, trials - len(study.get_trials(states=complete)))
    study.optimize(objective, n_trials=left, catch=(FloatingPointError,))
    best, done = study.best_trial, len(study.get_trials(states=complete))
    text = ",".join(f"{name}={value:.4g}" for name, value in (fixed | best.params).items())
    return f"best of {done} trials: score {best.value:.4f} with --weights {text}"


def sample(checkpoint: Path, captions: Sequence[str], out: Path, count: int, seed: int, device: str) -> str:
    """Write a picture with `count` images of each caption."""
    if not captions:
        raise ValueError("captions: expected at least one")
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    where = Config(device=device).torch_device()
    model, config = load_model(checkpoint, where)
    images = torch.stack([generate(model, captions, seed + k).cpu() for k in range(count)], 1)
    prepare_folder(out.parent)
    grid_figure(captions, images, out)
    return f"{len(captions)} captions x {count} images of {config.size} x {config.size} -> {out}"
