"""Calls of a public function that go straight to the launch plan of its op.

A small loss on a GPU spends a quarter of its host time before its op: arguments are checked, options resolved, a
backend chosen. All of that follows from the signature of the call. So where a call's op has been replayed from a plan,
the next call with the same signature gives the op what it would have been given, without that way.

It is for functions that say so (``planned=True`` in entry.py): their numbers come from options and shapes, never from
values of tensors, and they return what one op returns. Everything else about a call is seen here: a tensor that the
function made itself, or the same tensor twice, and there is no shortcut.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, explanation, plans
from .autograd import picker, transformed


class Replayed(NamedTuple):
    """An op's call under autograd that had a plan."""

    op: Any
    plan: plans.Plan
    args: Sequence[Any]
    out: Tensor


class _Watch(threading.local):
    replayed: list[Replayed] | None = None  # by the public function that runs in this thread, if it is watched


watch = _Watch()


class _Shortcut:
    """From the arguments of a call to those of its op, whose other arguments are known."""

    def __init__(self, call: Replayed, places: Sequence[int], constants: tuple) -> None:
        self.plan, self.function, self.constants = call.plan, call.op._planned_function, constants
        self.arguments = picker(places)  # of (what the call gives, constants)

    def __call__(self, given: tuple) -> Tensor:
        args = self.arguments(given + self.constants)
        return self.function.apply(self.plan, args, *self.plan.autograd.inputs(args))


class PlannedCalls:
    """A public function with the shortcuts of its calls, by their signatures."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.shortcuts: dict[tuple, _Shortcut] = {}

    def __call__(self, *args: Any, **options: Any) -> Any:
        given = (*args, *options.values())
        key = _signature(given, len(args), options)
        if key is None or watch.replayed is not None:
            return self.fn(*args, **options)
        shortcut = self.shortcuts.get(key)
        if shortcut is not None:
            return shortcut(given)
        watch.replayed = []
        try:
            out = self.fn(*args, **options)
            shortcut = _shortcut_of(watch.replayed, given, out)
        finally:
            watch.replayed = None
        if shortcut is not None:
            if len(self.shortcuts) >= plans.MOST:
                self.shortcuts.clear()
            self.shortcuts[key] = shortcut
        return out


def _signature(given: tuple, positional: int, options: dict[str, Any]) -> tuple | None:
    """What a public function may look at; None where the call has no shortcut."""
    first = given[0] if given else None
    if not plans.may_be_planned(first) or not torch.is_grad_enabled() or explanation.depth or transformed():
        return None
    tensors = [value for value in given if isinstance(value, Tensor)]
    if any(map(Tensor.is_inference, tensors)) or (known := plans.signature(given)) is None:
        return None
    return positional, *options, backends.forced_here(), *[t.requires_grad for t in tensors], known


def _shortcut_of(calls: Sequence[Replayed], given: tuple, out: Any) -> _Shortcut | None:
    """The shortcut where one op's call is all there was: its tensors are the caller's, its output is returned."""
    if len(calls) != 1 or calls[0].out is not out:
        return None
    at = {id(value): i for i, value in enumerate(given) if isinstance(value, Tensor)}
    if len(at) < sum(isinstance(value, Tensor) for value in given):
        return None  # which of two equal ones the op took is unknown
    places: list[int] = []
    constants: list[Any] = []
    for value in calls[0].args:
        if not isinstance(value, Tensor):
            places.append(len(given) + len(constants))
            constants.append(value)
        elif id(value) in at:
            places.append(at[id(value)])
        else:
            return None
    return _Shortcut(calls[0], places, tuple(constants))
