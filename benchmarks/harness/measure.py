"""Timing, counting and hardware ceilings; knows nothing of losses."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

MIB = 2**20
CYCLES = 2_000_000  # a millisecond of a GPU at 2 GHz
LONGEST_SLEEP = 20.0  # ms
ROOT = pathlib.Path(__file__).parents[2]
INSTALLED = ROOT.name == "_bench"  # a copy inside the package, as setup.py makes it


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
    """The commit, `-dirty` if a source differs from it; without git, a hash of the sources. FASTLOSS_COMMIT overrides.

    Of an installed package its version.

    What a run writes itself (results, pictures, tables) makes nothing dirty, or the second part of a run would have
    another commit than the first.
    """
    if os.environ.get("FASTLOSS_COMMIT"):
        return os.environ["FASTLOSS_COMMIT"]
    if INSTALLED:
        import fastloss

        return f"fastloss-{fastloss.__version__}"
    own = [":!benchmarks/results", ":!benchmarks/REPORT.md", ":!README.md"]
    try:
        head, changed = (
            subprocess.run(["git", *words], capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
            for words in (["rev-parse", "--short=10", "HEAD"], ["status", "--porcelain", "-uno", "--", ".", *own])
        )
        return head + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        digest = hashlib.sha256()
        for folder in ("fastloss", "csrc", "tests", "benchmarks"):
            for path in sorted((ROOT / folder).rglob("*.*")):
                if path.suffix in (".py", ".cpp", ".h"):
                    digest.update(path.read_bytes())
        return f"sources-{digest.hexdigest()[:10]}"


def common_columns(device: str) -> dict[str, object]:
    """What all the rows of a run share."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = ""
    return dict(
        device=device_label(device),
        threads=torch.get_num_threads(),
        commit=commit(),
        torch=torch.__version__,
        triton=version,
    )


def prepare_process() -> None:
    """Start this process again with what it needs in its environment.

    glibc's malloc by default gives large blocks back to the system or not depending on their size and on the layout of
    the heap, and the page faults of getting them again (6 ms for 25 MiB) fall on whichever provider comes next. Here it
    maps no block of its own and keeps all; who needs less memory is seen in the child that measures it (memory.py).
    Compiled graphs are kept between runs, or a headline suite would compile for most of its ten minutes.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), "fastloss-inductor"))
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
    wanted = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
    if sys.platform == "linux" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | wanted)


Pass = tuple[Callable[[], Any], Callable[[Any], object]]  # forward, and the backward of what it returned


class Clock:
    """Milliseconds of a forward and its backward: wall time on the CPU, events on the stream on CUDA.

    The caches are flushed before each pass on CUDA. With `ahead` the device then sleeps while the host launches the
    pass: the times are the device's, as in a training loop whose queue is full. `host` has what launching took, which
    is what counts where the device waits for it.
    """

    def __init__(self, device: str, ahead: bool = True) -> None:
        self.device, self.ahead = device, ahead
        self.host: dict[Callable[[], Any], list[float]] = {}  # forward -> ms
        self._flush = torch.empty(256 * MIB, dtype=torch.uint8, device=device) if device == "cuda" else None

    def __call__(self, forward: Callable[[], Any], backward: Callable[[Any], object]) -> tuple[float, float]:
        if self._flush is None:
            start = time.perf_counter_ns()
            out = forward()
            middle = time.perf_counter_ns()
            backward(out)
            end = time.perf_counter_ns()
            return (middle - start) / 1e6, (end - middle) / 1e6
        self._flush.zero_()
        host = self.host.setdefault(forward, [])
        if self.ahead:
            torch.cuda._sleep(int(CYCLES * min(LONGEST_SLEEP, max([1.0, *(1.5 * ms for ms in host[-3:])]))))
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        start = time.perf_counter_ns()
        marks[0].record()
        out = forward()
        marks[1].record()
        backward(out)
        marks[2].record()
        host.append((time.perf_counter_ns() - start) / 1e6)
        marks[2].synchronize()
        return marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2])


def interleaved(
    passes: dict[str, Pass], clock: Clock, seconds: float, rounds: int = 300, least: int = 10
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, Exception]]:
    """(times, failures): each round times every pass once, so that a drift of the machine hits all alike.

    Every other round goes backwards, so that nobody always follows the same neighbour. At least `least` rounds are
    made, or 3 where they take far longer than `seconds`.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in passes}
    failed: dict[str, Exception] = {}
    start, warming = None, time.monotonic()
    for done in range(-2, rounds):  # two rounds of warm-up, one where they take long
        if done == -1 and time.monotonic() - warming > 0.5:
            continue
        spent = 0.0 if start is None else time.monotonic() - start
        if spent > seconds and (done >= least or (done >= 3 and spent > 3 * seconds + 2)):
            break
        start = time.monotonic() if done == 0 else start
        for name in passes if done % 2 else reversed(passes):
            if name in failed:
                continue
            try:
                pair = clock(*passes[name])
            except (RuntimeError, MemoryError) as error:
                failed[name] = error
                continue
            if done >= 0:
                times[name].append(pair)
    return {name: found for name, found in times.items() if name not in failed}, failed


