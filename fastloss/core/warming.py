"""Compiling what a loss needs before training: :func:`warmup`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import backends

PASSES = 2  # the first compiles; the second records the launch plans (core/plans.py)
_NOTHING = (
    "warmup: expected an example with a tensor that requires a gradient, as it does in training, or a module with such "
    "parameters, got none; under torch.no_grad() the forward alone is run"
)


class WarmupReport(NamedTuple):
    """What :func:`warmup` has done."""

    kernels: int  # Triton kernels loaded for the first time: compiled, or found in Triton's cache on disk
    seconds: float


def warmup(loss: Callable[..., Any], *example: Any, **options: Any) -> WarmupReport:
    """Compile before training what ``loss(*example, **options)`` and its backward need.

    The first step of a loss on a GPU compiles its kernels, some seconds each, and a compiled loss its graph. This does
    it at a time of your choice. Kernels are compiled per dtype, layout and options, not per image size or batch; they
    stay in Triton's cache on disk. On the CPU there is nothing to compile, and it costs two steps of the loss.

    The loss runs forward and backward on the example as it runs in training, on its shapes, dtypes and device, under
    the autocast, the grad mode and the backend that hold where it is called. It leaves as they were: `.grad` of tensors
    and parameters (none is accumulated), the random state of torch on the CPU and on the example's devices, and buffers
    and parameters of a module. Hooks on tensors and modules do run. With a process group every rank calls it.

    Args:
        loss: a loss function, a module, or either as ``torch.compile`` returns it.
        example, options: what a step calls it with. The values do not matter. A tensor, also in a list or a
            dictionary, that will need a gradient has ``requires_grad=True``; an output of the network, graph and all,
            will do and its graph stays.

    Returns:
        A named tuple of `kernels`, how many Triton kernels were loaded for the first time, and `seconds`.

    Raises:
        ValueError: nothing needs a gradient. (Under ``torch.no_grad()`` the forward alone is run.)
        What the call itself raises.

    Example:
        >>> pred = torch.zeros(2, 3, 8, 8, requires_grad=True)
        >>> warmup(pixel_loss, torch.zeros(2, 3, 8, 8), pred).kernels, pred.grad
        (0, None)
    """
    start = time.perf_counter()
    tensors: list[Tensor] = []
    args, keywords = _cut_off(example, tensors), _cut_off(options, tensors)
    indices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    with torch.random.fork_rng(indices), _as_it_was(loss), _loads(tensors) as loaded:
        for upstream in (torch.ones_like, _one_for_all):
            for _ in range(PASSES):
                out = _differentiable(loss(*args, **keywords))
                if out is not None:
                    torch.autograd.grad(out, _leaves(out), upstream(out), allow_unused=True)
                elif torch.is_grad_enabled():
                    raise ValueError(_NOTHING)
            if out is None or out.ndim == 0:  # one number has one sort of gradient; a map's has two
                break
    for index in indices:
        torch.cuda.synchronize(index)
    return WarmupReport(len(loaded), time.perf_counter() - start)


def _cut_off(value: Any, tensors: list[Tensor]) -> Any:
    """The value, its tensors cut off from their graphs; these are added to `tensors`."""
    if isinstance(value, Tensor):
        cut = value.detach()
        tensors.append(cut.requires_grad_() if value.requires_grad else cut)
        return tensors[-1]
    if isinstance(value, dict):
        return {key: _cut_off(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_cut_off(item, tensors) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _differentiable(out: Any) -> Tensor | None:
    """The first tensor of a result that has a gradient: the total, of losses that return their parts too."""
    if isinstance(out, Tensor):
        return out if out.requires_grad else None
    items = out.values() if isinstance(out, Mapping) else out if isinstance(out, (list, tuple)) else ()
    return next((found for item in items if (found := _differentiable(item)) is not None), None)


def _leaves(out: Tensor) -> list[Tensor]:
    """Whatever `out.backward()` would give a gradient: a learned scale in a closure too."""
    nodes: list[Any] = [out.grad_fn]
    seen, found = set(nodes), []
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            found.append(node.variable)
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        nodes += new
    return found


def _one_for_all(out: Tensor) -> Tensor:
    """The gradient that `out.sum()` has: one element in the place of all."""
    return out.new_ones(()).expand_as(out)


@contextlib.contextmanager
def _as_it_was(loss: Callable[..., Any]) -> Iterator[None]:
    """Give the buffers of a module back what they had, running statistics above all."""
    owner = loss if isinstance(loss, nn.Module) else getattr(loss, "__self__", None)
    modules = owner.modules() if isinstance(owner, nn.Module) else ()
    kept = [(m, name, b, b.clone()) for m in modules for name, b in m._buffers.items() if b is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, before in kept:
                module._buffers[name] = buffer
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


@contextlib.contextmanager
def _loads(tensors: list[Tensor]) -> Iterator[list[str]]:
    """A list to which every Triton kernel is added that is loaded for the first time meanwhile."""
    found: list[str] = []
    devices = {t.device for t in tensors}
    if backends.state.missing["triton"] is not None or not any("triton" in backends.fitting(d) for d in devices):
        yield found
        return
    import triton

    def note(module: Any, function: Any, name: str, *rest: Any) -> None:
        found.append(name)

    hook = triton.knobs.runtime.kernel_load_end_hook
    hook.add(note)
    try:
        yield found
    finally:
        hook.remove(note)
