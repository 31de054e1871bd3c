"""A Triton driver without a device: real launchers run, kernels compile for any target, the launch itself does nothing.

Device i is target i, so that Triton's per-device caches keep the targets apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia import driver as nvidia_driver
from triton.runtime import driver

TARGETS = {f"sm_{number}": GPUTarget("cuda", number, 32) for number in (90, 80, 86, 89, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
SHARED_LIMIT = {  # bytes that a program may have
    "sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024,
    "sm_120": 99 * 1024, "gfx942": 64 * 1024,
}  # fmt: skip


class _Utils:
    def __init__(self, owner: FakeDriver) -> None:
        self.owner = owner

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads: handles that nobody follows

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_LIMIT[self.owner.name],
            "multiprocessor_count": 132,
            "max_num_regs": 65536,
            "warpSize": self.owner.get_current_target().warp_size,
        }

    def unload_module(self, module: int) -> None:
        pass


class _Launcher:
    """Launches nothing, but of what Triton's own launchers do first it does what needs no device: it takes the kernel's
    signature apart, where a tensor descriptor inside a tuple has no place."""

    def __init__(self, source: Any, metadata: Any) -> None:
        if metadata.target.backend != "cuda":
            return
        signature, descriptors = source.signature, getattr(metadata, "tensordesc_meta", None)
        if hasattr(nvidia_driver, "make_launcher"):  # triton 3.6
            nvidia_driver.make_launcher({}, signature, descriptors)
        else:
            nvidia_driver.expand_signature(signature.values(), descriptors, "nvTmaDesc")

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass


class FakeDriver(DriverBase):
    def __init__(self) -> None:
        self.name = "sm_90"
        self.utils = _Utils(self)
        self.launcher_cls = _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.name)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_benchmarker(self) -> Callable[..., list[float]]:
        raise RuntimeError("nothing can be timed without a device: no @autotune in a launcher")


def install() -> FakeDriver:
    """Make a FakeDriver the active one; set its `name` to a key of TARGETS before a launch."""
    fake = FakeDriver()
    driver.set_active(fake)
    return fake
