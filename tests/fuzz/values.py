"""What a drawn call is made of: values that print as code, build as what is passed, and have a plain float64 form.

code(v)    what can be pasted
make(v)    what the call under test gets
plain(v)   what the float64 reference gets: float64 tensors of the same values, Python numbers and lists
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastloss

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SMALLEST = {torch.float16: 6e-5, torch.bfloat16: 1.2e-38, torch.float32: 1.2e-38, torch.float64: 1.2e-38}
LARGEST = {torch.float16: 6e4, torch.bfloat16: 3.3e38, torch.float32: 3.3e38, torch.float64: 3.3e38}


def _base(shape: tuple[int, ...], fill: str, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """float64 values by the name of their kind; float64 tensors stay in float32's range."""
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    half = dtype == torch.float16
    if fill in ("nan", "inf"):
        chosen = (uniform == uniform.max()) if normal.numel() else uniform.bool()
        return torch.where(chosen, normal.sign() * float(fill), normal)
    if fill == "rows":  # every row the first one
        return normal[:1].expand(shape) if normal.ndim else normal
    return {
        "normal": lambda: normal,
        "uniform": lambda: uniform,
        "zeros": lambda: torch.zeros_like(normal),
        "ones": lambda: torch.ones_like(normal),
        "flat": lambda: torch.full_like(normal, 0.1 + 0.8 * torch.rand((), generator=generator).item()),
        "big": lambda: 1e3 * normal,
        "huge": lambda: (1e4 if half else 1e15) * normal,
        "largest": lambda: LARGEST[dtype] * normal.sign() * (1 - 0.01 * uniform),
        "small": lambda: 1e-3 * normal,
        "tiny": lambda: (1e-6 if half else 1e-18) * normal,
        "denormal": lambda: SMALLEST[dtype] * normal.sign() * uniform,
        "mixed": lambda: normal * 10 ** (8 * uniform - 5),
        "integers": lambda: (2 * normal).round(),
        "blocks": lambda: (uniform > 0.5).double() * 1.2 - 0.6,
        "rectified": lambda: normal.clamp(min=0),
        "offset": lambda: 1000 + uniform,
    }[fill]()


FILLS = (
    "normal uniform zeros ones flat big huge largest small tiny denormal mixed integers blocks rectified offset rows "
    "nan inf"
).split()
LAYOUTS = "dense transposed reversed sliced columns alternate expanded channels_last offset".split()


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values in another memory format; "expanded" repeats the first of the first dimension."""
    if layout == "dense" or t.ndim == 0:
        return t
    if layout == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "reversed":
        order = tuple(reversed(range(t.ndim)))
        return t.permute(order).contiguous().permute(order)
    if layout == "sliced":
        return torch.stack((t, t), -1)[..., 0]
    if layout == "columns":
        return torch.cat((t, t), -1)[..., t.shape[-1] :]
    if layout == "alternate":
        return torch.stack((t, t), 1).flatten(0, 1)[::2]
    if layout == "expanded":
        return t[:1].expand_as(t) if t.shape[0] else t
    if layout == "channels_last":
        form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(t.ndim)
        return t.contiguous(memory_format=form) if form else t
    return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)  # "offset": not aligned


def tensor(
    shape: Sequence[int],
    dtype: str = "float32",
    fill: str | float = "normal",
    seed: int = 0,
    *,
    near: int | None = None,
    low: int | None = None,
    high: int | None = None,
    layout: str = "dense",
    grad: bool = False,
    inference: bool = False,
) -> Tensor:
    """A drawn tensor. `fill`: a kind of values, or the one value. `near`: those of `seed` plus noise of this seed,
    with a quarter of exact ties; -1: no noise. `low`, `high`: whole numbers of this range. `inference`: made in that
    mode."""
    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(seed)
    if low is not None and high is not None:
        values = torch.randint(low, high, tuple(shape), generator=generator)
    elif dtype == "bool":
        values = torch.rand(tuple(shape), generator=generator) < (fill if isinstance(fill, float) else 0.7)
    elif isinstance(fill, str):
        values = _base(tuple(shape), fill, generator, kind)
    else:
        values = torch.full(tuple(shape), fill, dtype=torch.float64)
    if near is not None and near >= 0:
        generator = torch.Generator().manual_seed(near)
        noise = torch.randn(values.shape, generator=generator, dtype=torch.float64)
        scale = values[values.isfinite()].abs().mean().nan_to_num(0) if values.numel() else 1
        values = values + 0.3 * scale * noise * (torch.rand(values.shape, generator=generator) > 0.25)
    with torch.inference_mode(inference):
        made = laid_out(values.to(kind), layout)
        made = made.clone(memory_format=torch.preserve_format) if inference else made
    return made.detach().requires_grad_() if grad else made


@dataclasses.dataclass(frozen=True)
class T:
    """A tensor to draw, see :func:`tensor`."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    fill: str | float = "normal"
    seed: int = 0
    near: int | None = None
    low: int | None = None
    high: int | None = None
    layout: str = "dense"
    grad: bool = False
    inference: bool = False

    def code(self) -> str:
        given = [f"{self.shape}, {self.dtype!r}, {self.fill!r}, {self.seed}"]
        more = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[4:]}
        given += [f"{k}={v!r}" for k, v in more.items() if v is not None and v is not False and v != "dense"]
        return f"tensor({', '.join(given)})"

    def make(self) -> Tensor:
        return tensor(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})  # type: ignore[arg-type]

    def plain(self) -> Tensor:
        t = dataclasses.replace(self, grad=False, inference=False).make()
        t = t.to(torch.float64) if t.is_floating_point() else t
        return t.detach().requires_grad_() if self.grad else t


