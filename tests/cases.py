"""One row per loss: what the battery (test_losses.py) checks and the benchmarks time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss


@dataclass
class Draw:
    """Random inputs of one dtype on one device, the same for the same seed whatever the dtype."""

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator).to(self.device, self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def near(self, other: Tensor) -> Tensor:
        """`other` plus noise, with about a quarter of exact ties."""
        noise = torch.randn(other.shape, generator=self.generator)
        kept = torch.rand(other.shape, generator=self.generator) > 0.25
        return other + (0.3 * noise * kept).to(other.device, other.dtype)


@dataclass
class Bench:
    """Shapes to time and the bytes (or FLOPs) a perfect kernel moves: `cost(shape, itemsize, mode)`."""

    shapes: Sequence[Any]
    cost: Callable[[Any, int, str], int]
    unit: str = "bytes"  # or "flops"
    options: Sequence[dict] = ({},)


@dataclass
class Case:
    """A public function and all that the battery needs to know of it.

    `make(draw, shape)` gives the positional arguments (tensors, or lists of tensors); `eager(*args, **options)` is the
    same loss written independently in plain PyTorch, as a user would have it; `grads` are the positions of the
    arguments that get gradients; `bad` rows are (what, change(args, options), exception, text the message has).
    """

    name: str
    fn: Callable
    make: Callable[[Draw, Any], tuple]
    eager: Callable
    shapes: Sequence[Any]
    options: Sequence[dict] = ({},)
    grads: tuple[int, ...] = (0, 1)
    reductions: tuple[str, ...] = ("none", "mean", "sum")  # () where the function has no reduction
    bad: Sequence[tuple[str, Callable, type[Exception], str]] = ()
    bench: Bench | None = None
    module: type | None = None
    extra: dict = field(default_factory=dict)


IMAGES = ((2, 3, 8, 8), (1, 1, 1, 1), (3, 2, 7, 13), (1, 3, 33, 65))


def image_pair(draw: Draw, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    image = draw.uniform(*shape)
    return image, draw.near(image)


def eager_pixel(image, image_pred, p=2, weight=None, eps=1e-6, delta=1.0, reduction="mean"):
    if weight is None and p in (1, 2):
        return (F.l1_loss if p == 1 else F.mse_loss)(image_pred, image, reduction=reduction)
    d = image_pred - image
    if p == "charbonnier":
        loss = (d * d + eps**2).sqrt()
    elif p == "huber":
        loss = F.huber_loss(image_pred, image, delta=delta, reduction="none")
    else:
        loss = d.abs() if p == 1 else d**2 if p == 2 else d.abs() ** p
    if weight is None:
        return loss if reduction == "none" else getattr(loss, reduction)()
    weighted = loss * weight
    total = weight.expand_as(loss).sum()
    return {"none": weighted, "sum": weighted.sum(), "mean": weighted.sum() / total}[reduction]


def with_argument(position: int, change: Callable[[Tensor], Any]) -> Callable:
    """A `bad` change: one positional argument replaced."""

    def apply(args: tuple, options: dict) -> tuple[tuple, dict]:
        new = list(args)
        new[position] = change(new[position])
        return tuple(new), options

    return apply


def with_options(**changed: Any) -> Callable:
    return lambda args, options: (args, options | changed)


CASES = [
    Case(
        "pixel_loss",
        fastloss.pixel_loss,
        image_pair,
        eager_pixel,
        shapes=(*IMAGES, (5,)),
        options=[
            {"p": 1}, {"p": 2}, {"p": 1.5}, {"p": 3}, {"p": "charbonnier"}, {"p": "charbonnier", "eps": 0.1},
            {"p": "huber"}, {"p": "huber", "delta": 0.1},
        ],
        bad=[
            ("shape", with_argument(1, lambda t: t[..., :-1]), ValueError, "image_pred: expected the shape of image"),
            ("integer", with_argument(0, lambda t: t.to(torch.uint8)), TypeError, "image: expected a float16"),
            ("list", with_argument(0, lambda t: [1.0]), TypeError, "image: expected a tensor, got list"),
            ("p", with_options(p=0.5), ValueError, "p: expected a finite number >= 1, got 0.5"),
            ("p name", with_options(p="l3"), ValueError, "p: expected a number >= 1, 'charbonnier' or 'huber'"),
            ("eps", with_options(p="charbonnier", eps=0.0), ValueError, "eps: expected a finite number > 0"),
            ("reduction", with_options(reduction="avg"), ValueError, "reduction: expected one of"),
        ],
        bench=Bench(
            shapes=[(8, 3, 512, 512)],
            # forward reads both images; backward reads both (sign and value are recomputed) and writes one gradient
            cost=lambda shape, size, mode: {"forward": 2, "backward": 3, "both": 5}[mode]
            * size * torch.Size(shape).numel(),
            options=[{"p": 1}, {"p": 2}, {"p": "charbonnier"}],
        ),
        module=fastloss.PixelLoss,
    ),
]
