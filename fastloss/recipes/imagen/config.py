"""The options of a run. The command line is made from these fields, so each is declared once."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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


def _option(group: str, default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "group": group, "choices": choices})


RUN, DATA, LOSSES, OPTIMISER, MODEL, SPEED = "Run", "Data", "Losses", "Optimiser", "Model", "Speed"  # groups of options
WEIGHTINGS = ("fixed", "uncertainty", "dwa", "relobralo")
TOKENIZERS = ("auto", "word", "byte")


@dataclass
class Config:
    """A training run. Plain numbers and strings only: it is stored in the checkpoint."""

    data: str = _option(DATA, DIGITS, "digits, folder:PATH, or wds: with a folder, a glob or braces of .tar shards")
    out: str = _option(RUN, "runs/digits", "folder for checkpoint, metrics, pictures and report")
    steps: int = _option(RUN, 1000, "training steps")
    batch_size: int = _option(RUN, 64, "images per step, of all ranks together, at most the training images there are")
    losses: str = _option(
        LOSSES, "fast", "fast, or reference: the same loop on the eager losses", ("fast", "reference")
    )
    weights: str = _option(LOSSES, "", "weights of the losses, e.g. contrastive=0.1,pixel=1; 0 turns a loss off")
    weighting: str = _option(LOSSES, "fixed", f"fusion: {', '.join(WEIGHTINGS)}", WEIGHTINGS)
    temperature: float = _option(LOSSES, 0.1, "temperature of the contrastive loss")
    bank: int = _option(LOSSES, 0, "image embeddings kept as further negatives")
    learning_rate: float = _option(OPTIMISER, 2e-3, "peak of Adam's learning rate")
    warmup: int = _option(OPTIMISER, 50, "steps of linear warm-up before the cosine, at most a tenth of the steps")
    clip: float = _option(OPTIMISER, 1.0, "gradient norm to clip at")
    seed: int = _option(RUN, 0, "seed of weights, noise and data order")
    size: int = _option(DATA, 32, "side of the images: 32, 64 or 128")
    channels: int = _option(DATA, 0, "1 or 3; 0: 1 for digits, else 3")
    dim: int = _option(MODEL, 64, "width of the model, a multiple of 16")
    depth: int = _option(MODEL, 2, "transformer blocks in each of text encoder and image decoder")
    z_dim: int = _option(MODEL, 8, "length of the noise z")
    tokenizer: str = _option(MODEL, "auto", "word, byte, or auto: word for digits, else byte", TOKENIZERS)
    text_encoder: str = _option(
        MODEL, "", "pretrained encoder from transformers: name or local folder; empty: trained here"
    )
    backbones: str = _option(
        LOSSES,
        "auto",
        "networks of the perceptual loss, with commas: digits (small, in the package), vgg16, ...; "
        "auto: digits for digits, else vgg16",
    )
    backbone_weights: str = _option(LOSSES, "", "a local weights file for each backbone, or random; empty: download")
    amp: bool = _option(SPEED, False, "autocast to bfloat16")
    compile: bool = _option(SPEED, False, "torch.compile the model")
    device: str = _option(SPEED, "auto", "auto, cpu, cuda, cuda:1, ...", ("auto", "cpu", "cuda"))
    log_every: int = _option(RUN, 20, "steps between two writes of the metrics")
    val_every: int = _option(RUN, 200, "steps between two validations; each writes a checkpoint")
    patience: int = _option(RUN, 5, "validations without a better score before the run stops; 0: never")
    quality: float = _option(RUN, 0.0, "stop once the validation score reaches this; 0: never")
    val_percent: int = _option(DATA, 5, "images in 100 kept for validation, where no folder or shard is called val")
    test_percent: int = _option(DATA, 5, "images in 100 kept for the test, where no folder or shard is called test")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "dim", "depth", "z_dim", "log_every", "val_every"):
            _at_least(name, getattr(self, name), 1)
        for name in ("val_percent", "test_percent"):
            _at_least(name, getattr(self, name), 1)
        if self.val_percent + self.test_percent > 90:
            total = self.val_percent + self.test_percent
            raise ValueError(f"val_percent: expected at most 90 with --test-percent, got {total} in all")
        if self.data == DIGITS and self.held_out() != (5, 5):
            raise ValueError("val_percent: the digits have fixed splits (1397, 200 and 200 images), expected no shares")
        for name in ("bank", "warmup", "patience", "quality"):
            _at_least(name, getattr(self, name), 0)
        for name in ("temperature", "learning_rate", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a finite number > 0, got {value!r}")
        _one_of("losses", self.losses, ("fast", "reference"))
        _one_of("weighting", self.weighting, WEIGHTINGS)
        _one_of("size", self.size, SIZES)
        _one_of("channels", self.channels, (0, 1, 3))
        _one_of("tokenizer", self.tokenizer, TOKENIZERS)
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
        import torch

        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device: {self.device!r} cannot be used here ({reason})") from error
        return device


def fitted(config: Config, images: int, ranks: int = 1) -> tuple[Config, list[str]]:
    """The configuration for a training set of so many images and a run of so many steps, and a notice for each change:
    the batch is at most the data, the warm-up at most a tenth of the steps.

    Raises:
        ValueError: a batch has less than one image for each rank.
    """
    if images < ranks:
        raise ValueError(
            f"data: expected a training image for each of the {ranks} ranks, got {images} in {config.data}"
        )
    if config.batch_size < ranks:
        raise ValueError(f"batch_size: expected an image for each of the {ranks} ranks, got {config.batch_size}")
    notices, changes = [], dict[str, int]()
    if images < config.batch_size:
        changes["batch_size"] = images
        notices.append(f"--batch-size: {images} in place of {config.batch_size}, as many as there are training images")
    if config.steps // 10 < config.warmup:
        changes["warmup"] = config.steps // 10
        notices.append(f"--warmup: {changes['warmup']} in place of {config.warmup}, a tenth of {config.steps} steps")
    return dataclasses.replace(config, **changes), notices  # type: ignore[arg-type]


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
