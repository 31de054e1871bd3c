"""Launches through Triton's C launcher, and the watch over Triton's own ones.

What `kernel[grid](...)` does before it gets there, binding arguments, finding the compiled kernel by their types and
alignment, and hooks, costs ten times the launch itself. The C launcher is private to Triton: it is called for NVIDIA's
devices and the versions in KNOWN, for kernels without scratch memory; all else is launched in the ordinary way.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

if TYPE_CHECKING:
    from .plan_source import Launched, Writer

KNOWN = ("3.6.", "3.8.")
_runtime = triton.knobs.runtime
DESCRIPTORS = 64  # of a tensor argument that are kept, by address


@contextlib.contextmanager
def watched(
    launching: Callable[[], contextlib.AbstractContextManager], launched: Callable[..., None]
) -> Iterator[None]:
    """Run every launch within `launching()`; tell `launched` kernel, compiled kernel or None, grid, arguments."""
    kinds: list[Any] = [JITFunction]
    if "triton.runtime.interpreter" in sys.modules:
        kinds.append(sys.modules["triton.runtime.interpreter"].InterpretedFunction)
    originals = [kind.run for kind in kinds]

    def watch(original: Callable) -> Callable:
        def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            with launching():
                compiled = original(self, *args, grid=grid, warmup=warmup, **kwargs)
            launched(self, compiled, grid, args, kwargs)
            return compiled

        return run

    for kind, original in zip(kinds, originals, strict=True):
        kind.run = watch(original)
    try:
        yield
    finally:
        for kind, original in zip(kinds, originals, strict=True):
            kind.run = original


class _At:
    """Stands for a tensor of which only the address matters."""

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


def _descriptors(nvidia: Any, of: Any, meta: Any) -> Callable[[int], list]:
    """What the C launcher takes for a descriptor at an address. It depends on nothing else, so that it may be kept: it
    is right for other memory at the same address, too."""
    make = functools.partial(nvidia.make_tensordesc_arg, **({"_": ()} if triton.__version__.startswith("3.8.") else {}))

    @functools.lru_cache(maxsize=DESCRIPTORS)
    def at(address: int) -> list:
        here = copy.copy(of)
        here.base = _At(address)
        return make(here, meta)

    return at


def _c_launcher(compiled: Any) -> tuple[Any, Any, Any] | None:
    """(Triton's module, its launcher of a kernel, the C function in that); None where these are not as known."""
    if not triton.__version__.startswith(KNOWN) or compiled is None:
        return None
    launcher = compiled.run
    nvidia = sys.modules.get("triton.backends.nvidia.driver")
    if type(launcher) is not getattr(nvidia, "CudaLauncher", None) or getattr(launcher, "gsan_enabled", False):
        return None
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    launch = launcher.launch
    if inspect.isfunction(launch):  # takes tensor descriptors apart
        launch = inspect.getclosurevars(launch).nonlocals.get("launcher")
    return None if launch is None or inspect.isfunction(launch) else (nvidia, launcher, launch)


def write(writer: Writer, step: Launched) -> bool:
    """Add the line of a launch to those of a plan; False if the C launcher cannot make it."""
    from .plan_source import Descriptor

    if (found := _c_launcher(step.compiled)) is None:
        return False
    nvidia, launcher, launch = found
    compiled = step.compiled
    names = step.jit.signature.parameters
    bound = step.jit.signature.bind(*step.args, **{k: v for k, v in step.kwargs.items() if k in names})
    bound.apply_defaults()
    metas = getattr(compiled.metadata, "tensordesc_meta", None) or []
    args, seen = [], 0
    for value in bound.arguments.values():
        if isinstance(value, Descriptor):
            if seen >= len(metas) or metas[seen] is None:
                return False
            of = copy.copy(value.of)
            of.base = None
            args.append(f"*{writer.constant(_descriptors(nvidia, of, metas[seen]))}({writer.address(value.base)})")
            seen += 1
        else:
            args.append(writer.value(value, addresses=True))
    x, y, z = (*step.grid, 1, 1)[:3]
    kernel, metadata = writer.constant(compiled.function), writer.constant(compiled.packed_metadata)
    writer.constant(compiled)  # which keeps its code on the device
    first = f"{x}, {y}, {z}, stream, {kernel}, {launcher.launch_cooperative_grid}, {launcher.launch_pdl}"
    if hasattr(launcher, "kernel_signature"):  # 3.8: no hooks, no scratch memory, how to read the arguments
        annotations, signature = writer.constant(launcher.arg_annotations), writer.constant(launcher.kernel_signature)
        rest = f"{metadata}, None, None, None, None, None, {annotations}, {signature}, ({', '.join(args)},)"
    else:
        rest = f"None, None, {metadata}, None, None, None, {', '.join(args)}"
    writer.emit(f"{writer.constant(launch)}({first}, {rest})")
    return True


def hooked() -> bool:
    """A profiler wants to be told of Triton's launches, which a plan does not do."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def device_of(args: tuple) -> torch.device | None:
    """The device of the first tensor."""
    flat = (t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]))
    return next((t.device for t in flat if isinstance(t, Tensor)), None)


def on_its_device(replay: Callable[..., Any], args: tuple) -> Callable[..., Any]:
    """`replay`, which launches on the current device, for tensors of theirs."""
    device = device_of(args)
    if device is None or device.type != "cuda" or torch.cuda.device_count() == 1:
        return replay
    current, index = torch._C._cuda_getDevice, device.index

    @functools.wraps(replay)
    def there(*args: Any) -> Any:
        if current() == index:
            return replay(*args)
        with torch.cuda.device(index):
            return replay(*args)

    return there
