"""Argument checks shared by the losses: each error names the argument, what came and what was wanted."""

from __future__ import annotations

import math
import numbers
import operator
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .traced import at_most

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST = sys.float_info.max
FLOAT32_MAX, FLOAT32_TINY = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny


def check_tensor(name: str, value: Any, ndim: int | tuple[int, ...] | None = None) -> None:
    """A dense floating-point tensor, of rank `ndim` where one is given."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_nested:
        check_dense(name, value)  # raises; asked here too, as each call of a function takes its time
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{name}: expected a float16, bfloat16, float32 or float64 tensor, got {value.dtype}; "
            f"convert it first, e.g. {name}.float() (and divide uint8 images by 255)"
        )
    ranks = (ndim,) if isinstance(ndim, int) else ndim
    if ranks is not None and value.ndim not in ranks:
        wanted = " or ".join(f"{r}-D" for r in ranks)
        raise ValueError(f"{name}: expected a {wanted} tensor, got shape {tuple(value.shape)}")


def check_dense(name: str, value: Any) -> None:
    """A tensor whose elements lie in memory by strides: not sparse, nested or in a library's own layout."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        layout = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {layout}; convert it first, e.g. {name}.to_dense()")


def check_same_shape(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{name_b}: expected the shape of {name_a}, {tuple(a.shape)}, got {tuple(b.shape)}")
    check_same_device(name_a, a, name_b, b)


def check_same_device(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.device != b.device:
        raise ValueError(f"{name_b}: expected it on the device of {name_a}, {a.device}, got {b.device}")


def check_choice(name: str, value: Any, choices: Collection[Any]) -> Any:
    """The one of the `choices`, strings and numbers, that `value` is. True is not 1."""
    plain = value if isinstance(value, str) else _real(value)
    if plain is None:
        raise TypeError(f"{name}: expected one of {tuple(choices)}, got {_shown(value)}")
    for choice in choices:
        if choice == plain:
            return choice
    raise ValueError(f"{name}: expected one of {tuple(choices)}, got {_brief(value)}")


def check_flag(name: str, value: Any) -> bool:
    """True or False, numpy's included."""
    if isinstance(value, bool):
        return value
    plain = as_plain(value)
    if not isinstance(plain, bool):
        raise TypeError(f"{name}: expected True or False, got {_shown(value)}")
    return plain


def check_number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    float32: bool = True,
) -> float:
    """The float of a finite real number in [low, high], or (low, high] with `open_low`. NaN never passes.

    Python's numbers, numpy's and 0-d arrays will do; a tensor, which might need a gradient or lie on a device, will
    not. With `float32` what that cannot hold is refused, since most losses are computed in it. To a compiled function
    numpy's float32 is a tensor whose value cannot be checked: pass it float(x), or give it to a module.
    """
    number = value if type(value) is float or type(value) is int else _real(value)
    if number is None:
        hint = f"; pass {name}.item()" if isinstance(value, Tensor) and value.numel() == 1 else ""
        raise TypeError(f"{name}: expected a number, got {_shown(value)}{hint}")
    inside = low < number <= high if open_low else low <= number <= high
    if not (inside and -LARGEST <= number <= LARGEST):  # not isfinite(), which torch.compile cannot trace
        bounds = f"{'>' if open_low else '>='} {low:g}" + (f" and <= {high:g}" if high < math.inf else "")
        wanted = "a finite number" + (f" {bounds}" if low > -math.inf else "")
        raise ValueError(f"{name}: expected {wanted}, got {_brief(value)}")
    too_small = open_low and low == 0 and number < FLOAT32_TINY
    if float32 and (too_small or not -FLOAT32_MAX <= number <= FLOAT32_MAX):
        least = FLOAT32_TINY if open_low and low == 0 else -FLOAT32_MAX
        raise ValueError(
            f"{name}: expected a number that float32 holds, {least:.2g} to {FLOAT32_MAX:.2g}, got {_brief(value)}"
        )
    if type(number) is float:
        return number
    return float(number) if type(number) is int else torch.sym_float(number)  # type: ignore[return-value]


def check_integer(name: str, value: Any, low: int, high: int = 2**31 - 1, *, wanted: str = "a whole number") -> int:
    """The int of a whole number in [low, high]; 1.0 is none."""
    number = _real(value)
    if number is None or not isinstance(number, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected {wanted}, got {_shown(value)}")
    if not low <= number <= high:
        raise ValueError(f"{name}: expected {wanted} from {low} to {high}, got {_brief(value)}")
    return number  # type: ignore[return-value]


def check_workspace(value: Any, low: float = 0.0, *, open_low: bool = True) -> float:
    """`workspace_mib`: a number of MiB, of which 2**30 (a pebibyte) bound nothing more: so that bytes fit 64 bits.

    In a compiled graph that it changes in, it is rounded down to a power of two: see :func:`traced.at_most`.
    """
    return at_most(min(check_number("workspace_mib", value, low, open_low=open_low, float32=False), 2.0**30))


def check_sequence(name: str, value: Any, of: str) -> list:
    """The list of any sequence: list, tuple, range, array, nn.ParameterList, a class of one's own; no str, dict or set.

    A tensor is none: it may stand for itself where a list was forgotten. See :func:`check_numbers`.
    """
    if not is_sequence(value):
        raise TypeError(f"{name}: expected a list of {of}, got {_shown(value)}")
    return value.tolist() if hasattr(value, "tolist") else list(value)


def is_sequence(value: Any) -> bool:
    """Whether :func:`check_sequence` takes it."""
    if isinstance(value, (list, tuple)):
        return True
    if isinstance(value, (str, bytes, bytearray, int, float, Tensor)):  # of a symbolic float no attribute is asked
        return False
    if isinstance(value, (Sequence, nn.ParameterList, nn.ModuleList)):
        return True
    return hasattr(value, "tolist") and getattr(value, "ndim", 0) == 1  # numpy's array


def check_numbers(
    name: str, values: Any, low: float = -math.inf, *, open_low: bool = False, of: str = "numbers"
) -> list[float]:
    """The floats of any sequence of real numbers, a tensor [n] included: its values are read, which waits for a device
    and which torch.compile cannot do."""
    if isinstance(values, Tensor):
        check_dense(name, values)
        if values.ndim != 1:
            raise ValueError(f"{name}: expected a list of {of}, got a tensor of shape {tuple(values.shape)}")
        if values.requires_grad:
            raise ValueError(f"{name}: no gradient is provided for it; pass {name}.detach()")
        values = values.tolist()
    values = check_sequence(name, values, of)
    return [check_number(f"{name}[{i}]", value, low, open_low=open_low) for i, value in enumerate(values)]


def check_no_graph(owner: str, name: str, value: Any) -> None:
    """What a module keeps needs no gradient, unless it is a Parameter."""
    if isinstance(value, Tensor):
        if value.requires_grad and not isinstance(value, nn.Parameter):
            raise ValueError(
                f"{owner}: {name} requires a gradient and is no nn.Parameter; a module would hold on to its graph and "
                f"never learn it. Pass nn.Parameter(...) to have it learned, a number or a detached tensor to hold it "
                f"fixed, or give the tensor at each call"
            )
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_no_graph(owner, f"{name}[{key!r}]", item)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            check_no_graph(owner, f"{name}[{i}]", item)


def as_plain(value: Any) -> Any:
    """numpy's scalars and vectors as Python's numbers and lists, anything else as it is."""
    if not isinstance(value, Tensor) and hasattr(value, "tolist") and getattr(value, "ndim", 2) < 2:
        return value.tolist()
    return value


def _real(value: Any) -> Any:
    """An int or a float, maybe a symbolic one, from any real number; None where `value` is none."""
    if type(value) is float or type(value) is int:
        return value
    if isinstance(value, (bool, Tensor, str)):
        return None
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value
    if isinstance(value, numbers.Integral):
        return operator.index(value)
    if isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:  # a fraction
            return math.inf
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # an array
        return _real(value.item())
    return None


def _brief(value: Any) -> str:
    """repr, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python's own limit for the digits of an int
        text = f"an int of {value.bit_length()} bits"
    return text if len(text) <= 100 else f"{text[:60]}... ({len(text)} characters)"


def _shown(value: Any) -> str:
    """Type and value, for the errors about types."""
    return type(value).__name__ if isinstance(value, Tensor) else f"{type(value).__name__} {_brief(value)}"


def check_weight(name: str, weight: Any, name_of: str, of: Tensor) -> None:
    """A map of weights, or a mask (bool), without a gradient that broadcasts to the tensor `of`."""
    if not (isinstance(weight, Tensor) and weight.dtype == torch.bool):
        check_tensor(name, weight)
    check_same_device(name_of, of, name, weight)
    if weight.requires_grad:
        raise ValueError(f"{name}: no gradient is provided for it; pass {name}.detach()")
    try:
        fits = torch.broadcast_shapes(weight.shape, of.shape) == of.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {name_of}, {tuple(of.shape)}, got {tuple(weight.shape)}"
        )


def check_same_length(name_a: str, a: Sequence, name_b: str, b: Sequence) -> None:
    if len(a) != len(b):
        raise ValueError(f"{name_b}: expected as many entries as {name_a}, {len(a)}, got {len(b)}")
