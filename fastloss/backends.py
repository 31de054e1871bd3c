"""Which backends there are, and which one is forced."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import warnings
from collections.abc import Iterator

import torch

BACKENDS = ("reference", "cpp", "triton", "cuda")
_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # Triton too reads it once, at import


def is_interpreting() -> bool:
    return _INTERPRETING


def _load_extension() -> str | None:
    """Load the compiled CPU kernels; None when they are there, else the reason why not."""
    if is_interpreting():
        return "not loaded while TRITON_INTERPRET=1: the Triton interpreter serves CPU tensors instead"
    given = os.environ.get("FASTLOSS_EXTENSION")  # another build of it, e.g. the one that `make sanitize` makes
    found = [pathlib.Path(given)] if given else sorted(pathlib.Path(__file__).parent.glob("_C*.so"))
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
            "cuda": "no op is faster in CUDA C++ than in Triton yet, so none is shipped",
        }
        self.forced: str | None = None
        self.said_cpp_is_missing = False

    def force(self, name: str | None) -> None:
        if name is not None and name not in BACKENDS:
            raise ValueError(f"backend: expected one of {BACKENDS}, got {name!r}")
        self.forced = name


state = State()


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force a backend inside a `with` block, as `FASTLOSS_BACKEND` does for a process; None lifts the force."""
    before = state.forced
    state.force(name)
    try:
        yield
    finally:
        state.forced = before


def is_forced() -> bool:
    """Somebody asked for a backend by name: no shortcut past the ops is taken then."""
    return state.forced is not None


def backend_report() -> dict[str, str]:
    """Each backend and "available", or the reason why it is not."""
    return {name: why or "available" for name, why in state.missing.items()}


def why_not(name: str, device: str, has_kernel: bool, op: str) -> str | None:
    """Why a backend cannot serve an op's call on a device; None when it can."""
    why = state.missing[name]
    if why is None and name not in fitting(device):
        why = f"it does not run on {device} tensors"
    if why is None and not has_kernel:
        why = f"it has no kernel for {op} yet"
    return why


def fitting(device: str) -> tuple[str, ...]:
    """The backends with kernels for tensors of a device."""
    if device == "cpu":
        return ("triton",) if _INTERPRETING else ("cpp",)
    return ("triton",) if device == "cuda" else ()


def say_cpp_is_missing(device: str) -> None:
    """Warn, once in a process, at a call on the CPU that the C++ kernels would have served."""
    if torch.compiler.is_compiling() or device != "cpu" or _INTERPRETING or state.said_cpp_is_missing:
        return  # a traced call cannot warn without breaking the graph
    state.said_cpp_is_missing = True
    warnings.warn(
        f"fastloss runs on PyTorch operators on the CPU, slower and in more memory: {state.missing['cpp']}. To keep it "
        "so without this warning: FASTLOSS_BACKEND=reference, or fastloss.core.use_backend('reference')",
        stacklevel=4,
    )


state.force(os.environ.get("FASTLOSS_BACKEND") or None)
