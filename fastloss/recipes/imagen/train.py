"""The training loop: batches, views, losses, fusion, Adam; validation, checkpoints, resuming, stopping."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import tokenizer as tokenizers
from ..data.samples import caption_ids
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
from ..training.shared_batch import SharedBatch
from ..training.world import World, across_ranks
from .build import make_model, make_tokenizer, model_state, tokenizer_state
from .config import Config
from .examples import Progress
from .figures import shown, validated
from .losses import ImagenLosses, make_views, perceptual_loss
from .model import Imagen
from .validation import validate

log = logging.getLogger("fastloss")

FIXED = (  # what a resumed run may not change: its curve would not be that of one run
    *("data", "batch_size", "weights", "weighting", "temperature", "bank", "seed", "size", "channels", "dim", "depth"),
    *("z_dim", "tokenizer", "text_encoder", "backbones", "val_percent", "test_percent"),
)


class Step(nn.Module):
    """Forward of a training step: the fused loss, and it beside its parts in one tensor that stays on the device."""

    def __init__(self, model: Imagen, losses: ImagenLosses, compiled: bool) -> None:
        super().__init__()
        self.model, self.losses = model, losses
        self.make_views = torch.compile(make_views) if compiled else make_views

    def forward(
        self, image: Tensor, text: tuple[Tensor, Tensor], ids: Tensor, noise: RowNoise
    ) -> tuple[Tensor, Tensor]:
        loss, parts = self.losses(self.make_views(self.model, image, text, noise), image, ids)
        return loss, torch.stack([loss.detach(), *(parts[name] for name in self.losses.weights)]).float()


class Trainer(Run):
    """A run: model, losses, optimiser, and where it stands. On several ranks each has a trainer, and they do all of it
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
            for line in world.first(lambda: [] if self.quiet else [self.splits.line(), *self.notices]):
                log.info(line)

    def _start(self, config: Config, resumed: dict[str, Any] | None) -> None:
        world = self.world
        self.compute: nn.Module
        world.together(lambda: self._open(config))
        images = world.first(lambda: self.splits.count("train", config.batch_size))
        self.config, notices = world.together(lambda: fitted(config, images, world.size))
        config, asked = self.config, config
        #: what was asked for and made smaller: the same again, with `resume`, is no change
        self.asked = {name: getattr(asked, name) for name in ("batch_size", "warmup")}
        if resumed is not None:
            self.asked |= resumed.get("asked", {})
            state = resumed["tokenizer"]
        else:
            state = world.first(lambda: tokenizer_state(make_tokenizer(config, self._captions())))
        self.tokenizer = None if state is None else tokenizers.from_state_dict(state)
        world.together(self._make)
        if world.size > 1:
            self.compute = across_ranks(self.compute, world, self.device)
        self.step, self.best, self.stale = 0, -math.inf, 0
        self.figures: dict[str, float] = {}
        self.progress = Progress()
        self.notices = notices

    def _open(self, config: Config) -> None:
        self.device = config.torch_device()
        torch.manual_seed(config.seed)
        if self.device.type == "cuda":
            torch.backends.cudnn.deterministic = True  # so that a resumed run repeats the one it continues
        self.splits = Splits(config)
        self.data = self.splits["train"]

    def _make(self) -> None:
        config = self.config
        torch.manual_seed(config.seed)
        self.model = make_model(config, self.tokenizer).to(self.device)
        self.losses = self._make_losses().to(self.device)
        self.compute = Step(self.model, self.losses, config.compile)
        self.trained = [p for p in (*self.model.parameters(), *self.losses.fuse.parameters()) if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.trained, lr=config.learning_rate, fused=self.device.type == "cuda")

    @staticmethod
    def _stored(folder: Path, changes: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
        path = last_checkpoint(folder)
        if path is None:
            raise ValueError(f"resume: no run to continue, {folder / LAST} does not exist; start one without it")
        content = load_checkpoint(path)
        check_recipe(content, "train", path)
        if "optimizer" not in content or "config" not in content:
            raise ValueError(f"checkpoint: {path} has a model only, no training state")
        stored, asked = content["config"], content.get("asked", {})
        changes = {name: value for name, value in changes.items() if name not in asked or value != asked[name]}
        for name in FIXED:
            if name in changes and changes[name] != stored.get(name, getattr(Config, name)):
                raise ValueError(
                    f"{name}: the run in {folder} has {stored.get(name)!r}, which a resumed run cannot change to "
                    f"{changes[name]!r}; start a new one in another --out"
                )
        return Config(**(stored | changes | {"out": str(folder)})), content

    def train_step(self, batch: dict[str, Any]) -> Tensor:
        """One step; the fused loss of the whole batch and its parts in one tensor, still on the device."""
        text = self._encode(batch["caption"])
        ids = caption_ids(batch["caption"]).to(self.device)
        noise = RowNoise.of(self.config.seed, self.step, batch["row"])
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.step + 1)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp):
            loss, values = self.compute(batch["image"], text, ids, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.config.clip)
        self.optimizer.step()
        self.step += 1
        return values.detach()

    def save(self) -> None:
        """The whole state of the run; what follows from it is the same as without the interruption."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "fusion": self.losses.fuse.state_dict(),
            "bank": None if self.losses.bank is None else self.losses.bank.state_dict(),
            "rng": rng_state(),
            "asked": self.asked,
            "pictures": self.progress.state_dict(),
            "shards": self._shard_counts(),
            "progress": {"step": self.step, "best": self.best, "stale": self.stale, "figures": self.figures},
        }
        save_last(self.folder, model_state(self.config, self.model, self.tokenizer) | state, self.world)

    def _restore(self, content: dict[str, Any]) -> None:
        try:
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.losses.fuse.load_state_dict(content["fusion"])
            if self.losses.bank is not None:
                self.losses.bank.load_state_dict(content["bank"])
            for name in ("step", "best", "stale", "figures"):
                setattr(self, name, content["progress"][name])
            if isinstance(self.data, ShardData):
                self.data.counts = dict(content.get("shards", {}))
            self.progress.load_state_dict(content.get("pictures", {}))
            set_rng_state(content["rng"])
            if (
                self.world.main
                and self.figures
                and self.figures["score"] == self.best
                and self._best_step() != self.step
            ):
                self._save_best()  # killed between the two files
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"checkpoint: {last_checkpoint(self.folder)} does not fit this version's run ({error})"
            ) from error

    def _make_losses(self) -> ImagenLosses:
        config = self.config
        weights = config.loss_weights()
        wanted = weights.get("perceptual", 1) > 0
        perceptual = perceptual_loss(config.backbone_names(), config.backbone_weights) if wanted else None
        return ImagenLosses(
            weights,
            perceptual=perceptual,
            temperature=config.temperature,
            bank=config.bank,
            emb_dim=config.dim,
            weighting=config.weighting,
            reference=config.losses == "reference",
            shared=SharedBatch(self.world, config.batch_size) if self.world.size > 1 else None,
        )

    def _metrics(self) -> Metrics:
        folder = self.folder if self.world.main else None
        return Metrics(folder, list(self.losses.weights), self.step, validated=validated(self.config))

    def _shard_counts(self) -> dict[str, int]:
        if not isinstance(self.data, ShardData):
            return {}
        return {url: count for counts in self.world.every(self.data.counts) for url, count in counts.items()}

    def _captions(self) -> Iterator[str]:
        if hasattr(self.data, "captions"):
            yield from self.data.captions
        else:
            yield from (sample["caption"] for sample in self.data)

    def _encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        return self.model.text_encoder.encode(captions)  # type: ignore[operator]

    def _validate(self, metrics: Metrics) -> None:
        self.figures, pictures = self.world.first(self._judge)
        self.progress.load_state_dict(pictures)
        metrics.add_validation(self.figures)
        better = self.figures["score"] > self.best + 1e-4
        self.stale = 0 if better else self.stale + 1
        if better:
            self.best = self.figures["score"]
        self.save()
        if better:
            self.world.first(self._save_best)
        if self._enough() and not self.quiet:
            log.info("stopped at step %d: the score is %s, the best %.4f", self.step, self._score(), self.best)

    def _judge(self) -> tuple[dict[str, float], dict[str, Any]]:
        figures = validate(self.model, self.config, "val", self.splits["val"])
        self.progress.add(self.step, self.model, self.config, self.splits)
        return figures, self.progress.state_dict()

    def _save_best(self) -> None:
        best = model_state(self.config, self.model, self.tokenizer) | {"progress": {"step": self.step}}
        save_checkpoint(self.folder / BEST, best)

    def _score(self) -> str:
        return shown("score", self.figures)

    def finished(self) -> str:
        """Why there is nothing left to train, or ""."""
        if self.step >= self.config.steps:
            return f"it is at step {self.step} of {self.config.steps}; more --steps go on with it"
        if self._enough():
            aim = self.config.quality > 0 and self.best >= self.config.quality
            option = "quality" if aim else "patience"
            return f"it stopped at step {self.step} of {self.config.steps}; a higher --{option} goes on with it"
        return ""

    def _enough(self) -> bool:
        """The quality aimed for is reached, or the score has converged."""
        config = self.config
        reached = config.quality > 0 and self.best >= config.quality
        return reached or (config.patience > 0 and self.stale >= config.patience)

    def _shown(self, latest: dict[str, float]) -> str:
        losses = [f"loss {latest['loss']:.3f}", *(f"{name[:4]} {latest[name]:.3g}" for name in self.losses.weights)]
        return ", ".join(losses + ([f"score {self._score()}"] if self.figures else []))
