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


_INTERPRETING = is_interpreting()
_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_PLAIN = frozenset((type(None), bool, int, float, str, torch.dtype))


class Plan:
    """What is known of a signature: how often it came, and once it is recorded the function that replays it.

    `refused` says why there is none, `autograd` is what core/autograd.py has found out once for all such calls.
    """

    __slots__ = ("autograd", "calls", "refused", "replay", "source")

    def __init__(self, key: tuple) -> None:
        self.calls, self.refused, self.source = 0, "", ""
        self.replay: Callable[..., Any] | None = None
        self.autograd: Any = None


hooked: Callable[[], bool] | None = None  # of Triton's launches: there is none before a plan is recorded
deterministic = torch._C._get_deterministic_algorithms


def signature(args: Sequence[Any]) -> tuple | None:
    """All that a launcher may look at in its arguments; None where there is something that plans do not know.

    Plain options count with their types. A negated view and a zero without memory, which are more than their memory,
    have signatures of their own: the dispatcher makes plain tensors of them before it calls a kernel.
    """
    found: list[Any] = [deterministic()]
    try:
        for value in args:
            kind = type(value)
            if kind in _PLAIN:
                found += (kind, value)
                continue
            if kind in _TENSORS:
                value = (value,)
            elif kind is not list and kind is not tuple:
                return None
            for item in value:
                kind = type(item)
                if kind in _TENSORS:
                    address = item.data_ptr()
                    found += (
                        item.shape, item.stride(), item.dtype, item.device, address & 15 if address else -1,
                        item.is_neg(),
                    )  # fmt: skip
                elif kind in _PLAIN:
                    found += (kind, item)
                else:
                    return None
            found.append(len(value))
    except RuntimeError:  # a tensor without memory or strides, such as a batch of gradients
        return None
    return tuple(found)


def signature_of_tensors(tensors: Sequence[Any]) -> tuple | None:
    """The same of tensors alone."""
    found: list[Any] = [deterministic()]
    try:
        for item in tensors:
            if type(item) not in _TENSORS:
                return None
            address = item.data_ptr()
            found += (
                item.shape, item.stride(), item.dtype, item.device, address & 15 if address else -1, item.is_neg()
            )  # fmt: skip
    except RuntimeError:
        return None
    return tuple(found)


class Planned:
    """A launcher with its plans: it is called like the launcher, and thereby records."""

    def __init__(self, launcher: Callable[..., Any]) -> None:
        self.launcher = launcher
        self.plan = functools.lru_cache(maxsize=MOST)(Plan)  # by signature; safe with threads

    def ready(self, args: Sequence[Any]) -> Plan | None:
        """The plan for these arguments, if it is recorded. Only plain tensors have one, and nobody is passed by who
        looks at the calls of torch."""
        first = args[0]
        if not may_be_planned(first if isinstance(first, Tensor) else first[0]) or (key := signature(args)) is None:
            return None
        plan = self.plan(key)
        return None if plan.replay is None else plan

    def __call__(self, *args: Any) -> Any:
        if not ENABLED or watched() or (key := signature(args)) is None:
            return self.launcher(*args)
        plan = self.plan(key)
        if plan.replay is not None:
            return plan.replay(*args)
        plan.calls += 1
        if plan.refused or plan.calls <= ORDINARY_CALLS:
            return self.launcher(*args)
        from .kernels.recorder import record

        return record(self.launcher, args, plan)


def may_be_planned(first: Any) -> bool:
    """A call with this first argument may have a plan: it is a tensor that Triton's kernels serve, and nobody looks."""
    return isinstance(first, Tensor) and (first.is_cuda or _INTERPRETING) and ENABLED and not watched()


def watched() -> bool:
    """Somebody looks at the calls of torch: a mode, a transform, autocast, a profiler of torch or Triton."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_any_autocast_enabled()
        or torch._C._autograd._profiler_enabled()
        or (hooked is not None and hooked())
    )
