"""A failing call -> a simpler one that fails in the same way."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

from tests.fuzz.draw import Call
from tests.fuzz.judge import Failure, judge
from tests.fuzz.values import T, replaced, tensors

SECONDS = 2.0


def shrunk(call: Call, failure: Failure, seconds: float = SECONDS) -> Call:
    """Fewer options, smaller shapes, plainer tensors: each step is kept if the failure stays in its group."""
    until = time.monotonic() + seconds
    again = True
    while again:
        again = False
        for simpler in _simpler(call):
            if time.monotonic() > until:
                return call
            found = judge(simpler)
            if isinstance(found, Failure) and found.group == failure.group:
                call, again = simpler, True
                break
    return call


def _simpler(call: Call) -> Iterator[Call]:
    for name in call.options:
        yield _with(call, options={k: v for k, v in call.options.items() if k != name})
    if len(call.args) > 2:
        yield _with(call, args=call.args[:-1])
    for change in ({"autocast": False}, {"form": "function"}, {"threads": 1}, {"upstream": 1.0}, {"backend": None}):
        if any(getattr(call, k) != v for k, v in change.items()):
            yield _with(call, **change)
    if call.mode == "double":
        yield _with(call, mode="backward")
    sizes = sorted({n for t in tensors((call.args, call.options)) for n in t.shape if n > 1}, reverse=True)
    for size in sizes:
        for smaller in dict.fromkeys((1, 2, size // 2, size - 1)):
            if smaller < size:
                yield _mapped(call, lambda t, a=size, b=smaller: _resized(t, a, b))
    for field, plain in (
        ("layout", "dense"),
        ("fill", "normal"),
        ("dtype", "float32"),
        ("grad", False),
        ("inference", False),
    ):
        for one in tensors((call.args, call.options)):
            if (
                getattr(one, field) != plain
                and not (field == "fill" and not isinstance(one.fill, str))
                and not (field == "dtype" and not one.dtype.startswith(("float", "bf")))
            ):
                yield _mapped(
                    call, lambda t, one=one, f=field, p=plain: dataclasses.replace(t, **{f: p}) if t == one else t
                )


def _with(call: Call, **changes: Any) -> Call:
    return dataclasses.replace(call, **changes)


def _resized(t: T, size: int, smaller: int) -> T:
    return dataclasses.replace(t, shape=tuple(smaller if n == size else n for n in t.shape))


def _mapped(call: Call, change: Any) -> Call:
    return _with(call, args=replaced(call.args, change), options=replaced(call.options, change))
