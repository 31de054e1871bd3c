"""The options of a run. The command line is made from these fields, so each is declared once."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

WEIGHTS = {
    "contrastive": 0.1,
    "perceptual": 0.1,
    "pixel": 1.0,
    "smoothness": 0.001,
    "diversity": 0.01,
    "mode_seeking": 0.0001,
    "attention": 0.01,
    "prior": 0.002,
}
SIZES = (32, 64, 128)

DIGITS = "digits"


def check_weights(weights: dict[str, float]) -> dict[str, float]:
    """The weights, finite, >= 0 and of known names, or a ValueError."""
    for name, weight in weights.items():
        if name not in WEIGHTS:
            raise ValueError(f"weights: unknown loss {name!r}; the losses are {', '.join(WEIGHTS)}")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weights: {name} needs a finite weight >= 0, got {weight!r}")
    return weights


def _option(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass
class Config:
    """A training run. Plain numbers and strings only: it is stored in the checkpoint."""

    data: str = _option(DIGITS, "digits, folder:PATH or wds:SHARDS")
    out: str = _option("runs/digits", "folder for checkpoint, metrics, pictures and report")
    steps: int = _option(1000, "training steps")
    batch_size: int = _option(64, "images per step")
    losses: str = _option("fast", "fast, or reference: the same loop on the eager losses")
    weights: str = _option("", "weights of the losses, e.g. contrastive=0.1,pixel=1; 0 turns a loss off")
    weighting: str = _option("fixed", "fusion: fixed, uncertainty, dwa, relobralo")
    temperature: float = _option(0.1, "temperature of the contrastive loss")
    bank: int = _option(0, "image embeddings kept as further negatives")
    learning_rate: float = _option(2e-3, "peak of Adam's learning rate")
    warmup: int = _option(50, "steps of linear warm-up, before the cosine")
    clip: float = _option(1.0, "gradient norm to clip at")
    seed: int = _option(0, "seed of weights, noise and data order")
    size: int = _option(32, "side of the images: 32, 64 or 128")
    channels: int = _option(0, "1 or 3; 0: 1 for digits, else 3")
    dim: int = _option(64, "width of the model, a multiple of 16")
    depth: int = _option(2, "transformer blocks in each of text encoder and image decoder")
    z_dim: int = _option(8, "length of the noise z")
    tokenizer: str = _option("auto", "word, byte, or auto: word for digits, else byte")
    text_encoder: str = _option("", "pretrained encoder from transformers: name or local folder; empty: trained here")
    backbones: str = _option("auto", "networks of the perceptual loss, with commas; auto: the digits' own, else vgg16")
    backbone_weights: str = _option("", "a local weights file for each backbone, or random; empty: download")
    amp: bool = _option(False, "autocast to bfloat16")
    compile: bool = _option(False, "torch.compile the model")
    device: str = _option("auto", "auto, cpu, cuda, cuda:1, ...")
    log_every: int = _option(20, "steps between two writes of the metrics")
    val_every: int = _option(200, "steps between two validations; each writes a checkpoint")
    patience: int = _option(5, "validations without a better score before the run stops; 0: never")
    quality: float = _option(0.0, "stop once the validation score reaches this; 0: never")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "dim", "depth", "z_dim", "log_every", "val_every"):
            _at_least(name, getattr(self, name), 1)
        for name in ("bank", "warmup", "patience", "quality"):
            _at_least(name, getattr(self, name), 0)
        for name in ("temperature", "learning_rate", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a finite number > 0, got {value!r}")
        _one_of("losses", self.losses, ("fast", "reference"))
        _one_of("weighting", self.weighting, ("fixed", "uncertainty", "dwa", "relobralo"))
        _one_of("size", self.size, SIZES)
        _one_of("channels", self.channels, (0, 1, 3))
        _one_of("tokenizer", self.tokenizer, ("auto", "word", "byte"))
        if self.data != DIGITS and not self.data.startswith(("folder:", "wds:")):
            raise ValueError(f"data: expected digits, folder:PATH or wds:SHARDS, got {self.data!r}")
        if self.data == DIGITS and self.channels == 3:
            raise ValueError("channels: the digits are grey, expected 1")
        if self.dim % 16:
            raise ValueError(f"dim: expected a multiple of 16, got {self.dim}")
        self.loss_weights()

    def loss_weights(self) -> dict[str, float]:
        """`weights` as numbers by name; the losses not named keep their defaults."""
        return parse_weights(self.weights)

    def image_channels(self) -> int:
        return self.channels or (1 if self.data == DIGITS else 3)

    def torch_device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device: {self.device!r} cannot be used here ({reason})") from error
        return device


def parse_weights(text: str) -> dict[str, float]:
    """ "contrastive=1,perceptual=0.1" as a dict."""
    weights = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = part.partition("=")
        try:
            weights[name.strip()] = float(value)
        except ValueError:
            raise ValueError(f"weights: expected name=number, got {part!r}") from None
    return check_weights(weights)


def _at_least(name: str, value: float, low: int) -> None:
    if not value >= low:
        raise ValueError(f"{name}: expected at least {low}, got {value!r}")


def _one_of(name: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")
