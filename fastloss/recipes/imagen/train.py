"""The training loop: batches, views, losses, fusion, Adam; validation, checkpoints, resuming, stopping."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import tokenizer as tokenizers
from ..data.batches import batches
from ..training.checkpoint import BEST, LAST, load_checkpoint, rng_state, save_checkpoint, set_rng_state
from ..training.interrupt import Interrupted, StopRequest
from ..training.metrics import Metrics
from ..training.run_folder import check_free, clear, clear_temporary, started
from .build import make_model, make_tokenizer, model_state
from .config import Config, fitted
from .examples import Progress
from .figures import shown, validated
from .losses import ImagenLosses, caption_ids, make_views, perceptual_loss
from .splits import Splits
from .validation import validate

log = logging.getLogger("fastloss")

FIXED = (  # what a resumed run may not change: its curve would not be that of one run
    *("data", "batch_size", "weights", "weighting", "temperature", "bank", "seed", "size", "channels", "dim", "depth"),
    *("z_dim", "tokenizer", "text_encoder", "backbones", "val_percent", "test_percent"),
)


class Trainer:
    """A run: model, losses, optimiser, and where it stands."""

    def __init__(
        self, config: Config, resumed: dict[str, Any] | None = None, quiet: bool = False, overwrite: bool = False
    ) -> None:
        self.quiet, self.folder = quiet, Path(config.out)
        if resumed is None and not overwrite:
            check_free(self.folder)
        with started(self.folder):
            self._start(config, resumed)
            if resumed is None:
                clear(self.folder)
            else:
                self._restore(resumed)
            clear_temporary(self.folder)

    def _start(self, config: Config, resumed: dict[str, Any] | None) -> None:
        self.device = config.torch_device()
        torch.manual_seed(config.seed)
        if self.device.type == "cuda":
            torch.backends.cudnn.deterministic = True  # so that a resumed run repeats the one it continues
        self.splits = Splits(config)
        self.data = self.splits["train"]
        self.config, notices = fitted(config, self.splits.count("train", config.batch_size))
        config, asked = self.config, config
        #: what was asked for and made smaller: the same again, with `resume`, is no change
        self.asked = {name: getattr(asked, name) for name in ("batch_size", "warmup")}
        if resumed is not None:
            self.asked |= resumed.get("asked", {})
        if resumed is None:
            self.tokenizer = make_tokenizer(config, self._captions())
        else:
            state = resumed["tokenizer"]
            self.tokenizer = None if state is None else tokenizers.from_state_dict(state)
        self.model = make_model(config, self.tokenizer).to(self.device)
        self.losses = self._make_losses().to(self.device)
        trained = [p for p in (*self.model.parameters(), *self.losses.fuse.parameters()) if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=config.learning_rate, fused=self.device.type == "cuda")
        self.trained = trained
        self.make_views = torch.compile(make_views) if config.compile else make_views
        self.step, self.epoch, self.position = 0, 0, 0
        self.best, self.stale = -math.inf, 0
        self.figures: dict[str, float] = {}
        self.progress = Progress()
        if not self.quiet:
            for line in (self.splits.line(), *notices):
                log.info(line)

    @classmethod
    def resume(cls, folder: Path, changes: dict[str, Any], quiet: bool = False) -> Trainer:
        """Continue the run in `folder`; `changes` are the options given anew, e.g. more steps."""
        if not (folder / LAST).exists():
            raise ValueError(f"resume: no run to continue, {folder / LAST} does not exist; start one without it")
        content = load_checkpoint(folder / LAST)
        if "optimizer" not in content:
            raise ValueError(f"checkpoint: {folder / LAST} has a model only, no training state")
        stored, asked = content["config"], content.get("asked", {})
        changes = {name: value for name, value in changes.items() if name not in asked or value != asked[name]}
        for name in FIXED:
            if name in changes and changes[name] != stored.get(name, getattr(Config, name)):
                raise ValueError(
                    f"{name}: the run in {folder} has {stored.get(name)!r}, which a resumed run cannot change to "
                    f"{changes[name]!r}; start a new one in another --out"
                )
        return cls(Config(**(stored | changes | {"out": str(folder)})), content, quiet)

    def run(self) -> dict[str, float]:
        """Train until the steps are done, the score stops improving or reaches the aim; the last figures."""
        config = self.config
        metrics = Metrics(self.folder, list(self.losses.weights), self.step, validated=validated(config))
        self.model.train()
        try:
            with StopRequest() as stop, self._bar() as bar:
                for batch in self._batches():
                    if self.step >= config.steps or self._enough() or stop.asked:
                        break
                    losses = self.train_step(batch)
                    metrics.add(self.step, losses, self._learning_rate(self.step), len(batch["caption"]))
                    bar.update(1)
                    if self.step % config.log_every == 0 or self.step == config.steps or stop.asked:
                        metrics.flush()
                        bar.set_postfix_str(self._shown(metrics.latest))
                    if self.step % config.val_every == 0 or self.step == config.steps:
                        metrics.flush()
                        self._validate(metrics)
                        metrics.pause()
                if stop.asked:
                    metrics.flush()
                    self.save()
                    raise Interrupted(f"stopped at step {self.step}; `--resume` continues the run in {self.folder}")
        finally:
            metrics.close()
        return self.figures

    def train_step(self, batch: dict[str, Any]) -> Tensor:
        """One step; the fused loss and its parts in one tensor, still on the device."""
        text = self._encode(batch["caption"])
        ids = caption_ids(batch["caption"]).to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.step + 1)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp):
            views = self.make_views(self.model, batch["image"], text)
            loss, parts = self.losses(views, batch["image"], ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.config.clip)
        self.optimizer.step()
        self.step += 1
        return torch.stack([loss.detach(), *(parts[name] for name in self.losses.weights)]).float()

    def save(self) -> None:
        """The whole state of the run; what follows from it is the same as without the interruption."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "fusion": self.losses.fuse.state_dict(),
            "bank": None if self.losses.bank is None else self.losses.bank.state_dict(),
            "rng": rng_state(),
            "asked": self.asked,
            "pictures": self.progress.state_dict(),
            "progress": {
                **{"step": self.step, "epoch": self.epoch, "position": self.position},
                **{"best": self.best, "stale": self.stale, "figures": self.figures},
            },
        }
        save_checkpoint(self.folder / LAST, model_state(self.config, self.model, self.tokenizer) | state)

    def _restore(self, content: dict[str, Any]) -> None:
        try:
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.losses.fuse.load_state_dict(content["fusion"])
            if self.losses.bank is not None:
                self.losses.bank.load_state_dict(content["bank"])
            for name, value in content["progress"].items():
                setattr(self, name, value)
            self.progress.load_state_dict(content.get("pictures", {}))
            set_rng_state(content["rng"])
            if self.figures and self.figures["score"] == self.best and self._best_step() != self.step:
                self._save_best()  # killed between the two files
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"checkpoint: {self.folder / LAST} does not fit this version's run ({error})") from error

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
        )

    def _captions(self) -> Iterator[str]:
        if hasattr(self.data, "captions"):
            yield from self.data.captions
        else:
            yield from (sample["caption"] for sample in self.data)

    def _encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        return self.model.text_encoder.encode(captions)  # type: ignore[operator]

    def _batches(self) -> Iterator[dict[str, Any]]:
        """Batches for ever, from where the run stands; the position counts a batch once it is handed out."""
        config = self.config
        while True:
            before = self.position
            for batch in batches(
                self.data, config.batch_size, config.seed, self.epoch, self.device, skip=self.position
            ):
                self.position += 1
                yield batch
            if before == 0 and self.position == 0:
                raise ValueError(f"data: the train split of {config.data} gives no batch")
            self.epoch, self.position = self.epoch + 1, 0

    def _learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine that ends at 1 % of the peak with the last step."""
        warm = min(1.0, step / max(self.config.warmup, 1))
        done = min(1.0, step / self.config.steps)
        return self.config.learning_rate * warm * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * done)))

    def _validate(self, metrics: Metrics) -> None:
        self.figures = validate(self.model, self.config, "val", self.splits["val"])
        metrics.add_validation(self.figures)
        self.progress.add(self.step, self.model, self.config, self.splits)
        better = self.figures["score"] > self.best + 1e-4
        self.stale = 0 if better else self.stale + 1
        if better:
            self.best = self.figures["score"]
        self.save()
        if better:
            self._save_best()
        if self._enough() and not self.quiet:
            log.info("stopped at step %d: the score is %s, the best %.4f", self.step, self._score(), self.best)

    def _save_best(self) -> None:
        best = model_state(self.config, self.model, self.tokenizer) | {"progress": {"step": self.step}}
        save_checkpoint(self.folder / BEST, best)

    def _best_step(self) -> int | None:
        try:
            return load_checkpoint(self.folder / BEST)["progress"]["step"]
        except ValueError:
            return None

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

    def _bar(self) -> Any:
        if self.quiet:
            return contextlib.nullcontext(_NoBar())
        try:
            from tqdm import tqdm
        except ImportError:
            return contextlib.nullcontext(_NoBar())
        pause = 0.5 if sys.stderr.isatty() else 10  # a log file needs no line per step
        return tqdm(total=self.config.steps, initial=self.step, unit="step", dynamic_ncols=True, mininterval=pause)

    def _shown(self, latest: dict[str, float]) -> str:
        losses = [f"loss {latest['loss']:.3f}", *(f"{name[:4]} {latest[name]:.3g}" for name in self.losses.weights)]
        return ", ".join(losses + ([f"score {self._score()}"] if self.figures else []))


class _NoBar:
    def update(self, count: int) -> None:
        """Nothing is shown."""

    def set_postfix_str(self, text: str) -> None:
        """Nothing is shown."""
