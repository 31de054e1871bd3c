"""The training loop: batches, loss, AdamW; validation, checkpoints, resuming, stopping."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import tokenizer as tokenizers
from ..data.shards import ShardData
from ..data.splits import Splits
from ..training.checkpoint import (
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
from ..training.metrics import Metrics
from ..training.noise import RowNoise
from ..training.options import fitted
from ..training.run import Run
from ..training.run_folder import check_free, clear, clear_temporary, started
from ..training.world import World
from .config import Config
from .data import same_ids
from .evaluation import FIGURES, evaluate
from .model import TwoEncoders
from .step import Backward, Step, learned_numbers, shifted

log = logging.getLogger("fastloss")

RECIPE = "train-clip"
WORDS_OF_NAMES, WORDS_OF_CAPTIONS = 16, 48  # tokens of a caption at most
FIXED = (  # what a resumed run may not change: its curve would not be that of one run
    *("data", "batch_size", "loss", "max_scale", "weight_decay", "seed", "size", "channels", "shift", "dim", "width"),
    *("image_encoder", "text_encoder", "val_percent", "test_percent"),
)


class Trainer(Run):
    """A run: model, optimiser, and where it stands. On several ranks each has a trainer, and they do all of it
    together: a mistake or a failure of one is an error of all."""

    def __init__(
        self,
        config: Config,
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
            self._start(config, resumed)
            if resumed is None:
                world.first(lambda: clear(self.folder))
            else:
                world.together(lambda: self._restore(resumed))
            world.first(lambda: clear_temporary(self.folder))

    def _start(self, config: Config, resumed: dict[str, Any] | None) -> None:
        world = self.world
        world.together(lambda: self._open(config))
        pairs = world.first(lambda: self.splits.count("train", config.batch_size))
        self.config, notices = world.together(lambda: fitted(config, pairs, world.size))
        #: what was asked for and made smaller: the same again, with `resume`, is no change
        self.asked = {name: getattr(config, name) for name in ("batch_size", "warmup")}
        if resumed is not None:
            self.asked |= resumed.get("asked", {})
            state = resumed["tokenizer"]
        else:
            state = world.first(lambda: self._tokenizer().state_dict())
        self.tokenizer: Any = tokenizers.from_state_dict(state)
        world.together(self._make)
        self.backward = Backward(Step(self.model, self.config, world), self.config, world, self.device)
        self.step, self.best, self.stale = 0, -math.inf, 0
        self.figures: dict[str, float] = {}
        lines = world.first(lambda: [] if self.quiet else [self.splits.line(), *notices])
        for line in [] if self.quiet else lines:
            log.info(line)

    def _open(self, config: Config) -> None:
        self.device = config.torch_device()
        if self.device.type == "cuda":
            torch.backends.cudnn.deterministic = True  # so that a resumed run repeats the one it continues
        self.splits = Splits(config)
        self.data = self.splits["train"]

    def _tokenizer(self) -> tokenizers.WordTokenizer:
        known = hasattr(self.data, "captions")
        captions = self.data.captions if known else (sample["caption"] for sample in self.data)
        length = WORDS_OF_NAMES if self.config.embedded() else WORDS_OF_CAPTIONS
        return tokenizers.WordTokenizer.from_captions(captions, length)

    def _make(self) -> None:
        config = self.config
        torch.manual_seed(config.seed)
        self.model = TwoEncoders(config, self.tokenizer).to(self.device)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)

    @staticmethod
    def _stored(folder: Path, changes: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
        path = last_checkpoint(folder)
        if path is None:
            raise ValueError(f"resume: no run to continue, {folder / LAST} does not exist; start one without it")
        content = load_checkpoint(path)
        check_recipe(content, RECIPE, path)
        if "optimizer" not in content or "config" not in content:
            raise ValueError(f"checkpoint: {path} has a model only, no training state")
        stored, asked = content["config"], content.get("asked", {})
        changes = {name: value for name, value in changes.items() if name not in asked or value != asked[name]}
        config = Config(**(stored | changes | {"out": str(folder)}))
        for name in FIXED:
            if getattr(config, name) != stored[name]:
                raise ValueError(
                    f"{name}: the run in {folder} has {stored[name]!r}, which a resumed run cannot change to "
                    f"{changes[name]!r}; start a new one in another --out"
                )
        return config, content

    def train_step(self, batch: dict[str, Any]) -> Tensor:
        """One step; the numbers of :meth:`Step.loss`, still on the device."""
        noise = RowNoise.of(self.config.seed, self.step, batch["row"])
        images = shifted(batch["image"], self.config.shift, noise)
        ids = same_ids(self.data, batch["caption"]).to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.step + 1)
        self.optimizer.zero_grad(set_to_none=True)
        values = self.backward(images, self.model.tokens(batch["caption"]), ids)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_norm)
        self.optimizer.step()
        self.model.bound_scale()
        self.step += 1
        return values

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
        save_last(self.folder, model_state(self.config, self.model) | state, self.world)

    def _restore(self, content: dict[str, Any]) -> None:
        try:
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            for name in ("step", "best", "stale", "figures"):
                setattr(self, name, content["progress"][name])
            if isinstance(self.data, ShardData):
                self.data.counts = dict(content.get("shards", {}))
            set_rng_state(content["rng"])
            last_is_best = bool(self.figures) and self.figures["score"] == self.best
            if self.world.main and last_is_best and self._best_step() != self.step:
                self._save_best()  # killed between the two files
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"checkpoint: {last_checkpoint(self.folder)} does not fit this version's run ({error})"
            ) from error

    def _metrics(self) -> Metrics:
        folder = self.folder if self.world.main else None
        return Metrics(folder, learned_numbers(self.config), self.step, validated=list(FIGURES))

    def _validate(self, metrics: Metrics) -> None:
        self.figures = self.world.first(lambda: evaluate(self.model, self.config, self.splits["val"]))
        metrics.add_validation(self.figures)
        better = self.figures["score"] > self.best + 1e-4
        self.stale = 0 if better else self.stale + 1
        if better:
            self.best = self.figures["score"]
        self.save()
        if better:
            self.world.first(self._save_best)
        if self._enough() and not self.quiet:
            log.info("stopped at step %d: the score has converged, the best is %.4f", self.step, self.best)

    def _save_best(self) -> None:
        best = model_state(self.config, self.model) | {"progress": {"step": self.step}}
        save_checkpoint(self.folder / BEST, best)

    def finished(self) -> str:
        """Why there is nothing left to train, or ""."""
        if self.step >= self.config.steps:
            return f"it is at step {self.step} of {self.config.steps}; more --steps go on with it"
        if self._enough():
            return f"it stopped at step {self.step} of {self.config.steps}; a higher --patience goes on with it"
        return ""

    def _enough(self) -> bool:
        return 0 < self.config.patience <= self.stale

    def _shown(self, latest: dict[str, float]) -> str:
        parts = [f"{name} {latest[name]:.3f}" for name in ("loss", *learned_numbers(self.config))]
        return ", ".join(parts + [f"{name} {self.figures[name]:.1%}" for name in ("top1", "top5") if self.figures])


def model_state(config: Config, model: TwoEncoders) -> dict[str, Any]:
    """What `load_model` needs: plain values and tensors."""
    tokenizer = model.tokenizer.state_dict()
    return {"recipe": RECIPE, "config": dataclasses.asdict(config), "tokenizer": tokenizer, "model": model.state_dict()}


def load_model(path: Path, device: torch.device | str = "cpu") -> tuple[TwoEncoders, Config]:
    """The model of a checkpoint file or run folder, ready to embed."""
    content = load_checkpoint(path, device)
    check_recipe(content, RECIPE, path)
    try:
        config = Config(**content["config"])
        model = TwoEncoders(config, tokenizers.from_state_dict(content["tokenizer"]))  # type: ignore[arg-type]
        model.load_state_dict(content["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"checkpoint: {path} does not fit this version's model ({error})") from error
    return model.to(device).eval(), config
