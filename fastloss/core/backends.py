"""Which backends there are, and which one is forced."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import warnings
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from . import gpus

BACKENDS = ("reference", "cpp", "triton", "cuda")
_UNSET = "unset"
_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # Triton too reads it once, at import


def is_interpreting() -> bool:
    return _INTERPRETING


def _load_extension() -> str | None:
    """Load the compiled CPU kernels; None when they are there, else the reason why not."""
    if is_interpreting():
        return "not loaded while TRITON_INTERPRET=1: the Triton interpreter serves CPU tensors instead"
    given = os.environ.get("FASTLOSS_EXTENSION")  # another build of it, e.g. the one that `make sanitize` makes
    found = [pathlib.Path(given)] if given else sorted(pathlib.Path(__file__).parents[1].glob("_C*.so"))
    if not found:
        return (
            "the C++ kernels are not in this installation (they are left out where there is no C++ compiler); install "
            "one, e.g. g++, and run `pip install --no-build-isolation --force-reinstall --no-deps .` in the sources"
        )
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{found[0]} does not load: {error}"
    return None


def _load_cuda_library() -> str:
    """Load the library of kernels in CUDA C++ where there is one; what `fastloss info` says of it."""
    served = "no loss has a kernel in CUDA C++ yet, the GPU is served by the backend triton"
    found = sorted(pathlib.Path(__file__).parents[1].glob("_cuda*.so"))
    if is_interpreting() or torch.version.cuda is None or not found:
        return f"{served} (the library is not built: `make cuda`)"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{served} ({found[0]} does not load: {error})"
    return f"{served} (the library is loaded, for sm_90a)"


def _why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install triton` (it comes with torch's CUDA build on Linux)"
    if not (is_interpreting() or torch.cuda.is_available()):
        return "no CUDA or ROCm device is visible to torch"
    return None


class State:
    """Why a backend is missing (None: it is there), and the forced one."""

    def __init__(self) -> None:
        self.missing: dict[str, str | None] = {
            "reference": None,
            "cpp": _load_extension(),
            "triton": _why_no_triton(),
            "cuda": _load_cuda_library(),
        }
        self.traced: str | None = _UNSET  # what a use_backend inside a compiled function forces
        self.latest: str | None = None  # of any thread, for a torch.compile that cannot read context variables
        self.gpus: dict[int, gpus.Unsupported | None] = {}  # by index: see `unsupported`
        self.said: set[str] = set()  # kinds of devices whose missing kernels a warning has named

    @property
    def forced(self) -> str | None:
        """The backend forced in this thread and task."""
        if torch.compiler.is_compiling():
            if self.traced != _UNSET:
                return self.traced
            if not _TRACES_CONTEXT:
                return self.latest
        return _forced.get()


def _checked(name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {name!r}")
    return name


_TRACES_CONTEXT = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 14)  # torch.compile reads ContextVars
_environment = _checked(os.environ.get("FASTLOSS_BACKEND") or None)
_forced: ContextVar[str | None] = ContextVar("fastloss_backend", default=_environment)
state = State()
state.latest = _environment


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force a backend inside a `with` block, as `FASTLOSS_BACKEND` does for a process; None lifts the force.

    A call that the backend cannot serve raises RuntimeError with the reason, the one that :func:`explain` gives. Only
    float64 and torch.func transforms, which have no kernels anywhere, stay with PyTorch operators.

    It holds for the thread and the asyncio task that enter the block, and for tasks started inside it. Other threads,
    those started inside it too, keep what the environment says; they enter blocks of their own.

    The forward chooses, and its backward follows wherever it runs: a gradient of a kernel's forward comes from the
    kernels, one of the reference's from autograd. Double backward is the reference's in any case. A checkpoint runs
    its forward again during the backward, in autograd's own thread on a GPU: pass it
    ``context_fn=lambda: (nullcontext(), use_backend(name))``.

    Under ``torch.compile`` the choice is part of the graph. Outside the compiled function, another backend means
    another graph (before torch 2.14 those of all threads follow the block entered last); inside it the block works too.
    """
    if torch.compiler.is_compiling():
        inner, state.traced = state.traced, _checked(name)
        try:
            yield
        finally:
            state.traced = inner
        return
    before, latest = _forced.get(), state.latest
    _forced.set(_checked(name))  # and set back, not reset by its token: a generator may end in another context
    state.latest = name
    try:
        yield
    finally:
        _forced.set(before)
        state.latest = latest


def forced_here() -> str | None:
    """The backend forced in this thread and task, outside torch.compile: every call of a planned loss passes here."""
    return _forced.get()


def is_forced() -> bool:
    """Somebody asked for a backend by name: no shortcut past the ops is taken then."""
    return state.forced is not None


def backend_report() -> dict[str, str]:
    """Each backend and "available", or the reason why it is not."""
    return {name: why or "available" for name, why in state.missing.items()}


def why_not(name: str, device: torch.device, has_kernel: bool, op: str) -> str | None:
    """Why a backend cannot serve an op's call on a device; None when it can."""
    why = state.missing[name]
    if why is None and name not in fitting(device):
        found = unsupported(device) if name == "triton" else None
        why = found.why if found else f"it does not run on {device.type} tensors"
    if why is None and not has_kernel:
        why = f"it has no kernel for {op} yet"
    return why


def fitting(device: torch.device) -> tuple[str, ...]:
    """The backends with kernels for tensors of a device."""
    if device.type == "cpu":
        return ("triton",) if _INTERPRETING else ("cpp",)
    if device.type != "cuda":
        return ()
    known = state.gpus.get(device.index, _UNSET) is None  # and good: every call of a loss passes here
    return ("triton",) if known or unsupported(device) is None else ()


def unsupported(device: torch.device) -> gpus.Unsupported | None:
    """Why the Triton kernels do not run on a GPU, which is asked once; None where they do, and for other devices."""
    if device.type != "cuda" or _INTERPRETING or state.missing["triton"] is not None:
        return None
    index = device.index
    if index not in state.gpus:
        state.gpus[index] = gpus.unsupported(index)
    return state.gpus[index]


def say_kernels_are_missing(device: torch.device) -> None:
    """Warn, once in a process for each kind of device, at a call that kernels would have served."""
    if torch.compiler.is_compiling() or _INTERPRETING:
        return  # a traced call cannot warn without breaking the graph
    kind, where, why = device.type, "the CPU", state.missing["cpp"]
    if device.type == "cuda":
        found = unsupported(device)
        where, why = str(device), found.why if found else state.missing["triton"]
        kind = found.kind if found else kind
    elif device.type != "cpu":
        return
    if why is None or kind in state.said:  # None: the op has no kernel
        return
    state.said.add(kind)
    warnings.warn(
        f"fastloss runs on PyTorch operators on {where}, slower and in more memory: {why}. To keep it so without this "
        "warning: FASTLOSS_BACKEND=reference, or fastloss.use_backend('reference')",
        stacklevel=4,
    )
