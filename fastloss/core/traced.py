"""Floats in the graphs that torch.compile makes.

A Python float that changes between calls becomes an input of the graph, a 0-d tensor, and all that torch's arithmetic
does with it (`tensor * value`) reads that input. As an attribute of an op, or as a fill value, it is compiled in: one
recompilation per value, and where the same float is in arithmetic too, torch's compile caches can return the graph of
another value. So losses use :func:`number` and :func:`filled`, and ops take such floats as tensors.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor


def changes(value: Any) -> bool:
    """Whether the value is a float that is an input of the graph being compiled."""
    return isinstance(value, float) and symbolic(value)


def symbolic(value: Any) -> bool:
    """Whether the number, such as a size, may be another one at the next call of the graph being compiled."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # imports as slowly as torch itself

    return not has_static_value(value)


def _scalar(value: float) -> Tensor:
    return torch.ones((), dtype=torch.float64, device="cpu") * value


def number(value: float, like: Tensor) -> Any:
    """`value` for a function of torch that takes a number or a tensor, such as `pow`."""
    return _scalar(value).to(like.device, like.dtype) if changes(value) else value


def filled(size: tuple[int, ...], value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.full`."""
    if changes(value):
        return _scalar(value).to(device, dtype).expand(size)
    return torch.full(size, value, dtype=dtype, device=device)


def at_most(bound: float) -> float:
    """A bound as a constant of the graph being compiled: one that changes is rounded down to a power of two."""
    if not changes(bound):
        return bound
    constant = 2.0**-20
    while 2 * constant <= bound:
        constant *= 2
    return constant


def take_out_numbers(args: Sequence[Any], places: Sequence[int]) -> tuple[list[Any], Tensor | None]:
    """The arguments with NaN in place of the floats that change, and these as one tensor; None: there are none.

    `places`: where among the arguments floats and lists of floats are.
    """
    numbers: list[Tensor] = []

    def take_out(value: Any) -> Any:
        if not changes(value):
            return value
        numbers.append(_scalar(value))
        return math.nan

    rest = list(args)
    for i in places:
        rest[i] = [take_out(v) for v in args[i]] if isinstance(args[i], (list, tuple)) else take_out(args[i])
    return rest, torch.stack(numbers) if numbers else None


def with_numbers(args: Sequence[Any], numbers: Sequence[float]) -> list[Any]:
    """The arguments as they were before :func:`take_out_numbers`."""
    rest = iter(numbers)

    def put_back(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [put_back(v) for v in value]
        return next(rest) if isinstance(value, float) and value != value else value

    return [put_back(value) for value in args]


def parameters_of(fake: Callable) -> list[inspect.Parameter]:
    """The parameters of a shape function with their types, which may be written as strings."""
    parameters = inspect.signature(fake).parameters.values()
    if hasattr(fake, "__signature__"):
        return list(parameters)
    hints = get_type_hints(fake)
    return [p.replace(annotation=hints[p.name]) for p in parameters]


def with_parameter(fake: Callable, name: str, kind: Any, shape: Callable, returned: Any = None) -> Callable:
    """`shape`, which takes the typed parameters of `fake` and one more, and returns the same unless told."""
    if returned is None:
        returned = inspect.signature(fake, eval_str=True).return_annotation
    last = inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
    shape.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*parameters_of(fake), last], return_annotation=returned
    )
    return shape
