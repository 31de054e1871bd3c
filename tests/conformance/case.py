"""What a row of cases/ is made of: the Case itself, its random inputs, its benchmark, its bad inputs."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


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
    """Shapes to time and the bytes (or FLOPs) a perfect kernel moves: `cost(shape, itemsize, mode)`.

    A cost that depends on the options takes them as a fourth argument, `options`.
    `all_grads`: a training loop differentiates all the grad arguments; else only the last, the prediction.
    `headline`: how many of the options, from the first, the short suite and the README have. `cuda_shapes`: those of a
    device, if a CPU cannot show them. `make`: the inputs, where the conformance tests' show nothing (a saturated
    softmax).
    """

    shapes: Sequence[Any]
    cost: Callable[..., int]
    unit: str = "bytes"  # or "flops"
    options: Sequence[dict] = ({},)
    all_grads: bool = False
    headline: int = 1
    cuda_shapes: Sequence[Any] = ()
    make: Callable[[Draw, Any], tuple] | None = None

    def charge(self, shape: Any, itemsize: int, mode: str, options: dict) -> int:
        more = {"options": options} if "options" in inspect.signature(self.cost).parameters else {}
        return self.cost(shape, itemsize, mode, **more)


@dataclass
class Case:
    """A public function and all that the conformance tests need to know of it.

    `make(draw, shape)` gives the positional arguments (tensors, or lists of tensors); `eager(*args, **options)` is the
    same loss written independently in plain PyTorch, as a user would have it; `grads` are the positions of the
    arguments that get gradients; `bad` rows are (what, change(args, options), exception, text the message has); `empty`
    are shapes with an axis of 0 that are taken, beside the options without tensors of one value per row.
    """

    name: str
    fn: Callable
    make: Callable[[Draw, Any], tuple]
    eager: Callable
    shapes: Sequence[Any]
    options: Sequence[dict] = ({},)
    grads: tuple[int, ...] = (0, 1)
    empty: Sequence[Any] = ()
    reductions: tuple[str, ...] = ("none", "mean", "sum")  # () where the function has no reduction
    bad: Sequence[tuple[str, Callable, type[Exception], str]] = ()
    bench: Bench | None = None
    module: type | None = None
    extra: dict = field(default_factory=dict)


NARROW = ((2, 3, 1, 9), (2, 3, 9, 1))  # a side of 1; with (1, 1, 1, 1): each, and all
IMAGES = ((2, 3, 8, 8), (1, 1, 1, 1), (3, 2, 7, 13), (1, 3, 33, 65), *NARROW)
# of a volume: each side, each two and all of them 1 in turn
NARROW_VOLUMES = tuple((2, 2, *sides) for sides in itertools.product((1, 4), (1, 3), (1, 5)) if 1 in sides)
VOLUMES = ((2, 2, 3, 4, 5), (1, 1, 2, 3, 2), *NARROW_VOLUMES)


def image_pair(draw: Draw, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    image = draw.uniform(*shape)
    return image, draw.near(image)


def with_argument(position: int, change: Callable[[Tensor], Any]) -> Callable:
    """A `bad` change: one positional argument replaced."""

    def apply(args: tuple, options: dict) -> tuple[tuple, dict]:
        new = list(args)
        new[position] = change(new[position])
        return tuple(new), options

    return apply


def with_options(**changed: Any) -> Callable:
    return lambda args, options: (args, options | changed)
