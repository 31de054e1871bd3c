"""What `fastloss train` trains: views, losses, their fusion, Adam; the loop is that of all recipes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..data.samples import caption_ids
from ..training.metrics import Metrics
from ..training.noise import RowNoise
from ..training.run import Run
from ..training.shared_batch import SharedBatch
from ..training.world import across_ranks
from .build import RECIPE, make_model, make_tokenizer, tokenizer_state
from .config import Config
from .examples import Progress
from .figures import shown, validated
from .losses import ImagenLosses, make_views, perceptual_loss
from .model import Imagen
from .validation import validate

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
    """A run of `fastloss train`."""

    recipe, config_type, fixed = RECIPE, Config, FIXED
    config: Config
    compute: nn.Module

    def _tokenizer_state(self) -> dict[str, Any] | None:
        return tokenizer_state(make_tokenizer(self.config, self._captions()))

    def _make(self) -> None:
        config = self.config
        self.model = make_model(config, self.tokenizer).to(self.device)
        self.losses = self._make_losses().to(self.device)
        self.compute = Step(self.model, self.losses, config.compile)
        self.trained = [p for p in (*self.model.parameters(), *self.losses.fuse.parameters()) if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.trained, lr=config.learning_rate, fused=self.device.type == "cuda")
        self.progress = Progress()

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

    def _join_ranks(self) -> None:
        if self.world.size > 1:
            self.compute = across_ranks(self.compute, self.world, self.device)

    def _captions(self) -> Iterator[str]:
        if hasattr(self.data, "captions"):
            yield from self.data.captions
        else:
            yield from (sample["caption"] for sample in self.data)

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

    def _encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        return self.model.text_encoder.encode(captions)  # type: ignore[operator]

    def model_state(self) -> dict[str, Any]:
        return {
            "recipe": RECIPE,
            "config": dataclasses.asdict(self.config),
            "tokenizer": tokenizer_state(self.tokenizer),
            "model": self.model.state_dict(),
        }

    def _more_state(self) -> dict[str, Any]:
        return {
            "fusion": self.losses.fuse.state_dict(),
            "bank": None if self.losses.bank is None else self.losses.bank.state_dict(),
            "pictures": self.progress.state_dict(),
        }

    def _load_more_state(self, content: dict[str, Any]) -> None:
        self.losses.fuse.load_state_dict(content["fusion"])
        if self.losses.bank is not None:
            self.losses.bank.load_state_dict(content["bank"])
        self.progress.load_state_dict(content.get("pictures", {}))

    def _metrics(self) -> Metrics:
        folder = self.folder if self.world.main else None
        return Metrics(folder, list(self.losses.weights), self.step, validated=validated(self.config))

    def _judge(self) -> dict[str, float]:
        """And pictures of the model's progress."""

        def judged() -> tuple[dict[str, float], dict[str, Any]]:
            figures = validate(self.model, self.config, "val", self.splits["val"])
            self.progress.add(self.step, self.model, self.config, self.splits)
            return figures, self.progress.state_dict()

        figures, pictures = self.world.first(judged)
        self.progress.load_state_dict(pictures)
        return figures

    def _reached(self) -> str:
        """The quality aimed for is reached, or the score has converged."""
        return "quality" if 0 < self.config.quality <= self.best else super()._reached()

    def _score(self) -> str:
        return shown("score", self.figures)

    def _shown(self, latest: dict[str, float]) -> str:
        losses = [f"loss {latest['loss']:.3f}", *(f"{name[:4]} {latest[name]:.3g}" for name in self.losses.weights)]
        return ", ".join(losses + ([f"score {self._score()}"] if self.figures else []))
