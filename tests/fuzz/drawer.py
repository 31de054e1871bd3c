"""The random choices a call is made of: sizes, dtypes, tensors, numbers in every spelling."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from tests.fuzz.values import FILLS, LAYOUTS, NUMBERS, SEQUENCES, Spelled, T

INTEGERS = ("int64", "int32", "int16", "int8", "uint8")
FLOATS = ("float32", "bfloat16", "float16", "float64")


class Drawer:
    """A seeded generator; `sizes` holds the dimensions that the inputs have, for the options that depend on them."""

    def __init__(self, seed: str) -> None:
        self.rng = random.Random(seed)
        self.sizes: dict[str, Any] = {}
        kind = self.rng.random()
        self.large = kind > 0.985  # a few calls have large tensors
        self.mixed = kind < 0.12  # tensors of several dtypes
        self.dtype = self.rng.choices(FLOATS, (50, 20, 20, 10))[0]
        self.special = self.chance(0.35)  # values other than normal ones
        self.strided = self.chance(0.4)
        self.grads = self.chance(0.9)
        self.spells = self.chance(0.25)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def pick(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def size(self, low: int = 0, most: int = 60) -> int:
        """Mostly small."""
        high = self.rng.choices((0, 1, 9, 33, most), (3, 8, 62, 22, 5))[0]
        return max(low, high if high <= 1 else self.rng.randint(1, min(high, most)))

    def seed(self) -> int:
        return self.rng.randrange(10**6)

    def any_dtype(self) -> str:
        return self.pick(*FLOATS) if self.mixed else self.dtype

    def fill(self) -> str:
        return self.pick(*FILLS) if self.special and self.chance(0.6) else self.pick("normal", "normal", "uniform")

    def layout(self) -> str:
        return self.pick(*LAYOUTS) if self.strided else "dense"

    def tensor(self, *shape: int, grad: bool | None = True, fill: str | None = None, dtype: str | None = None) -> T:
        """A floating-point tensor; with `grad` it mostly needs a gradient."""
        return T(
            tuple(shape), dtype or self.any_dtype(), self.fill() if fill is None else fill, self.seed(),
            layout=self.layout(), grad=bool(grad) and self.grads and self.chance(0.8),
        )  # fmt: skip

    def beside(self, other: T, grad: bool = True) -> T:
        """A second tensor of the same shape: near the first with ties, equal to it, or another."""
        kind = self.rng.choices(("near", "equal", "other"), (55, 10, 35))[0]
        mine = self.tensor(*other.shape, grad=grad)
        if kind == "other":
            return mine
        near = -1 if kind == "equal" else self.seed()
        return T(mine.shape, mine.dtype, other.fill, other.seed, near, layout=mine.layout, grad=mine.grad)

    def integers(self, high: int, *shape: int, low: int = 0) -> T:
        dtype = self.pick(*INTEGERS) if self.chance(0.3) else "int64"
        if high > 127:
            dtype = "int64"
        return T(tuple(shape), dtype, seed=self.seed(), low=low, high=max(high, low + 1), layout=self.layout())

    def maps(self, shape: Sequence[int]) -> T:
        """Weights >= 0 that broadcast to a shape: zeros among them, or all zero, or a bool mask."""
        shape = tuple(1 if self.chance(0.3) else n for n in shape)
        shape = shape[self.rng.randrange(len(shape)) :] if shape and self.chance(0.15) else shape
        if self.chance(0.15):
            return T(shape, "bool", self.pick(0.5, 0.9, 0.0), self.seed(), layout=self.layout())
        return self.tensor(*shape, grad=None, fill=self.pick("uniform", "rectified", "ones", "zeros", "flat"))

    def number(self, low: float, high: float, *known: float, spelled: bool = True) -> Any:
        """In [low, high], spread by magnitude where both are positive; now and then one of the `known` ones."""
        if known and self.chance(0.35):
            value = self.pick(*known)
        elif low > 0:
            value = float(f"{math.exp(self.rng.uniform(math.log(low), math.log(high))):.3g}")
        else:
            value = round(self.rng.uniform(low, high), 3)
        if float(value).is_integer() and abs(value) < 10**6 and self.chance(0.5):
            value = int(value)
        if spelled and self.spells and self.chance(0.5):
            form = "np.int64" if isinstance(value, int) else self.pick(*NUMBERS)
            return Spelled(form, value)
        return value

    def integer(self, *choices: int) -> Any:
        value = self.pick(*choices)
        return Spelled("np.int64", value) if self.spells and self.chance(0.2) else value

    def sequence(self, values: list[Any], numbers: bool = True) -> Any:
        """A list, or another sequence of the same: an array or a tensor of `numbers`."""
        if not (self.spells and self.chance(0.6)):
            return values if self.chance(0.7) else tuple(values)
        numbers = numbers and all(isinstance(v, (int, float)) for v in values)
        form = self.pick(*SEQUENCES) if numbers and values else self.pick("tuple", "Rest")
        return Spelled(form, values)

    def scalar(self, low: float, high: float, *known: float) -> Any:
        """A number, or a one-element tensor, which may be learned."""
        if not self.chance(0.35):
            return self.number(low, high, *known)
        value = float(self.number(low, high, *known, spelled=False))
        return T(self.pick((), (1,)), self.pick("float32", self.dtype), value, grad=self.grads and self.chance(0.7))

    def row_weights(self, rows: int) -> T:
        if self.chance(0.15):
            return T((rows,), "bool", self.pick(0.5, 0.0), self.seed())
        return self.tensor(rows, grad=None, fill=self.pick("uniform", "rectified", "ones", "zeros"))
