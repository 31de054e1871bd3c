"""Which GPUs the kernels serve, without one: torch's properties of a device are made up, tensors on it are fake."""

from __future__ import annotations

import types
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastloss
from fastloss import core
from fastloss.core import backends, gpus
from tests import ROOT

pytestmark = pytest.mark.skipif(core.is_interpreting(), reason="the interpreter asks for no device")
KIB = 1024


def nvidia(major: int, minor: int, shared_kib: int = 227, name: str = "made up"):
    return types.SimpleNamespace(
        major=major, minor=minor, name=name, gcnArchName=name, shared_memory_per_block_optin=shared_kib * KIB,
        total_memory=80 * 2**30,
    )  # fmt: skip


def amd(architecture: str):
    return types.SimpleNamespace(major=9, minor=4, name="made up", gcnArchName=architecture, total_memory=2**30)


SERVED = [nvidia(8, 0, 163), nvidia(8, 6, 99), nvidia(8, 7, 163), nvidia(9, 0), nvidia(12, 0, 99), amd("gfx942:xnack-")]
NOT_SERVED = [
    (nvidia(7, 5, 64), "sm_75", "the kernels need compute capability 8.0, this GPU has 7.5"),
    (nvidia(9, 0, 48), "sm_90", "the kernels need 99 KiB of shared memory a block, this GPU has 48"),
    (amd("gfx90a:sramecc+:xnack-"), "gfx90a", "of AMD's GPUs the kernels serve gfx942, not gfx90a"),
]


@pytest.fixture
def machine(monkeypatch):
    """A machine with Triton and these GPUs; returns how often torch was asked for each one's properties."""

    def with_gpus(*devices):
        asked = [0] * len(devices)

        def properties(index):
            asked[index] += 1
            return devices[index]

        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        monkeypatch.setitem(backends.state.missing, "triton", None)
        monkeypatch.setattr(backends.state, "gpus", {})
        monkeypatch.setattr(backends.state, "said", set())
        return asked

    return with_gpus


def pixel(index: int = 0):
    """pixel_loss on a GPU: the op that computes it, and what was said."""
    with FakeTensorMode(), warnings.catch_warnings(record=True) as caught, core.use_backend(backends.state.forced):
        warnings.simplefilter("always")
        image, pred = torch.zeros(4, device=f"cuda:{index}"), torch.ones(4, device=f"cuda:{index}", requires_grad=True)
        found = core.explain(fastloss.pixel_loss, image, pred)
        out = fastloss.pixel_loss(image, pred)
        assert out.device == pred.device and "pixel" not in str(out.grad_fn.next_functions)  # of PyTorch operators
    return found[0], [str(w.message) for w in caught if "fastloss" in str(w.message)]


@pytest.mark.parametrize("properties", SERVED, ids=gpus.name_of)
def test_a_gpu_that_is_served(machine, properties):
    asked = machine(properties)
    device = torch.device("cuda:0")
    for _ in range(3):
        assert backends.fitting(device) == ("triton",) and backends.why_not("triton", device, True, "pixel") is None
    assert asked == [1]


@pytest.mark.parametrize(("properties", "kind", "why"), NOT_SERVED, ids=[kind for _, kind, _ in NOT_SERVED])
def test_a_gpu_that_is_not_served_takes_the_reference_with_one_warning(machine, properties, kind, why):
    asked = machine(properties, properties, nvidia(7, 0, 96))
    with core.use_backend(None):
        choice, said = pixel()
        assert (choice.backend, choice.why) == ("reference", why)
        assert len(said) == 1 and f"on cuda:0, slower and in more memory: {why}. To keep it so" in said[0]
        assert pixel()[1] == [] and pixel(1)[1] == []  # another call, and another GPU of that kind
        assert len(pixel(2)[1]) == 1  # another kind
    assert asked == [1, 1, 1] and backends.state.said == {kind, "sm_70"}


def test_forced_backends_on_a_gpu_that_is_not_served(machine):
    machine(nvidia(7, 5, 64))
    with (
        core.use_backend("triton"),
        pytest.raises(RuntimeError, match="cannot serve pixel: .* this GPU has 7.5"),
    ):
        pixel()
    with core.use_backend("reference"):
        assert pixel()[1] == []


def test_without_triton_one_warning_names_it(machine, monkeypatch):
    asked = machine(nvidia(9, 0))
    monkeypatch.setitem(backends.state.missing, "triton", "triton is not installed; get it")
    with core.use_backend(None):
        choice, said = pixel()
        assert (choice.backend, choice.why) == ("reference", "triton is not installed; get it")
        assert len(said) == 1 and "triton is not installed; get it. To keep it so" in said[0]
        assert pixel()[1] == []
    assert asked == [0]


def test_a_compiled_call_takes_the_reference(machine):
    machine(nvidia(7, 5, 64))
    torch._dynamo.reset()
    chosen = torch.compile(lambda: backends.fitting(torch.device("cuda:0")), fullgraph=True, backend="eager")
    assert chosen() == () and backends.fitting(torch.device("cuda:0")) == ()


def test_info_says_what_is_known_of_each_gpu(machine, monkeypatch):
    from fastloss.cli import info_lines

    devices = [nvidia(9, 0), nvidia(8, 9, 99), nvidia(8, 7, 163), nvidia(7, 5, 64), amd("gfx1100")]
    machine(*devices)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    said = [line.split(" GiB, ")[1] for line in info_lines() if line.startswith("cuda:")]
    assert said == [
        "sm_90, measured (on an H200)", "sm_89, compiled only", "sm_87, not tried: the kernels of the kind below",
        "sm_75, not supported: the kernels need compute capability 8.0, this GPU has 7.5",
        "gfx1100, not supported: of AMD's GPUs the kernels serve gfx942, not gfx1100",
    ]  # fmt: skip


def test_the_table_is_what_is_compiled_and_what_the_documents_say():
    pytest.importorskip("triton")
    from tests.triton import fake_driver

    assert set(gpus.KINDS) == set(fake_driver.TARGETS)
    nvidia_limits = [limit for name, limit in fake_driver.SHARED_LIMIT.items() if name.startswith("sm_")]
    assert min(nvidia_limits) == gpus.SHARED_BYTES
    assert {kind.state for kind in gpus.KINDS.values()} == {gpus.MEASURED, gpus.COMPILED}
    if (ROOT / "docs" / "install.md").is_file():
        assert gpus.table() in (ROOT / "docs" / "install.md").read_text()
        _, compiled = (ROOT / "README.md").read_text().split("**Compiled only**")
        assert all(name in compiled for name, kind in gpus.KINDS.items() if kind.state == gpus.COMPILED)
