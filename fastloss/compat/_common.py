"""What the drop-ins share: which calls go to the library itself, and the dtype of what they return."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Fn = TypeVar("Fn", bound=Callable[..., Any])

_said: set[tuple[str, str]] = set()
_depth = 0  # of calls that were handed on: what those call in turn is the library's own too


class NotServed(Exception):
    """Raised within a drop-in where fastloss has no loss for a call; the message says why."""


def library(module: str) -> Any:
    """The module, or None where the library that it belongs to is not installed."""
    name = module.split(".")[0]
    return None if importlib.util.find_spec(name) is None else importlib.import_module(module)


def required(module: str) -> Any:
    """The module, of a library whose drop-ins need parts of it."""
    found = library(module)
    if found is None:
        name = module.split(".")[0]
        raise ModuleNotFoundError(f"fastloss.compat.{name} needs {name} itself, which is not installed", name=name)
    return found


def hands_on(name: str, theirs: Callable[..., Any] | None) -> Callable[[Fn], Fn]:
    """Decorator of the drop-in for `name`: a call that fastloss does not serve goes to `theirs`, with one warning.

    Those are the calls that raise NotServed, and those that a loss refuses with a TypeError or ValueError: a wrong
    argument so meets the library's own error. Where the library is not installed (None) the reason is raised. Sparse
    tensors are the library's as well; where it fails at them, as most do, the error says that they are sparse.
    """

    def decorate(ours: Fn) -> Fn:
        @functools.wraps(ours)
        def drop_in(*args: Any, **options: Any) -> Any:
            global _depth
            if _depth and theirs is not None:
                return theirs(*args, **options)
            if theirs is not None and any(map(_is_sparse, (*args, *options.values()))):
                return _of_sparse(name, theirs, args, options)
            try:
                return ours(*args, **options)
            except (NotServed, TypeError, ValueError) as error:
                if theirs is None and not isinstance(error, NotServed):
                    raise
                why = str(error)
            if theirs is None:
                raise NotImplementedError(f"{name}: {why}; the library computes that, and is not installed")
            _depth += 1
            try:
                result = theirs(*args, **options)  # outside the handler: its error is not one of ours
            finally:
                _depth -= 1
            _say_once(name, why)
            return result

        return drop_in  # type: ignore[return-value]

    return decorate


def _is_sparse(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout != torch.strided


def _of_sparse(name: str, theirs: Callable[..., Any], args: tuple, options: dict[str, Any]) -> Any:
    try:
        return theirs(*args, **options)
    except RuntimeError as error:
        layouts = sorted({str(value.layout) for value in (*args, *options.values()) if _is_sparse(value)})
        raise RuntimeError(f"{name}: expected dense tensors, got {', '.join(layouts)}") from error


def _say_once(name: str, why: str) -> None:
    """A warning for each kind of reason: what stands before its first colon, the argument in an error of a loss."""
    if torch.compiler.is_compiling():
        return
    key = name, why.split(":")[0]
    if key not in _said:
        _said.add(key)
        warnings.warn(f"{name} is computed by the library itself, not by fastloss: {why}", stacklevel=3)


def check_plain(*tensors: Any) -> None:
    """Raises NotServed unless all are floating-point tensors."""
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise NotServed(f"expected floating-point tensors, got {kind}")


def check_not_overridden(module: object, base: type, *methods: str) -> None:
    """Raises NotServed where a subclass has its own form of a method that a drop-in would not call."""
    for name in methods:
        if getattr(type(module), name) is not getattr(base, name):
            raise NotServed(f"{type(module).__name__} has its own {name}")


def as_theirs(value: Any, *inputs: Tensor) -> Any:
    """`value` in the dtype that the inputs promote to, which a loss of eager operators has; under autocast float32."""
    dtype = inputs[0].dtype
    for tensor in inputs[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    if dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled(value.device.type):
        dtype = torch.float32
    return value.to(dtype)
