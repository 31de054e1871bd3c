"""Tensors made under `torch.inference_mode`, as arguments of a loss.

Autograd saves no inference tensor for a backward. A loss copies those it is given where something else needs a
gradient, so that cached features, banks and targets may come from an inference mode; else they are used as they are.
Under `torch.compile` torch itself refuses them: pass `tensor.clone()`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from .checks import is_sequence

F = TypeVar("F", bound=Callable[..., Any])
_PLAIN = frozenset((type(None), bool, int, float, str))


def takes_inference_tensors(fn: F) -> F:
    """`fn`, which gets copies of inference tensors where it records a graph, those in lists and dictionaries too."""

    @functools.wraps(fn)
    def entry(*args: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            given = (*args, *options.values())
            if _some(given, Tensor.is_inference) and _some(given, _needs_gradient):
                return fn(*map(_copied, args), **_copied(options))
        return fn(*args, **options)

    return entry  # type: ignore[return-value]


def _needs_gradient(tensor: Tensor) -> bool:
    return tensor.requires_grad


def _some(values: Iterable[Any], test: Callable[[Tensor], bool]) -> bool:
    """Whether one of the tensors among the values, or in their lists and dictionaries, passes the test."""
    for value in values:
        if isinstance(value, Tensor):
            if test(value):
                return True
        elif type(value) in _PLAIN:
            continue
        elif _some(value.values(), test) if isinstance(value, Mapping) else is_sequence(value) and _some(value, test):
            return True
    return False


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if is_sequence(value):
        return [_copied(item) for item in value]
    return value
