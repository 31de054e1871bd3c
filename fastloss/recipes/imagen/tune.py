"""The search for the fusion weights: short runs, judged by the validation score, which no weight enters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..data.splits import FEW
from ..training.checkpoint import LAST, load_checkpoint
from ..training.pictures import pyplot, save_figure
from ..training.run_folder import RUN, started
from ..training.world import World, of_all_ranks
from .config import Config
from .figures import Z, count_of, score_error, score_meaning
from .train import Trainer

TUNED = {  # range of each fusion weight; the others keep their values
    "contrastive": (0.01, 1.0),
    "perceptual": (0.01, 1.0),
    "pixel": (0.01, 10.0),
    "smoothness": (1e-4, 0.1),
    "attention": (1e-3, 0.1),
    "prior": (3e-4, 0.03),
}
DATABASE, REPORT, CHART = "tune.db", "tune.md", "tune.png"


class Trial(NamedTuple):
    """A trial that is done; `error` is the standard error of its score, NaN where it is not known."""

    number: int
    score: float
    error: float
    n: int
    weights: dict[str, float]


def tune(config: Config, trials: int, report: Callable[[str], None] = print) -> str:
    """Search the fusion weights with short runs, by the validation score, which no weight enters.

    The study is a database in the out folder: a second call goes on with it until there are `trials` trials. tune.md
    and tune.png are written after each.

    Raises:
        ValueError: the folder has the trials of another search, or there are several ranks. ImportError: no optuna.
    """
    ranks = World.join(config.device).size
    if ranks > 1:
        raise of_all_ranks(
            ValueError(f"tune: expected one process, got {ranks} ranks; torchrun is for `fastloss train`")
        )
    if trials < 1:
        raise ValueError(f"trials: expected at least 1, got {trials}")
    try:
        import optuna
    except ImportError as error:
        raise ImportError("tune needs optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with started(Path(config.out)):
        study = _study(config, optuna)
    folder, fixed = Path(config.out), config.loss_weights()

    def objective(trial: Any) -> float:
        weights = fixed | {
            name: trial.suggest_float(name, *bounds, log=True) for name, bounds in TUNED.items() if name not in fixed
        }
        out = folder / f"trial-{trial.number:03d}"
        Trainer(dataclasses.replace(config, weights=_text(weights), out=str(out), patience=0), quiet=True).run()
        progress = load_checkpoint(out / LAST)["progress"]
        score, figures = float(progress["best"]), progress["figures"]
        trial.set_user_attr("error", score_error(figures))
        trial.set_user_attr("n", count_of("score", figures))
        report(f"trial {trial.number}: score {score:.4f} (n {count_of('score', figures)}) with {_text(weights)}")
        return score

    complete = (optuna.trial.TrialState.COMPLETE,)  # interrupted trials do not count
    left = max(0, trials - len(study.get_trials(states=complete)))

    def write(*_: Any) -> None:
        _write_report(folder, config, _trials(study, complete, fixed), _importances(study, optuna))

    study.optimize(objective, n_trials=left, catch=(FloatingPointError,), callbacks=[write])
    done = _trials(study, complete, fixed)
    if not done:
        raise FloatingPointError("no trial ended with a finite loss; try a lower --learning-rate")
    write()
    best = max(done, key=lambda trial: trial.score)
    return (
        f"best of {len(done)} trials: score {best.score:.4f} (n {best.n}) with --weights {_text(best.weights)}; "
        f"{alike_in_words(done)} -> {folder / REPORT}"
    )


def _study(config: Config, optuna: Any) -> Any:
    """The study in the folder, or a new one where the folder has no trials."""
    folder, name = Path(config.out), f"{config.data}-{config.size}-{config.steps}"
    storage = f"sqlite:///{folder / DATABASE}"
    others = optuna.get_all_study_names(storage) if (folder / DATABASE).exists() else []
    if name not in others and (
        others or any((path / file).exists() for path in folder.glob("trial-*") for file in RUN)
    ):
        which = f"of {', '.join(others)}" if others else f"without their {DATABASE}"
        raise ValueError(f"out: {folder} has the trials of another search, {which}; wanted those of {name}, or another "
                         "--out")  # fmt: skip
    sampler = optuna.samplers.TPESampler(seed=config.seed)
    return optuna.create_study(
        study_name=name, storage=storage, direction="maximize", load_if_exists=True, sampler=sampler
    )


def _trials(study: Any, states: tuple, fixed: dict[str, float]) -> list[Trial]:
    return [
        Trial(t.number, t.value, t.user_attrs.get("error", math.nan), t.user_attrs.get("n", 0), fixed | t.params)
        for t in study.get_trials(states=states)
    ]


def _importances(study: Any, optuna: Any) -> dict[str, float]:
    """optuna's estimate of how much of the score's variance each weight explains; empty where it cannot be made."""
    try:
        return optuna.importance.get_param_importances(study)
    except (RuntimeError, ValueError, ImportError):
        return {}  # fewer than two trials, or all with one score


def alike(trials: list[Trial]) -> list[Trial]:
    """The trials that cannot be told apart from the best one: the difference of the scores is within 1.96 standard
    errors of that difference. The best one is not among them."""
    best = max(trials, key=lambda trial: trial.score)
    return [
        trial
        for trial in trials
        if trial is not best and best.score - trial.score <= Z * math.hypot(best.error, trial.error)
    ]


def alike_in_words(trials: list[Trial]) -> str:
    best = max(trials, key=lambda trial: trial.score)
    if len(trials) == 1:
        return "one trial says nothing about the weights"
    if math.isnan(best.error):
        return "how far scores differ by chance is not known"
    same = len(alike(trials))
    if not same:
        return "it is better than all others by more than chance explains"
    few = f"; {best.n} validation images are few" if best.n < FEW else ""
    which = "all of the others" if same == len(trials) - 1 else f"{same} of the other {len(trials) - 1}"
    return f"{which} cannot be told apart from it (within 1.96 standard errors, n {best.n}){few}"


def _write_report(folder: Path, config: Config, trials: list[Trial], importances: dict[str, float]) -> None:
    if not trials:
        return
    ranked = sorted(trials, key=lambda trial: -trial.score)
    same = {trial.number for trial in alike(trials)}
    names = list(dict.fromkeys(name for trial in ranked for name in trial.weights))
    table = [
        f"| {t.number} | {t.score:.4f} | {'' if math.isnan(t.error) else f'{Z * t.error:.4f}'} | {t.n} | "
        f"{'best' if t is ranked[0] else 'yes' if t.number in same else 'no'} | "
        + " | ".join(f"{t.weights[name]:.4g}" if name in t.weights else "" for name in names)
        + " |"
        for t in ranked
    ]
    lines = [
        f"# Fusion weights on {config.data}",
        "",
        f"{len(trials)} trials of {config.steps} steps. Best: trial {ranked[0].number}, score {ranked[0].score:.4f}; "
        f"{alike_in_words(trials)}. Its weights: `--weights {_text(ranked[0].weights)}`.",
        "",
        f"The score is {score_meaning(config)}, on the validation split, the best of each trial; ± is 1.96 standard "
        "errors from its shares alone, so a lower bound, and n the images.",
        "",
        f"| trial | score | ± | n | as good as the best? | {' | '.join(names)} |",
        f"|--:|--:|--:|--:|---|{'--:|' * len(names)}",
        *table,
        "",
        f"![trials and importances]({CHART})",
        "",
    ]
    (folder / REPORT).write_text("\n".join(lines), encoding="utf-8")
    _chart(folder / CHART, trials, importances)


def _chart(path: Path, trials: list[Trial], importances: dict[str, float]) -> None:
    plt = pyplot()
    figure, (scores, parts) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=(3, 2))
    best = max(trials, key=lambda trial: trial.score)
    same = {trial.number for trial in alike(trials)} | {best.number}
    groups = (("cannot be told apart from the best", True, "tab:orange"), ("worse", False, "tab:blue"))
    for label, wanted, colour in groups:
        chosen = [trial for trial in trials if (trial.number in same) == wanted]
        errors = [0 if math.isnan(trial.error) else Z * trial.error for trial in chosen]
        if chosen:
            scores.errorbar([t.number for t in chosen], [t.score for t in chosen], errors, fmt="o", capsize=3,
                            color=colour, label=label)  # fmt: skip
    scores.plot(best.number, best.score, "*", markersize=14, color="black", label="best")
    scores.set(
        xlabel="trial", ylabel="validation score, higher is better", title=f"{len(trials)} trials, ± 1.96 errors"
    )
    scores.xaxis.get_major_locator().set_params(integer=True)
    scores.grid(alpha=0.3)
    scores.legend(fontsize=8, ncols=3, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16))  # hides no mark
    if importances:
        names = list(importances)[::-1]
        parts.barh(names, [importances[name] for name in names])
        parts.set(xlabel="share of the score's variance")
        parts.set_title(f"importance of the weights, from {len(trials)} trials")
        parts.set_xlim(0, 1)
    else:
        parts.axis("off")
        parts.text(0.5, 0.5, "too few trials for importances", ha="center")
    figure.tight_layout()
    save_figure(figure, path)
    plt.close(figure)


def _text(weights: dict[str, float]) -> str:
    return ",".join(f"{name}={value:.4g}" for name, value in weights.items())
