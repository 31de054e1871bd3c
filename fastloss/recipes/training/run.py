"""What the trainers of all recipes do alike: go on with a run, the loop, batches, the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ..data.global_batches import global_batches
from .checkpoint import BEST, load_checkpoint
from .interrupt import Interrupted, StopRequest
from .metrics import Metrics
from .progress import progress_bar
from .world import StopVote, World, of_all_ranks

R = TypeVar("R", bound="Run")


class Run:
    """The base of a recipe's trainer. It has config, folder, world, device, data, model, step, quiet and figures, and
    what one step, a validation, the metrics and a checkpoint are."""

    config: Any
    folder: Path
    world: World
    device: Any
    data: Any
    model: Any
    step: int
    quiet: bool
    figures: dict[str, float]

    def __init__(self, config: Any, resumed: Any = None, quiet: bool = False, *, world: World | None = None) -> None:
        raise NotImplementedError(f"{type(self).__name__} starts by itself")

    @staticmethod
    def _stored(folder: Path, changes: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The configuration and the checkpoint of the run in `folder`."""
        raise NotImplementedError

    def train_step(self, batch: dict[str, Any]) -> Tensor:
        raise NotImplementedError

    def save(self) -> None:
        raise NotImplementedError

    def _metrics(self) -> Metrics:
        raise NotImplementedError

    def _validate(self, metrics: Metrics) -> None:
        raise NotImplementedError

    def _enough(self) -> bool:
        raise NotImplementedError

    def _shown(self, latest: dict[str, float]) -> str:
        raise NotImplementedError

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
                while self.step < config.steps and not self._enough() and not vote(stop.asked):
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

    def _best_step(self) -> int | None:
        try:
            return load_checkpoint(self.folder / BEST)["progress"]["step"]
        except ValueError:
            return None
