"""Launch plans: what a launcher does on the host is decided once for each signature of its arguments.

A launcher of Triton kernels chooses layouts, grids and workspaces from shapes, strides, types, addresses modulo 16
and plain options, never from values. So its second call with a signature is recorded (kernels/recorder.py), and later
ones replay the record: allocations, launches and calls of a library in straight lines, on whatever tensors come. A
launcher that does anything else is called as it is written. `FASTLOSS_PLANS=0` switches plans off.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import is_interpreting

MOST = 256  # signatures of a launcher that are remembered, the latest used
ORDINARY_CALLS = 1  # with a signature, before one is recorded: shapes that never come back cost no more than a look
ENABLED = os.environ.get("FASTLOSS_PLANS") != "0"


_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_PLAIN = frozenset((type(None), bool, int, float, str, torch.dtype))
_dispatch_keys = torch._C._dispatch_keys


class Plan:
    """What is known of a signature: how often it came, and once it is recorded the function that replays it."""

    __slots__ = ("calls", "refused", "replay", "source")

    def __init__(self, key: tuple) -> None:
        self.calls, self.refused = 0, ""
        self.replay: Callable[..., Any] | None = None
        self.source = ""


def signature(args: Sequence[Any]) -> tuple | None:
    """All that a launcher may look at in its arguments; None where there is something that plans do not know.

    Floats and their like count with their type. The dispatch keys tell tensors apart that are more than their memory:
    negated views, zeros without memory.
    """
    found: list[Any] = [torch.are_deterministic_algorithms_enabled()]
    for value in args:
        kind = type(value)
        if kind in _PLAIN:
            found += (kind, value)
            continue
        if kind in _TENSORS:
            value, end = (value,), None
        elif kind is list or kind is tuple:
            end = len(value)
        else:
            return None
        for item in value:
            kind = type(item)
            if kind in _TENSORS:
                found += (
                    item.shape,
                    item.stride(),
                    item.dtype,
                    item.device,
                    item.data_ptr() & 15,
                    _dispatch_keys(item).raw_repr(),
                )
            elif kind in _PLAIN:
                found += (kind, item)
            else:
                return None
        found.append(end)
    return tuple(found)


class Planned:
    """A launcher with its plans: it is called like the launcher, and thereby records."""

    def __init__(self, launcher: Callable[..., Any]) -> None:
        self.launcher = launcher
        self.plan = functools.lru_cache(maxsize=MOST)(Plan)  # by signature; safe with threads

    def replay(self, args: Sequence[Any]) -> Callable[..., Any] | None:
        """The function that does the launcher's work for these arguments, if that is recorded.

        Only plain tensors have it, and no mode of torch is passed by.
        """
        first = args[0]
        if not (first if isinstance(first, Tensor) else first[0]).is_cuda and not is_interpreting():
            return None
        if not ENABLED or _watched() or (key := signature(args)) is None:
            return None
        return self.plan(key).replay

    def __call__(self, *args: Any) -> Any:
        if not ENABLED or _watched() or (key := signature(args)) is None:
            return self.launcher(*args)
        plan = self.plan(key)
        if plan.replay is not None:
            return plan.replay(*args)
        plan.calls += 1
        if plan.refused or plan.calls <= ORDINARY_CALLS:
            return self.launcher(*args)
        from .kernels.recorder import record

        return record(self.launcher, args, plan)


def _watched() -> bool:
    """Somebody looks at the calls of torch: a mode, a transform, autocast or a profiler."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_any_autocast_enabled()
        or torch._C._autograd._profiler_enabled()
    )
