"""The options of a run. The command line is made from these fields, so each is declared once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..training.options import at_least, multiple_of, one_of, option, positive, shares_left, torch_device

if TYPE_CHECKING:  # the help of the command line is made from this file and needs no torch
    import torch

RUN, DATA, LOSS, OPTIMISER, MODEL, SPEED = "Run", "Data", "Loss", "Optimiser", "Model", "Speed"  # groups of options
DIGITS, GLYPHS = "digits", "glyphs"
LOSSES = ("clip", "siglip")
IMAGE_ENCODERS = ("auto", "mlp", "conv")
TEXT_ENCODERS = ("auto", "words", "transformer")


@dataclass
class Config:
    """A training run. Plain numbers and strings only: it is stored in the checkpoint."""

    data: str = option(
        DATA, GLYPHS, "glyphs, digits, folder:PATH, or wds: with a folder, a glob or braces of .tar shards"
    )
    out: str = option(RUN, "runs/clip", "folder for checkpoint, metrics, pictures and report")
    steps: int = option(RUN, 1000, "training steps")
    batch_size: int = option(RUN, 1024, "pairs per step, of all ranks together, at most the training pairs there are")
    chunk: int = option(
        SPEED, 0, "pairs embedded at a time, with the gradients of the whole batch (cached_step); 0: all at once"
    )
    loss: str = option(LOSS, "clip", "clip: softmax over the batch, siglip: a sigmoid for each pair", LOSSES)
    max_scale: float = option(LOSS, 100.0, "upper bound of the learned scale of the similarities")
    learning_rate: float = option(OPTIMISER, 2e-3, "peak of AdamW's learning rate")
    weight_decay: float = option(OPTIMISER, 0.05, "AdamW's, of weight matrices")
    warmup: int = option(OPTIMISER, 50, "steps of linear warm-up before the cosine, at most a tenth of the steps")
    max_norm: float = option(OPTIMISER, 1.0, "gradient norm to clip at")
    seed: int = option(RUN, 0, "seed of weights, shifts and data order")
    size: int = option(DATA, 0, "side of the images, a multiple of 8; 0: 24 for glyphs, 16 for digits, else 64")
    channels: int = option(DATA, 0, "1 or 3; 0: 1 for glyphs and digits, else 3")
    shift: int = option(DATA, 1, "pixels by which a training image is moved at most, at random")
    dim: int = option(MODEL, 128, "width of the embeddings, a multiple of 16")
    width: int = option(MODEL, 768, "width of the image encoder's layers, of conv that of the last ones")
    image_encoder: str = option(
        MODEL, "auto", "mlp, conv, or auto: mlp for glyphs and digits, else conv", IMAGE_ENCODERS
    )
    text_encoder: str = option(
        MODEL, "auto", "words (weighted by place and summed), transformer, or auto: words for glyphs and digits",
        TEXT_ENCODERS,
    )  # fmt: skip
    amp: bool = option(SPEED, False, "autocast to bfloat16")
    device: str = option(SPEED, "auto", "auto, cpu, cuda, cuda:1, ...", ("auto", "cpu", "cuda"))
    log_every: int = option(RUN, 20, "steps between two writes of the metrics")
    val_every: int = option(RUN, 250, "steps between two validations; each writes a checkpoint")
    patience: int = option(RUN, 0, "validations without a better score before the run stops; 0: never")
    val_percent: int = option(DATA, 5, "pairs in 100 kept for validation, where no folder or shard is called val")
    test_percent: int = option(DATA, 5, "pairs in 100 kept for the test, where no folder or shard is called test")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "val_every", "val_percent", "test_percent"):
            at_least(name, getattr(self, name), 1)
        for name in ("chunk", "warmup", "weight_decay", "patience", "size", "shift"):
            at_least(name, getattr(self, name), 0)
        for name in ("dim", "width"):
            at_least(name, getattr(self, name), 16)
            multiple_of(name, getattr(self, name), 16)
        for name in ("learning_rate", "max_norm", "max_scale"):
            positive(name, getattr(self, name))
        for name, choices in (("loss", LOSSES), ("image_encoder", IMAGE_ENCODERS), ("text_encoder", TEXT_ENCODERS)):
            one_of(name, getattr(self, name), choices)
        one_of("channels", self.channels, (0, 1, 3))
        self.size = self.size or {GLYPHS: 24, DIGITS: 16}.get(self.data, 64)
        multiple_of("size", self.size, 8)
        shares_left(self.val_percent, self.test_percent)
        if not self.embedded() and not self.data.startswith(("folder:", "wds:")):
            raise ValueError(f"data: expected glyphs, digits, folder:PATH or wds:SHARDS, got {self.data!r}")
        if self.embedded() and self.held_out() != (5, 5):
            raise ValueError(f"val_percent: {self.data} have fixed splits, expected no shares")
        if self.embedded() and self.channels == 3:
            raise ValueError(f"channels: {self.data} are grey, expected 1")
        if 2 * self.shift >= self.size:
            raise ValueError(f"shift: expected less than half of the side {self.size}, got {self.shift}")

    def embedded(self) -> bool:
        """Whether the data come with the installation."""
        return self.data in (DIGITS, GLYPHS)

    def image_channels(self) -> int:
        return self.channels or (1 if self.embedded() else 3)

    def held_out(self) -> tuple[int, int]:
        """Pairs in 100 for validation and for the test."""
        return self.val_percent, self.test_percent

    def encoders(self) -> tuple[str, str]:
        """Of images and of texts, with "auto" resolved."""
        image, text = ("mlp", "words") if self.embedded() else ("conv", "transformer")
        return (
            image if self.image_encoder == "auto" else self.image_encoder,
            text if self.text_encoder == "auto" else self.text_encoder,
        )

    def torch_device(self) -> torch.device:
        return torch_device(self.device)
