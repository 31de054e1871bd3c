"""The library of kernels in CUDA C++: compiled for sm_90a, loaded, registered; on a device its test op is right.

`make cuda` builds it and runs these tests with FASTLOSS_CUDA=1, which makes an absent library a failure.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
import torch

import fastloss
from fastloss import core
from tests import ROOT

LIBRARY = pathlib.Path(fastloss.__file__).parent / "_cuda.abi3.so"
needs_library = pytest.mark.skipif(
    not LIBRARY.is_file() and os.environ.get("FASTLOSS_CUDA") != "1",
    reason="the library in CUDA C++ is not built: `make cuda`",
)


def registered(key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("fastloss::cuda_probe", key)


@needs_library
def test_importing_fastloss_loads_and_registers_it():
    assert LIBRARY.is_file()
    assert registered("CUDA") and not registered("CPU")
    assert "the library is loaded, for sm_90a" in core.backend_report()["cuda"]


@needs_library
def test_its_kernels_are_machine_code_for_sm_90a():
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        pytest.skip("triton, which brings cuobjdump, is not installed")
    cuobjdump = pathlib.Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
    listed = subprocess.run([cuobjdump, "--list-elf", LIBRARY], capture_output=True, text=True, check=True).stdout
    assert len(listed.split("\n")) == 2 and "sm_90a.cubin" in listed, listed


@pytest.mark.parametrize(
    "home, said", [("/nowhere", "no nvcc: it was looked for in CUDA_HOME (/nowhere)"), ("old", "nvcc is of CUDA 11")]
)
def test_a_build_that_must_have_it_says_what_is_wrong(tmp_path, home, said):
    if torch.version.cuda is None:
        said = "this torch is built without CUDA"
    if home == "old":
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir()
        nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 11.8, V11.8.89\n")
        nvcc.chmod(0o755)
        home = str(tmp_path)
    environment = {**os.environ, "CUDA_HOME": home, "FASTLOSS_CUDA": "only"}
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert f"FASTLOSS_CUDA=only: {said}" in done.stderr


@pytest.mark.gpu
@needs_library
@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 100_003])
def test_the_test_op_on_a_device(count):
    x = torch.randn(count, device="cuda")
    assert torch.equal(torch.ops.fastloss.cuda_probe(x), 2 * x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        out = torch.ops.fastloss.cuda_probe(x)
    stream.synchronize()
    assert torch.equal(out, 2 * x)


@pytest.mark.gpu
@needs_library
def test_the_test_op_refuses_what_it_cannot_read():
    for x in (torch.ones(4, device="cuda", dtype=torch.float16), torch.ones(4, 4, device="cuda").T):
        with pytest.raises(RuntimeError, match="expected a contiguous float32 tensor"):
            torch.ops.fastloss.cuda_probe(x)
