"""A call run in one of three ways: what it gives, its gradients and, in mode "double", those of a product with them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastloss.core import use_backend
from tests.conformance.tools import INTERPRETING
from tests.fuzz import targets
from tests.fuzz.draw import Call
from tests.fuzz.rounding import RandomRounding
from tests.fuzz.values import Rest, make, plain

COARSE_HALF = 61440.0  # of at most 65504, and exact in bfloat16 too


@dataclasses.dataclass
class Outcome:
    """What a run gave: named tensors, or an error."""

    tensors: list[tuple[str, Tensor]] = dataclasses.field(default_factory=list)
    error: Exception | None = None
    unmade: bool = False  # the error is that of an argument's own expression
    changed: bool = False  # wrote into its inputs
    graph: tuple[str, ...] = ()  # the outputs that require a gradient


def run(call: Call, how: str | RandomRounding, change: Callable[[tuple], tuple] | None = None) -> Outcome:
    """`how`: "got", the call itself; "eager", the reference in its dtypes; "exact", in float64; or so, rounded.
    `change`: what to make of the positional arguments first."""
    exact = how not in ("got", "eager")
    try:
        args, options = (plain if exact else make)((call.args, call.options))
        args = args if change is None else change(args)
    except Exception as error:  # noqa: BLE001 of a spoiled argument
        return Outcome(error=error, unmade=True)
    try:
        options = options if exact else targets.given(call.name, call.form, options)
        function = targets.function(call.name, call.form if not exact else "function", exact)
        leaves = [pair for pair in named_leaves((args, options)) if pair[1].requires_grad]
        versions = [(t, t._version) for _, t in named_leaves((args, options)) if not t.is_inference()]
        with _context(call, how):
            autocast = call.autocast and how == "got"
            with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                out = targets.flat(function(*args, **options))
            found = out if call.mode in ("no_grad", "inference") else out + derivatives(call, out, leaves)
        changed = any(t._version != version for t, version in versions)
        return Outcome(found, changed=changed, graph=tuple(name for name, t in out if t.requires_grad))
    except Exception as error:  # noqa: BLE001 whatever comes is what is judged
        if call.backend and how == "got" and "is forced" in str(error) and "cannot serve" in str(error):
            return run(dataclasses.replace(call, backend=None), how, change)  # it declines this call, as documented
        return Outcome(error=error)


@contextlib.contextmanager
def _context(call: Call, how: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        forced = call.backend and ("triton" if INTERPRETING else call.backend)
        stack.enter_context(use_backend(forced if how == "got" else "reference"))
        if call.mode in ("no_grad", "inference"):
            stack.enter_context(torch.no_grad() if call.mode == "no_grad" else torch.inference_mode())
        if isinstance(how, RandomRounding):
            stack.enter_context(how)
        yield


def named_leaves(tree: Any, name: str = "") -> list[tuple[str, Tensor]]:
    """The tensors of a built tree by where they stand."""
    if isinstance(tree, Tensor):
        return [(name, tree)]
    if isinstance(tree, dict):
        return [pair for k, v in tree.items() for pair in named_leaves(v, f"{name}.{k}")]
    if isinstance(tree, (list, tuple, Rest)):
        return [pair for i, v in enumerate(tree) for pair in named_leaves(v, f"{name}[{i}]")]
    return []


def derivatives(call: Call, out: list, leaves: list) -> list[tuple[str, Tensor]]:
    """The gradients of the leaves, and in mode "double" those of a product with them."""
    wanted = [(name, t) for name, t in out if t.requires_grad]
    if not wanted or not leaves:
        return []
    generator = torch.Generator().manual_seed(7)
    upstream = [(call.upstream * _coarse(t, generator)).to(t.dtype) for _, t in wanted]
    if call.name == "tap":  # whose feature may be float16: no infinity, of which only its dtype would have one
        upstream = [u.clamp(-COARSE_HALF, COARSE_HALF) for u in upstream]
    if call.seed[-1:] in "13":  # as from .sum(): one number, stride 0
        upstream = [u.new_full((), call.upstream).expand(u.shape) for u in upstream]
    twice = call.mode == "double"
    inputs = [t for _, t in leaves]
    grads = torch.autograd.grad([t for _, t in wanted], inputs, upstream, create_graph=twice, allow_unused=True)
    named = [
        (f"gradient of {_place(name)}", torch.zeros_like(leaf) if g is None else g)
        for (name, leaf), g in zip(leaves, grads, strict=True)
    ]
    if not twice:
        return named
    total = [
        (g * _coarse(g, generator).to(g.dtype)).sum().to(upstream[0].dtype)
        for g in grads if g is not None and g.requires_grad
    ]  # fmt: skip
    if not total:
        return named + [(f"second {name}", torch.zeros_like(g)) for name, g in named]
    second = torch.autograd.grad(torch.stack(total).sum(), inputs, allow_unused=True)
    return named + [
        (f"second {name}", torch.zeros_like(leaf) if g is None else g)
        for (name, _), (_, leaf), g in zip(named, leaves, second, strict=True)
    ]


def _coarse(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers that every dtype has exactly."""
    return (32 * torch.randn(like.shape, generator=generator, dtype=torch.float64)).round() / 32


def _place(name: str) -> str:
    return name.removeprefix("[0]").removeprefix("[1].")
