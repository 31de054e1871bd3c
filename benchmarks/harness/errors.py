"""How far each provider's value and gradient are from those of eager PyTorch in float64, of the same inputs.

value_error     |v - v64| / |v64|
gradient_error  |g - g64| / |g64|, Euclidean norms of all gradients that a training loop takes, as one vector
In float16 the gradients are those of LOSS_SCALE times the loss, as loss scaling has them, or small ones underflow.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import measure
from benchmarks.workloads.items import passes
from benchmarks.workloads.providers import absent, providers
from benchmarks.workloads.states import State
from tests.conformance.tools import cast

LOSS_SCALE = {"float16": 4096.0}


def result(state: State, function: Callable, inputs: tuple, scale: float) -> tuple[Tensor, Tensor]:
    """The value, and the gradient of `scale` times it as one vector, both in float64."""
    forward, _, wrt = passes(state.case, function, inputs, state.options)
    value = forward()
    gradients = torch.autograd.grad(value, wrt, torch.full_like(value, scale))
    return value.detach().double(), torch.cat([g.flatten() for g in gradients]).double()


def relative(got: Tensor, exact: Tensor) -> float:
    """The norm of the difference over that of what is exact; NaN or infinite where something got is not finite."""
    return (torch.linalg.vector_norm(got - exact) / torch.linalg.vector_norm(exact)).item()


def blocks(states: Sequence[State]) -> list[list[State]]:
    """States that share loss, options and shape, and so a compiled graph."""
    alike = lambda state: {k: v for k, v in state.columns().items() if k != "inputs"}  # noqa: E731
    return [list(found) for _, found in itertools.groupby(states, alike)]


def key_of(row: dict[str, Any]) -> tuple:
    return tuple(row[name] for name in ("loss", "options", "shape", "inputs", "dtype", "provider"))


def measured(
    block: Sequence[State], dtype: str, device: str, asked: list[str] | None, there: Container[tuple] = ()
) -> Iterator[dict[str, Any]]:
    """The rows of a block that are not there: each state with every provider.

    Who fails has the reason in `note` and no error.
    """
    torch._dynamo.reset()
    kind, scale = getattr(torch, dtype), LOSS_SCALE.get(dtype, 1.0)
    functions = providers(block[0].case, block[0].options, device, asked)
    for state in block:
        rows = [state.columns() | {"dtype": dtype, "provider": name} for name in functions]
        rows = [row for row in rows if key_of(row) not in there]
        if not rows:
            continue
        inputs = cast(state.inputs(device), kind)
        exact = result(state, state.case.eager, cast(inputs, torch.float64), scale)
        if not all(t.isfinite().all() for t in exact):
            yield from (row | {"note": "nothing to compare with: float64 itself is not finite"} for row in rows)
            continue
        for row in rows:
            name, function = row["provider"], functions[row["provider"]]
            if isinstance(function, str):
                yield row | {"note": function}
                continue
            try:
                value, gradient = result(state, function, inputs, scale)
                found = zip(("value_error", "gradient_error"), (value, gradient), exact, strict=True)
                yield row | {column: f"{relative(*pair):.2e}" for column, *pair in found}
            except ImportError as error:
                yield row | {"note": absent(name, error)}
            except Exception as error:  # a library may fail in any way
                yield row | {"note": measure.reason(error)}
