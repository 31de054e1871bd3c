"""Triton's real JIT and its real launcher on CPU tensors, over a libcuda that does nothing (stub_libcuda.c).

    LD_LIBRARY_PATH=FOLDER TRITON_LIBCUDA_PATH=FOLDER python ...     where build(FOLDER) has put the library

`install()` goes before any other import of fastloss or Triton. What kernels would compute is anything; what is
launched, and what that costs the host, is as on a device.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pathlib
import shutil
import subprocess
from typing import Any

current = {"stream": 0}  # what torch's current stream is taken to be
SOURCE = pathlib.Path(__file__).with_name("stub_libcuda.c")


def compiler() -> str | None:
    return shutil.which(os.environ.get("CC", "cc"))


def build(folder: pathlib.Path, triton: pathlib.Path | None = None) -> dict[str, str]:
    """Compile the library; the environment of a process that uses it. `triton`: the package whose cuda.h is taken."""
    found = importlib.util.find_spec("triton")
    package = triton or pathlib.Path(found.origin).parent  # type: ignore[union-attr, arg-type]
    command = [compiler(), "-shared", "-fPIC", "-O1", "-I", package / "backends/nvidia/include", SOURCE]
    subprocess.run([*map(str, command), "-o", str(folder / "libcuda.so.1")], check=True)
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {"LD_LIBRARY_PATH": os.pathsep.join(paths), "TRITON_LIBCUDA_PATH": str(folder)}


def install() -> ctypes.CDLL:
    """The library, with Triton's driver on it and the ops of fastloss sending CPU tensors to their kernels."""
    import torch

    library = ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    os.environ["TRITON_INTERPRET"] = "1"  # for fastloss: it registers the kernels for CPU tensors too
    import fastloss  # noqa: F401

    del os.environ["TRITON_INTERPRET"]
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.current_device = lambda: 0
    torch._C._cuda_getCurrentRawStream = lambda device: current["stream"]
    stub: Any = CudaDriver()
    stub.get_current_device = lambda: 0
    stub.get_current_stream = lambda device: current["stream"]
    stub.get_device_capability = lambda device=0: (9, 0)
    driver.set_active(stub)

    from fastloss.core.kernels import tile_table

    tile_table.target_of = lambda device: "sm_90"
    return library


def launches(library: ctypes.CDLL) -> int:
    return ctypes.c_long.in_dll(library, "stub_launches").value
