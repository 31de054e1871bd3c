"""Tensors made under `torch.inference_mode`, as arguments of a loss.

Autograd saves no inference tensor for a backward. A loss copies those it is given where something else needs a
gradient, so that cached features, banks and targets may come from an inference mode; else they are used as they are.
Under `torch.compile` torch itself refuses them: pass `tensor.clone()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from .checks import is_sequence

_PLAIN = frozenset((type(None), bool, int, float, str))


def copies_for_graph(args: tuple, options: dict[str, Any]) -> tuple[list, dict[str, Any]] | None:
    """The arguments with copies of inference tensors, those in lists and dictionaries too; None: it needs no copies."""
    given = (*args, *options.values())
    if _some(given, Tensor.is_inference) and _some(given, _needs_gradient):
        return [_copied(arg) for arg in args], _copied(options)
    return None


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