class Rest(Sequence):
    """A sequence that is neither a list nor a tuple, as OmegaConf's ListConfig is."""

    def __init__(self, items: Sequence) -> None:
        self.items = list(items)

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return f"Rest({self.items!r})"


NUMBERS = ("np.float32", "np.float64", "np.array")
SEQUENCES = ("tuple", "Rest", "np.array", "torch.tensor")


@dataclasses.dataclass(frozen=True)
class Spelled:
    """A number or a sequence in another type than Python's own: `np.float32(0.5)`, `np.array([1.0, 2.0])`."""

    form: str
    value: Any

    def code(self) -> str:
        return f"{self.form}({code(self.value)})"

    def make(self) -> Any:
        return evaluate(self.code())

    def plain(self) -> Any:
        if isinstance(self.value, (list, tuple)):
            kept = self.make().tolist() if self.form in ("np.array", "torch.tensor") else self.value
            return [plain(v) for v in kept]
        return float(np.float32(self.value)) if self.form == "np.float32" else self.value


@dataclasses.dataclass(frozen=True)
class Made:
    """An object of a public class: `fastloss.NegativeSampling(margin=0.1)`. `dtype` options make no exact reference."""

    name: str
    options: dict[str, Any]

    def code(self) -> str:
        return f"{self.name}({', '.join(f'{k}={code(v)}' for k, v in self.options.items())})"

    def make(self) -> Any:
        return evaluate(self.code())

    def plain(self) -> Any:
        options = {k: plain(v) for k, v in self.options.items() if k != "dtype"}
        return getattr(fastloss, self.name.removeprefix("fastloss."))(**options)


@dataclasses.dataclass(frozen=True)
class Raw:
    """Anything that has no other form: an expression."""

    text: str

    def code(self) -> str:
        return self.text

    def make(self) -> Any:
        return evaluate(self.text)

    def plain(self) -> Any:
        value = self.make()
        if not isinstance(value, Tensor) or value.dtype not in FLOATS:
            return value
        return value.detach().double().requires_grad_(value.requires_grad)


def code(value: Any) -> str:
    if hasattr(value, "code"):
        return value.code()
    if isinstance(value, tuple):
        return f"({', '.join(map(code, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(code, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k!r}: {code(v)}' for k, v in value.items())}}}"
    return repr(value)


def _through(value: Any, leaf: str) -> Any:
    if hasattr(value, leaf):
        return getattr(value, leaf)()
    if isinstance(value, (tuple, list)):
        return type(value)(_through(v, leaf) for v in value)
    return {k: _through(v, leaf) for k, v in value.items()} if isinstance(value, dict) else value


def make(value: Any) -> Any:
    return _through(value, "make")


def plain(value: Any) -> Any:
    return _through(value, "plain")


PRELUDE = (
    "from decimal import Decimal\nfrom fractions import Fraction\nimport numpy as np, torch, fastloss\n"
    "from tests.fuzz.targets import call\nfrom tests.fuzz.values import Rest, tensor"
)


def evaluate(text: str) -> Any:
    from decimal import Decimal
    from fractions import Fraction

    names = {"np": np, "torch": torch, "fastloss": fastloss, "tensor": tensor, "Rest": Rest, "Fraction": Fraction,
             "Decimal": Decimal, "nan": float("nan"), "inf": float("inf")}  # fmt: skip
    return eval(text, names)  # noqa: S307 an expression that the fuzzer itself wrote


def tensors(value: Any) -> list[Any]:
    """The drawn tensors of a tree, or the tensors of a built one, in order."""
    if isinstance(value, (T, Tensor)):
        return [value]
    if isinstance(value, Made):
        return tensors(value.options)
    value = value.value if isinstance(value, Spelled) else value
    found = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, Rest)) else ()
    return [t for v in found for t in tensors(v)]


def replaced(value: Any, change: Any) -> Any:
    """The tree with `change(leaf)` for every drawn tensor."""
    if isinstance(value, T):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(replaced(v, change) for v in value)
    if isinstance(value, Spelled) and isinstance(value.value, (list, tuple)):
        return Spelled(value.form, replaced(value.value, change))
    return {k: replaced(v, change) for k, v in value.items()} if isinstance(value, dict) else value
