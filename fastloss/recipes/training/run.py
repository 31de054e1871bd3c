"""What the trainers of all recipes do alike: start or go on with a run, the loop, validations, checkpoints."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..data import tokenizer as tokenizers
from ..data.global_batches import global_batches
from ..data.shards import ShardData
from ..data.splits import Splits
from .checkpoint import (
    BEST,
    LAST,
    check_recipe,
    last_checkpoint,
    load_checkpoint,
    rng_state,
    save_checkpoint,
    save_last,
    set_rng_state,
)
from .interrupt import Interrupted, StopRequest
from .metrics import Metrics
from .options import fitted
from .progress import progress_bar
from .run_folder import check_free, clear, clear_temporary, started
from .world import StopVote, World, of_all_ranks

log = logging.getLogger("fastloss")
R = TypeVar("R", bound="Run")


class Run(ABC):
    """The base of a recipe's trainer: what is trained, and where it stands. On several ranks each has a trainer, and
    they do all of it together: a mistake or a failure of one is an error of all.

    A recipe adds what it trains, what one step is and how a model is judged: the abstract methods, and `_more_state`
    where the model and the optimiser are not all.
    """

    recipe: ClassVar[str]  # as the command line has it
    config_type: ClassVar[type]
    fixed: ClassVar[tuple[str, ...]]  # options that a resumed run may not change
    model: Any
    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        config: Any,
        resumed: dict[str, Any] | None = None,
        quiet: bool = False,
        overwrite: bool = False,
        world: World | None = None,
    ) -> None:
        self.world = world = World() if world is None else world
        self.quiet, self.folder = quiet or not world.main, Path(config.out)
        if resumed is None and not overwrite:
            world.first(lambda: check_free(self.folder))
        with started(self.folder):
            notices = self._start(config, resumed)
            if resumed is None:
                world.first(lambda: clear(self.folder))
            else:
                world.together(lambda: self._restore(resumed))
            world.first(lambda: clear_temporary(self.folder))
            for line in world.first(lambda: [] if self.quiet else [self.splits.line(), *notices]):
                log.info(line)

    def _start(self, config: Any, resumed: dict[str, Any] | None) -> list[str]:
        """Open the data and make what is trained; notices about options that were changed to fit."""
        world = self.world
        world.together(lambda: self._open(config))
        samples = world.first(lambda: self.splits.count("train", config.batch_size))
        self.config, notices = world.together(lambda: fitted(config, samples, world.size))
        #: what was asked for and made smaller: the same again, with `resume`, is no change
        self.asked = {name: getattr(config, name) for name in ("batch_size", "warmup")}
        if resumed is not None:
            self.asked |= resumed.get("asked", {})
            state = resumed["tokenizer"]
        else:
            state = world.first(self._tokenizer_state)
        self.tokenizer: Any = None if state is None else tokenizers.from_state_dict(state)
        world.together(self._seed_and_make)
        self._join_ranks()
        self.step, self.best, self.stale = 0, -math.inf, 0
        self.figures: dict[str, float] = {}
        return notices

    def _open(self, config: Any) -> None:
        self.device = config.torch_device()
        torch.manual_seed(config.seed)
        if self.device.type == "cuda":
            torch.backends.cudnn.deterministic = True  # so that a resumed run repeats the one it continues
        self.splits = Splits(config)
        self.data = self.splits["train"]

    def _seed_and_make(self) -> None:
        torch.manual_seed(self.config.seed)
        self._make()

    # what a recipe says

    @abstractmethod
    def _tokenizer_state(self) -> dict[str, Any] | None:
        """The tokenizer of a new run; None where it has none of its own."""

    @abstractmethod
    def _make(self) -> None:
        """Model and optimiser."""

    @abstractmethod
    def _join_ranks(self) -> None:
        """What needs the other ranks: it may communicate."""

    @abstractmethod
    def train_step(self, batch: dict[str, Any]) -> Tensor:
        """One step; the numbers that the metrics have a column for, still on the device."""

    @abstractmethod
    def model_state(self) -> dict[str, Any]:
        """What the recipe's `load_model` needs."""

    @abstractmethod
    def _metrics(self) -> Metrics: ...

    @abstractmethod
    def _judge(self) -> dict[str, float]:
        """The figures of the validation split, "score" among them. All ranks call it."""

    @abstractmethod
    def _shown(self, latest: dict[str, float]) -> str:
        """The progress bar's line."""

    def _more_state(self) -> dict[str, Any]:
        """What a checkpoint has beside the model and the optimiser."""
        return {}

    def _load_more_state(self, content: dict[str, Any]) -> None:  # noqa: B027 most recipes have nothing more
        """What :meth:`_more_state` gave, from a checkpoint."""

    def _score(self) -> str:
        return f"{self.figures['score']:.4f}"

    def _reached(self) -> str:
        """The option by which there is nothing left to train before the last step, or ""."""
        return "patience" if 0 < self.config.patience <= self.stale else ""

    # from one step to the next

    @classmethod
    def resume(
        cls: type[R], folder: Path, changes: dict[str, Any], quiet: bool = False, world: World | None = None
    ) -> R:
        """Continue the run in `folder`, of whatever number of ranks; `changes` are options given anew."""
        world = World() if world is None else world
        config, content = world.together(lambda: cls._stored(folder, changes))
        return cls(config, content, quiet, world=world)

    def run(self) -> dict[str, float]:
        """Train until the steps are done or the score is enough; the last figures."""
        config, world = self.config, self.world
        metrics = world.together(self._metrics)
        self.model.train()
        try:
            with StopRequest() as stop, progress_bar(not self.quiet, config.steps, self.step) as bar:
                batches, vote = self._batches(), StopVote(world)
                while self.step < config.steps and not self._reached() and not vote(stop.asked):
                    values = self.train_step(next(batches))
                    metrics.add(self.step, values, self._learning_rate(self.step), config.batch_size)
                    bar.update(1)
                    if self.step % config.log_every == 0 or self.step == config.steps:
                        world.together(metrics.flush)
                        bar.set_postfix_str(self._shown(metrics.latest))
                    if self.step % config.val_every == 0 or self.step == config.steps:
                        world.together(metrics.flush)
                        self._validate(metrics)
                        metrics.pause()
                vote.close()
                if any(world.every(stop.asked)):
                    world.together(metrics.flush)
                    self.save()
                    said = f"stopped at step {self.step}; `--resume` continues the run in {self.folder}"
                    raise of_all_ranks(Interrupted(said))
        finally:
            metrics.close()
        return self.figures

    def _batches(self) -> Iterator[dict[str, Any]]:
        """This rank's rows of the batches for ever, from that of the next step on."""
        own = self.world.own(self.config.batch_size)
        return global_batches(self.data, self.config.batch_size, self.config.seed, self.step, self.device, own=own)

    def _learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine that ends at 1 % of the peak with the last step."""
        warm = min(1.0, step / max(self.config.warmup, 1))
        done = min(1.0, step / self.config.steps)
        return self.config.learning_rate * warm * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * done)))

    def finished(self) -> str:
        """Why there is nothing left to train, or ""."""
        if self.step >= self.config.steps:
            return f"it is at step {self.step} of {self.config.steps}; more --steps go on with it"
        if reached := self._reached():
            return f"it stopped at step {self.step} of {self.config.steps}; a higher --{reached} goes on with it"
        return ""

    def _validate(self, metrics: Metrics) -> None:
        self.figures = self._judge()
        metrics.add_validation(self.figures)
        better = self.figures["score"] > self.best + 1e-4
        self.stale = 0 if better else self.stale + 1
        if better:
            self.best = self.figures["score"]
        self.save()
        if better:
            self.world.first(self._save_best)
        if self._reached() and not self.quiet:
            log.info("stopped at step %d: the score is %s, the best %.4f", self.step, self._score(), self.best)

    # checkpoints

    def save(self) -> None:
        """The whole state of the run; what follows from it is the same as without the interruption."""
        counts = self.world.every(self.data.counts) if isinstance(self.data, ShardData) else []
        state = {
            "optimizer": self.optimizer.state_dict(),
            "rng": rng_state(),
            "asked": self.asked,
            "shards": {url: count for some in counts for url, count in some.items()},
            "progress": {"step": self.step, "best": self.best, "stale": self.stale, "figures": self.figures},
        }
        save_last(self.folder, self.model_state() | state | self._more_state(), self.world)

    def _save_best(self) -> None:
        save_checkpoint(self.folder / BEST, self.model_state() | {"progress": {"step": self.step}})

    @classmethod
    def _stored(cls, folder: Path, changes: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The configuration, with these changes, and the checkpoint of the run in `folder`."""
        path = last_checkpoint(folder)
        if path is None:
            raise ValueError(f"resume: no run to continue, {folder / LAST} does not exist; start one without it")
        content = load_checkpoint(path)
        check_recipe(content, cls.recipe, path)
        if "optimizer" not in content or "config" not in content:
            raise ValueError(f"checkpoint: {path} has a model only, no training state")
        stored, asked = content["config"], content.get("asked", {})
        changes = {name: value for name, value in changes.items() if name not in asked or value != asked[name]}
        config = cls.config_type(**(stored | changes | {"out": str(folder)}))
        for name in cls.fixed:
            before = stored.get(name, getattr(cls.config_type, name))
            if getattr(config, name) != before:
                raise ValueError(
                    f"{name}: the run in {folder} has {before!r}, which a resumed run cannot change to "
                    f"{changes[name]!r}; start a new one in another --out"
                )
        return config, content

    def _restore(self, content: dict[str, Any]) -> None:
        try:
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            for name in ("step", "best", "stale", "figures"):
                setattr(self, name, content["progress"][name])
            if isinstance(self.data, ShardData):
                self.data.counts = dict(content.get("shards", {}))
            self._load_more_state(content)
            set_rng_state(content["rng"])
            last_is_best = bool(self.figures) and self.figures["score"] == self.best
            if self.world.main and last_is_best and self._best_step() != self.step:
                self._save_best()  # killed between the two files
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"checkpoint: {last_checkpoint(self.folder)} does not fit this version's run ({error})"
            ) from error

    def _best_step(self) -> int | None:
        try:
            return load_checkpoint(self.folder / BEST)["progress"]["step"]
        except ValueError:
            return None
