"""What `make gpu` does, part by part: commands, in the order of what they tell, and what each takes of a device's time.

1  is it right?      the smallest cells of every loss, compute-sanitizer beside the compilation of what follows
2  is it fast?       the headline rows, losses without a row on this device first
3  why?              ncu's counters of the kernels
4  what fits?        contrastive losses of 65,536 and 131,072 rows, a step of a million
5  the rest          the other device tests, whole steps, errors, scaling
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import pathlib
import shutil
import sys
from dataclasses import dataclass

from benchmarks import accuracy
from benchmarks.workloads.items import is_large, items, named
from tests import kernel_files
from tests.conformance.cases import CASES

LONGEST = 540  # s: what a call of ten minutes has room for
SHARDS = 4
GROUPS = {
    "clip": ("clip",), "siglip": ("siglip",), "planes": ("pixel", "smoothness"), "images": ("ssim", "ms_ssim", "image"),
    "features": ("feature", "lpips", "dists", "style"),
}  # fmt: skip
WORKERS = max(1, (os.cpu_count() or 2) - 1)  # each a context on the device, and most of a test's time is compiling
PYTEST = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
if importlib.util.find_spec("xdist") and WORKERS > 1:
    PYTEST += ["-n", str(WORKERS), "--dist", "worksteal"]
SMALLEST = "value_and_gradient or no_host_sync or replay or side_streams or dense_float64 or 31"
# Measured on 16 cores and an H200: 1,287 tests in 125 s; 119 of 125 compilations in 123 s; 20 rows in 174 s
SECONDS_A_ROW, SECONDS_A_LARGE_ROW = 9, 20


@dataclass
class Part:
    name: str
    commands: list[list[str]]  # program and arguments; several run at once
    seconds: int  # of a device's time
    takes_minutes: bool = False  # the one command has --minutes
    chapter: int = 5
    beside: bool = False  # runs at once with the part before it
    stays: bool = True  # what it made is worth something on another machine; a cache is not


def sanitizers() -> list[list[str]]:
    """compute-sanitizer, whose tools look at our kernels alone."""
    installed = sorted(map(str, pathlib.Path("/usr/local").glob("cuda*/bin/compute-sanitizer")))
    program = shutil.which("compute-sanitizer") or next(reversed(installed), "compute-sanitizer")
    kernels = ["--kernel-name", "kernel_substring=_kernel", sys.executable, "-m", "tests.device_calls"]
    return [[program, "--error-exitcode", "9", "--tool", tool, *kernels] for tool in ("memcheck", "racecheck")]


def device_tests() -> list[Part]:
    """The smallest cells first; then every loss through every check, in parts, and the kernels' own files."""
    every_loss = "tests/conformance/test_every_loss.py"
    families = sorted({case.name.split()[0] for case in CASES})
    shards = [families[i::SHARDS] for i in range(SHARDS)]
    smallest = ["tests/conformance/test_gpu.py", every_loss, "-k", SMALLEST]
    tests = [Part("tests-smallest", [[*PYTEST, *smallest]], 130, chapter=1)]
    tests.append(Part("tests-kernels", [[*PYTEST, *kernel_files()]], 240))
    rest = [(f"tests-{i + 1}", " or ".join(shard)) for i, shard in enumerate(shards)]
    rest.append(("tests-rest", f"not ({' or '.join(families)})"))
    return [*tests, *(Part(name, [[*PYTEST, every_loss, "-k", chosen]], 240) for name, chosen in rest)]


def rows_of(losses: list[str], device: str, out: pathlib.Path, results: pathlib.Path) -> list[Part]:
    """The headline rows, a process for a group of losses, for a start takes ten seconds.

    Losses without a file in `results` come first, those with large rows in the chapter of what fits.
    """
    new = lambda name: not (results / f"{name}.csv").exists()  # noqa: E731
    more = ["--device", device, "--out", str(out)]
    groups: dict[str, list[str]] = {}
    for name in sorted(losses, key=lambda name: not new(name)):
        group = next((g for g, words in GROUPS.items() if name.startswith(words)), "contrastive")
        groups.setdefault(group, []).append(name)
    found = []
    for group, names in groups.items():
        work = items(names, device, ["float32", "bfloat16"], headline=True)
        large = sum(is_large(item.shape) for item in work)
        seconds = SECONDS_A_ROW * (len(work) - large) + SECONDS_A_LARGE_ROW * large
        chapter = 4 if large else 2
        command = [sys.executable, "-m", "benchmarks.run", "--headline", *more, *names]
        found.append(Part(f"bench-{group}", [command], min(seconds, LONGEST), True, chapter=chapter))
    return found


def parts(device: str, out: pathlib.Path, results: pathlib.Path) -> list[Part]:
    """All, in their order. `results`: the device's own folder in `out`."""
    more = ["--device", device, "--out", str(out)]
    run = lambda module, *words: [[sys.executable, "-m", f"benchmarks.{module}", *words]]  # noqa: E731
    first, *rest = device_tests()
    million = run("train_steps", *more, "--batches", "1048576", "--providers", "fastloss")
    found = [
        first,
        Part("compile", run("compile_ahead", "--device", device, "--minutes", "2.2"), 135, chapter=1, stays=False),
        Part("sanitize", sanitizers(), 150, chapter=1, beside=True),
        *rows_of(named(), device, out, results),
        Part("profile", run("profile_kernels"), 60, chapter=3),
        Part("million", million, 120, chapter=4),
        Part("tune", run("tune"), 240),
        *rest,
        Part("steps", run("train_steps", *more), 240, True),
        Part("perceptual-step", run("perceptual_step", *more), 90),
        *(Part(f"accuracy-{d}", run("accuracy", "--dtype", d, *more), 300) for d in accuracy.DTYPES),
        Part("scaling", run("scaling", *more), LONGEST, True),
    ]
    return sorted(found, key=lambda part: part.chapter)


def together(todo: list[Part]) -> list[list[Part]]:
    """The parts, each with those that run beside it."""
    groups: list[list[Part]] = []
    for part in todo:
        if part.beside and groups:
            groups[-1].append(part)
        else:
            groups.append([part])
    return groups


def seconds_of(group: list[Part]) -> int:
    return max(part.seconds for part in group)


def timetable(todo: list[Part], minutes: float) -> list[list[list[Part]]]:
    """Which groups of parts each call of so many minutes has, in order: one that does not fit begins the next."""
    calls: list[list[list[Part]]] = [[]]
    for group in together(todo):
        if calls[-1] and sum(map(seconds_of, itertools.chain(calls[-1], [group]))) > 60 * minutes:
            calls.append([])
        calls[-1].append(group)
    return calls
