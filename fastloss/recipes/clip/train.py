"""What `fastloss train-clip` trains: two encoders by AdamW; the loop is that of all recipes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import tokenizer as tokenizers
from ..training.checkpoint import check_recipe, load_checkpoint
from ..training.metrics import Metrics
from ..training.noise import RowNoise
from ..training.run import Run
from .config import Config
from .data import same_ids
from .evaluation import FIGURES, evaluate
from .model import TwoEncoders
from .step import Backward, Step, learned_numbers, shifted

RECIPE = "train-clip"
WORDS_OF_NAMES, WORDS_OF_CAPTIONS = 16, 48  # tokens of a caption at most
FIXED = (  # what a resumed run may not change: its curve would not be that of one run
    *("data", "batch_size", "loss", "max_scale", "weight_decay", "seed", "size", "channels", "shift", "dim", "width"),
    *("image_encoder", "text_encoder", "val_percent", "test_percent"),
)


class Trainer(Run):
    """A run of `fastloss train-clip`."""

    recipe, config_type, fixed = RECIPE, Config, FIXED
    config: Config

    def _tokenizer_state(self) -> dict[str, Any]:
        known = hasattr(self.data, "captions")
        captions = self.data.captions if known else (sample["caption"] for sample in self.data)
        length = WORDS_OF_NAMES if self.config.embedded() else WORDS_OF_CAPTIONS
        return tokenizers.WordTokenizer.from_captions(captions, length).state_dict()

    def _make(self) -> None:
        config = self.config
        self.model = TwoEncoders(config, self.tokenizer).to(self.device)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)

    def _join_ranks(self) -> None:
        self.backward = Backward(Step(self.model, self.config, self.world), self.config, self.world, self.device)

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

    def model_state(self) -> dict[str, Any]:
        return {
            "recipe": RECIPE,
            "config": dataclasses.asdict(self.config),
            "tokenizer": self.tokenizer.state_dict(),
            "model": self.model.state_dict(),
        }

    def _metrics(self) -> Metrics:
        folder = self.folder if self.world.main else None
        return Metrics(folder, learned_numbers(self.config), self.step, validated=list(FIGURES))

    def _judge(self) -> dict[str, float]:
        return self.world.first(lambda: evaluate(self.model, self.config, self.splits["val"]))

    def _shown(self, latest: dict[str, float]) -> str:
        parts = [f"{name} {latest[name]:.3f}" for name in ("loss", *learned_numbers(self.config))]
        return ", ".join(parts + [f"{name} {self.figures[name]:.1%}" for name in ("top1", "top5") if self.figures])


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