def single(fn: Callable[[], object], device: str, seconds: float, rounds: int) -> float:
    """The median of one call that has no backward."""
    times, failed = interleaved({"it": (fn, lambda out: None)}, Clock(device), seconds, rounds, least=3)
    for error in failed.values():
        raise error
    return quantiles([forward for forward, _ in times["it"]])[1]


def reason(error: BaseException) -> str:
    """A failure in one line: `out of memory: ...` or `failed: ...`."""
    lines = str(error).strip().splitlines() or [""]
    short = " ".join(lines[0].split())[:200]
    text = " ".join(lines).lower()
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text or "out of memory" in text:
        return f"out of memory: {short}"
    return f"failed: {type(error).__name__}: {short}"


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    ordered = torch.tensor(times, dtype=torch.float64)
    p20, p50, p80 = torch.quantile(ordered, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return p20, p50, p80


def copy_bandwidth(device: str, seconds: float = 0.2) -> float:
    """GB/s of `copy_` between two buffers far larger than the caches: bytes read plus bytes written."""
    source = torch.ones(256 * MIB if device == "cpu" else 2048 * MIB, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / single(lambda: target.copy_(source), device, seconds, rounds=30) / 1e6


def matmul_rate(device: str, dtype: torch.dtype, tf32: bool = False, seconds: float = 0.2) -> float:
    """TFLOP/s of one large matrix product; on the CPU of the faster library, the BLAS or oneDNN."""
    n = 2048 if device == "cpu" else 8192
    a = torch.randn(n, n, device=device).to(dtype)
    products: list[Callable[[], object]] = [lambda: a @ a]
    if device == "cpu" and torch.backends.mkldnn.is_available():
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, a, None, "none", [], ""))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else before)
    try:
        share = seconds / len(products)
        return 2 * n**3 / min(single(product, device, share, rounds=30) for product in products) / 1e9
    finally:
        torch.set_float32_matmul_precision(before)


def ceiling(device: str, unit: str, dtype: str) -> float:
    """What bounds a row, GB/s or TFLOP/s. Measured next to the row, for the speed of a machine drifts."""
    return copy_bandwidth(device) if unit == "bytes" else matmul_rate(device, getattr(torch, dtype))


def ceilings(device: str) -> dict[str, float]:
    """All that this device allows: `copy` in GB/s, matrix products by dtype in TFLOP/s."""
    dtypes = ("float32", "bfloat16")
    found = {"copy": copy_bandwidth(device, 1.0)} | {n: matmul_rate(device, getattr(torch, n)) for n in dtypes}
    return found | ({"tf32": matmul_rate(device, torch.float32, tf32=True)} if device == "cuda" else {})


def counts(forward: Callable[[], Any], backward: Callable[[Any], object], inputs: list[torch.Tensor], device: str
           ) -> tuple[int, int]:  # fmt: skip
    """(bytes saved for the backward, launches) of one forward and backward.

    Saved is what autograd keeps, each storage once, the inputs themselves not counted. Launches are kernels on CUDA; on
    the CPU operators that ran, a compiled graph counting as one.
    """
    own = {t.untyped_storage().data_ptr() for t in inputs}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.layout == torch.strided and (where := t.untyped_storage().data_ptr()) not in own:
            kept[where] = t.untyped_storage().nbytes()
        return t

    def step() -> None:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = forward()  # alive until all is counted, so that no address comes twice
        backward(out)

    launched = _launches(step, device)
    return sum(kept.values()), launched


def _launches(step: Callable[[], object], device: str) -> int:
    if device == "cuda":
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with _no_stderr(), torch.profiler.profile(activities=kinds) as profile:
            step()
            torch.cuda.synchronize()
        kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return sum(not name.startswith(("Memcpy", "Memset")) for name in kernels)
    with _no_stderr(), torch.autograd.profiler.profile(use_kineto=False) as legacy:
        step()
    events = legacy.function_events
    graphs = [e for e in events if e.name.startswith("## Call CompiledFxGraph")]
    operators = [e for e in events if "::" in e.name and not e.name.startswith("autograd::")]
    return len(graphs) + sum(not any("::" in child.name for child in e.cpu_children) for e in operators)


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """The profiler writes to the file descriptor."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextlib.contextmanager
def address_limit(mib: float) -> Iterator[None]:
    """What this process allocates inside beyond that many MiB raises, where the system would kill it; 0: no limit.

    A limit within a limit does not raise it.
    """
    if not mib or sys.platform != "linux":
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    wanted = status("VmSize") * 1024 + int(mib * MIB)
    within = wanted if before[0] == resource.RLIM_INFINITY else min(wanted, before[0])
    resource.setrlimit(resource.RLIMIT_AS, (within, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def free_mib() -> float:
    """Memory that is free on this machine; 0 where that is unknown."""
    try:
        return status("MemAvailable", "/proc/meminfo") / 1024
    except (OSError, StopIteration):
        return 0


def peak_mib(fn: Callable[[], object], device: str) -> float:
    """Memory that one call needs beyond what is held before it: allocator peak on CUDA, resident peak on Linux.

    On a CPU call it in a process of its own (memory.py) whose malloc gives freed blocks back.
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
    before = status("VmRSS")
    fn()
    return max(0, status("VmHWM") - before) / 1024


def status(field: str, path: str = "/proc/self/status") -> int:
    """A figure of the kernel's, KiB."""
    with open(path, encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field))
