"""Which backend computes a call, and why: :func:`explain`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backends

_choices: ContextVar[list[Choice] | None] = ContextVar("fastloss_choices", default=None)
_lock = threading.Lock()
depth = 0  # explain() calls in progress: every call of a loss looks here first, which must cost next to nothing


@dataclass(frozen=True)
class Choice:
    """What one op of a call is computed by: ``"cpp"``, ``"triton"`` or ``"reference"``, and why."""

    op: str
    backend: str
    why: str

    def __str__(self) -> str:
        return f"{self.op}: {self.backend} ({self.why})"


class Explanation(tuple[Choice, ...]):
    """The choices of a call in the order in which they were made; as text, a line each."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no op of fastloss: PyTorch operators alone"


def note(op: Any, args: tuple, name: str) -> None:
    """Add a choice to those that :func:`explain` collects, if one runs in this thread."""
    if torch.compiler.is_compiling() or (found := _choices.get()) is None:
        return
    choice = Choice(op.name, name, _reason(op, args, name))
    if choice not in found:
        found.append(choice)


def explain(fn: Callable[..., Any], *args: Any, **options: Any) -> Explanation:
    """Which backend computes ``fn(*args, **options)``, op by op, and why. Runs the forward once.

    Args:
        fn: a loss function, or a module; anything that calls some.
        args, options: what it is called with.

    Returns:
        A tuple of choices, each with `op`, `backend` (``"cpp"``, ``"triton"`` or ``"reference"``, PyTorch operators)
        and `why`; printed, a line each. Empty where the call has no op with kernels. A loss may ask several ops in
        turn: one that says "reference" is followed by what computes the call instead, an op with fewer conditions or
        PyTorch operators.

    Raises:
        What the call raises, e.g. RuntimeError for a backend that is forced and missing.

    Example:
        >>> print(explain(pixel_loss, torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)))
        pixel: reference (float64 is computed by PyTorch operators)
    """
    found: list[Choice] = []
    token = _choices.set(found)
    _add_to_depth(1)
    try:
        fn(*args, **options)
    finally:
        _add_to_depth(-1)
        _choices.reset(token)
    return Explanation(found)


def _add_to_depth(count: int) -> None:
    global depth
    with _lock:  # two threads may explain at once
        depth += count


def _reason(op: Any, args: tuple, name: str) -> str:
    own = op.why_reference(*args)
    if own is not None:
        return own
    forced = backends.state.forced
    if forced is not None:
        return "forced by use_backend or FASTLOSS_BACKEND"
    device = next(t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, Tensor)).device
    if name != "reference":
        return f"the fastest there is for {device.type} tensors"
    if (found := backends.unsupported(device)) is not None:
        return found.why
    fitting = backends.fitting(device)
    if not fitting:
        return f"no backend has kernels for {device.type} tensors"
    return "; ".join(str(backends.why_not(one, device, op.kernels[one], op.name)) for one in fitting)
