"""The options of a run. The command line is made from these fields, so each is declared once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..training.options import at_least, multiple_of, one_of, option, positive, shares_left, torch_device

if TYPE_CHECKING:  # the help of the command line is made from this file and needs no torch
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


RUN, DATA, LOSSES, OPTIMISER, MODEL, SPEED = "Run", "Data", "Losses", "Optimiser", "Model", "Speed"  # groups of options
WEIGHTINGS = ("fixed", "uncertainty", "dwa", "relobralo")
TOKENIZERS = ("auto", "word", "byte")


@dataclass
class Config:
    """A training run. Plain numbers and strings only: it is stored in the checkpoint."""

    data: str = option(DATA, DIGITS, "digits, folder:PATH, or wds: with a folder, a glob or braces of .tar shards")
    out: str = option(RUN, "runs/digits", "folder for checkpoint, metrics, pictures and report")
    steps: int = option(RUN, 1000, "training steps")
    batch_size: int = option(RUN, 64, "images per step, of all ranks together, at most the training images there are")
    losses: str = option(LOSSES, "fast", "fast, or reference: the same loop on the eager losses", ("fast", "reference"))
    weights: str = option(LOSSES, "", "weights of the losses, e.g. contrastive=0.1,pixel=1; 0 turns a loss off")
    weighting: str = option(LOSSES, "fixed", f"fusion: {', '.join(WEIGHTINGS)}", WEIGHTINGS)
    temperature: float = option(LOSSES, 0.1, "temperature of the contrastive loss")
    bank: int = option(LOSSES, 0, "image embeddings kept as further negatives")
    learning_rate: float = option(OPTIMISER, 2e-3, "peak of Adam's learning rate")
    warmup: int = option(OPTIMISER, 50, "steps of linear warm-up before the cosine, at most a tenth of the steps")
    clip: float = option(OPTIMISER, 1.0, "gradient norm to clip at")
    seed: int = option(RUN, 0, "seed of weights, noise and data order")
    size: int = option(DATA, 32, "side of the images: 32, 64 or 128")
    channels: int = option(DATA, 0, "1 or 3; 0: 1 for digits, else 3")
    dim: int = option(MODEL, 64, "width of the model, a multiple of 16")
    depth: int = option(MODEL, 2, "transformer blocks in each of text encoder and image decoder")
    z_dim: int = option(MODEL, 8, "length of the noise z")
    tokenizer: str = option(MODEL, "auto", "word, byte, or auto: word for digits, else byte", TOKENIZERS)
    text_encoder: str = option(
        MODEL, "", "pretrained encoder from transformers: name or local folder; empty: trained here"
    )
    backbones: str = option(
        LOSSES,
        "auto",
        "networks of the perceptual loss, with commas: digits (small, in the package), vgg16, ...; "
        "auto: digits for digits, else vgg16",
    )
    backbone_weights: str = option(LOSSES, "", "a local weights file for each backbone, or random; empty: download")
    amp: bool = option(SPEED, False, "autocast to bfloat16")
    compile: bool = option(SPEED, False, "torch.compile the model")
    device: str = option(SPEED, "auto", "auto, cpu, cuda, cuda:1, ...", ("auto", "cpu", "cuda"))
    log_every: int = option(RUN, 20, "steps between two writes of the metrics")
    val_every: int = option(RUN, 200, "steps between two validations; each writes a checkpoint")
    patience: int = option(RUN, 5, "validations without a better score before the run stops; 0: never")
    quality: float = option(RUN, 0.0, "stop once the validation score reaches this; 0: never")
    val_percent: int = option(DATA, 5, "images in 100 kept for validation, where no folder or shard is called val")
    test_percent: int = option(DATA, 5, "images in 100 kept for the test, where no folder or shard is called test")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "dim", "depth", "z_dim", "log_every", "val_every"):
            at_least(name, getattr(self, name), 1)
        for name in ("val_percent", "test_percent"):
            at_least(name, getattr(self, name), 1)
        shares_left(self.val_percent, self.test_percent)
        if self.data == DIGITS and self.held_out() != (5, 5):
            raise ValueError("val_percent: the digits have fixed splits (1397, 200 and 200 images), expected no shares")
        for name in ("bank", "warmup", "patience", "quality"):
            at_least(name, getattr(self, name), 0)
        for name in ("temperature", "learning_rate", "clip"):
            positive(name, getattr(self, name))
        one_of("losses", self.losses, ("fast", "reference"))
        one_of("weighting", self.weighting, WEIGHTINGS)
        one_of("size", self.size, SIZES)
        one_of("channels", self.channels, (0, 1, 3))
        one_of("tokenizer", self.tokenizer, TOKENIZERS)
        if self.data != DIGITS and not self.data.startswith(("folder:", "wds:")):
            raise ValueError(f"data: expected digits, folder:PATH or wds:SHARDS, got {self.data!r}")
        if self.data == DIGITS and self.channels == 3:
            raise ValueError("channels: the digits are grey, expected 1")
        multiple_of("dim", self.dim, 16)
        self.loss_weights()

    def loss_weights(self) -> dict[str, float]:
        """`weights` as numbers by name; the losses not named keep their defaults."""
        return parse_weights(self.weights)

    def image_channels(self) -> int:
        return self.channels or (1 if self.data == DIGITS else 3)

    def held_out(self) -> tuple[int, int]:
        """Images in 100 for validation and for the test."""
        return self.val_percent, self.test_percent

    def backbone_names(self) -> list[str]:
        """The networks of the perceptual loss, with "auto" resolved."""
        auto = "digits" if self.data == DIGITS else "vgg16"
        return (auto if self.backbones == "auto" else self.backbones).split(",")

    def word_tokens(self) -> bool:
        return self.tokenizer == "word" or (self.tokenizer == "auto" and self.data == DIGITS)

    def torch_device(self) -> torch.device:
        return torch_device(self.device)


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
