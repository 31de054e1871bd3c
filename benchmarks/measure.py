"""Timing, memory and hardware ceilings; knows nothing of losses."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable

import torch

MIB = 2**20


def device_label(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        cpuinfo = open("/proc/cpuinfo", encoding="utf8").read()
        return re.search(r"model name\s*:\s*(.+)", cpuinfo).group(1).strip()  # type: ignore[union-attr]
    except (OSError, AttributeError):
        return platform.processor() or "cpu"


def device_folder(device: str) -> str:
    """The name of the results folder: `cpu`, or the GPU's short name, `h200`."""
    if device != "cuda":
        return device
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower().replace("nvidia", "")).strip("-")


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=10"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def keep_freed_memory() -> None:
    """Start this process again with a malloc that keeps what is freed (CPU, glibc).

    By default it gives blocks of tens of MiB back to the system or not depending on the layout of the heap, and the
    page faults of getting them again (6 ms for 25 MiB) fall on whichever provider comes next.
    """
    wanted = {"MALLOC_MMAP_THRESHOLD_": str(32 * MIB), "MALLOC_TRIM_THRESHOLD_": str(2**40)}
    if sys.platform == "linux" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | wanted)


class Clock:
    """Milliseconds of one call: wall time on the CPU, events around the call (caches flushed) on CUDA."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._flush = torch.empty(256 * MIB, dtype=torch.uint8, device=device) if device == "cuda" else None

    def __call__(self, fn: Callable[[], object]) -> float:
        if self._flush is None:
            start = time.perf_counter_ns()
            fn()
            return (time.perf_counter_ns() - start) / 1e6
        self._flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        fn()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def interleaved(
    calls: dict[str, Callable[[], object]], clock: Clock, seconds: float, rounds: int = 200
) -> dict[str, list[float]]:
    """Times of every call, one after the other in each round, so that a drift of the machine hits all alike."""
    for fn in calls.values():  # warm-up: allocators, compilation
        for _ in range(3):
            fn()
    times: dict[str, list[float]] = {name: [] for name in calls}
    stop = time.monotonic() + seconds
    for done in range(rounds):
        if done >= 10 and time.monotonic() > stop:
            break
        for name, fn in calls.items():
            times[name].append(clock(fn))
    return times


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    ordered = torch.tensor(times, dtype=torch.float64)
    p20, p50, p80 = torch.quantile(ordered, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return p20, p50, p80


def copy_bandwidth(device: str) -> float:
    """GB/s of `copy_` between two buffers far larger than the caches: bytes read plus bytes written."""
    source = torch.ones(256 * MIB if device == "cpu" else 2048 * MIB, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = Clock(device)
    times = interleaved({"copy": lambda: target.copy_(source)}, clock, seconds=2, rounds=30)["copy"]
    return 2 * source.numel() / quantiles(times)[1] / 1e6


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """TFLOP/s of one large matrix product."""
    n = 2048 if device == "cpu" else 8192
    a = torch.randn(n, n, device=device).to(dtype)
    times = interleaved({"mm": lambda: a @ a}, Clock(device), seconds=3, rounds=30)["mm"]
    return 2 * n**3 / quantiles(times)[1] / 1e9


def peak_mib(fn: Callable[[], object], device: str) -> float:
    """Memory that one call needs beyond what is held before it: allocator peak on CUDA, resident peak on Linux.

    On a CPU call it in a process of its own with MALLOC_MMAP_THRESHOLD_ set, so that freed blocks leave the process.
    """
    fn()  # what is cached for ever is not the call's
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with open("/proc/self/clear_refs", "w", encoding="ascii") as refs:
        refs.write("5")  # resets the high-water mark
    before = _status("VmRSS")
    fn()
    return max(0, _status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))


CHILD_ENV = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
