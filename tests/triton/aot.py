"""Compile every Triton kernel, as its launchers launch it, for GPUs that are not here, and check what came out.

    python -m tests.triton.aot [stem ...] [--all | --each N] [--targets sm_90 ...] [-v]

The launchers of each file <stem>.py of a family's kernels run on the calls its `aot_cases()` lists, under a driver
without a device. Every call is compiled for the first target, sm_90, and for the others (sm_80, sm_86, sm_89, sm_100,
sm_120, gfx942) some calls of each kernel (all with --all). With --each N a call is compiled only where a kernel needs
it to be compiled N times for the first target, once for the others. Prints a table; the exit code is 1 where an
expectation fails: no spills, shared memory within the device's, 128-bit accesses and matrix instructions where the
case names them. AMD's scalar registers (masks, one per element of a lane) may go to lanes of vector registers, which
the column "lanes" counts, as long as no vector register is spilled and no scratch memory is used.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import multiprocessing
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import triton
from triton.runtime.jit import JITFunction

import fastloss
from fastloss.core.kernels.launch import AotCase
from tests.triton import fake_driver

PACKAGE = pathlib.Path(fastloss.__file__).parent
MODULES = {  # of the kernels, by stem
    path.stem: f"fastloss.{path.parts[-3]}.kernels.{path.stem}" for path in sorted(PACKAGE.glob("*/kernels/[!_]*.py"))
}
NVIDIA_BIN = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
MORE = {"sm_80": 4, "gfx942": 4}  # calls of each kernel for these targets, where nothing else is asked for; others: 1
# Share of the bytes of global loads and stores, counted in the code, that move in 128-bit instructions.
VECTOR_SHARE = 0.5
PTX_ACCESS = re.compile(r"\b(?:ld|st)\.global[\w.]*?(?:\.v(\d))?\.[bfsu](\d+)\b")
LOCAL_ACCESS = re.compile(r"\b(?:LDL|STL)\b")
AMD_ACCESS = re.compile(
    r"\b(?:global|buffer)_(?:load|store)_(?:[a-z]+_)*?(dwordx4|dwordx3|dwordx2|dword|u?short|[us]?byte)"
)
AMD_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2}


@dataclass
class Row:
    """One compiled kernel, or a launch that failed."""

    stem: str
    index: int
    label: str
    target: str
    kernel: str
    stats: dict[str, float]
    problems: list[str]


def unused_stack(ptx: str, cubin: str) -> int:
    """Bytes of stack that LLVM sets aside and nothing uses: no instruction of the PTX names them, and the machine code
    has no local access at all, so that no spill hides in what they are rounded up by."""
    frame = re.search(r"\.local\s+\.align\s+\d+\s+\.b8\s+(\w+)\[(\d+)\]", ptx)
    if frame is None or len(re.findall(rf"\b{frame[1]}\b", ptx)) > 1:
        return 0
    return 0 if LOCAL_ACCESS.search(dumped("--dump-sass", cubin)) else -(-int(frame[2]) // 8) * 8


def dumped(what: str, cubin: str) -> str:
    path = os.pathsep.join([str(NVIDIA_BIN), os.environ["PATH"]])  # of nvdisasm
    command = [str(NVIDIA_BIN / "cuobjdump"), what, cubin]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PATH": path}).stdout


def stats(kernel: Any) -> dict[str, float]:
    """Registers, spills (bytes of stack), shared memory, matrix instructions and the 128-bit share of a kernel."""
    found = {"warps": kernel.metadata.num_warps, "shared": kernel.metadata.shared}
    if "cubin" in kernel.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = dumped("--dump-resource-usage", file.name)
            unused = unused_stack(kernel.asm["ptx"], file.name)
        registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups()
        ptx = kernel.asm["ptx"]
        found |= {"regs": int(registers), "spills": int(stack) + int(local) - unused}
        found["matrix"] = len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)", ptx))
        widths = [int(lanes or 1) * int(bits) // 8 for lanes, bits in PTX_ACCESS.findall(ptx)]
        bulk = len(re.findall(r"cp\.async\.bulk\.tensor|cp\.async\.cg\.shared\.global[^\n]*\b(?:16|0x10)\b", ptx))
    else:
        code = kernel.asm["amdgcn"]

        def number(key: str) -> int:
            return int(re.search(rf"\.{key}:\s+(\d+)", code).group(1))

        spills = max(number("vgpr_spill_count"), number("private_segment_fixed_size"))
        found |= {"regs": number("vgpr_count"), "spills": spills, "lanes": number("sgpr_spill_count")}
        found["matrix"] = len(re.findall(r"\bv_mfma_", code))
        widths = [AMD_BYTES.get(width, 1) for width in AMD_ACCESS.findall(code)]
        bulk = 0
    widths += [16] * bulk
    found["vector"] = sum(w for w in widths if w == 16) / max(sum(widths), 1)
    return found


def problems(found: dict[str, float], case: AotCase, kernel: str, target: str) -> list[str]:
    limit = fake_driver.SHARED_LIMIT[target]
    wrong = [f"spills {found['spills']} bytes"] if found["spills"] > case.spills else []
    if found["shared"] > limit:
        wrong.append(f"{found['shared']} bytes of shared memory, {limit} there")
    threads = found["warps"] * fake_driver.TARGETS[target].warp_size
    if target.startswith("sm_") and found["regs"] * threads > 65536:
        wrong.append(f"{found['regs']} registers for each of {threads} threads, 65536 there")
    if kernel in case.vector and found["vector"] < VECTOR_SHARE:
        wrong.append(f"{found['vector']:.0%} of the bytes move in 128-bit accesses, expected {VECTOR_SHARE:.0%}")
    if kernel in case.matrix and not found["matrix"]:
        wrong.append("no matrix instruction")
    return wrong


def cases_of(stem: str) -> list[AotCase]:
    module = importlib.import_module(MODULES[stem])
    return list(module.aot_cases()) if hasattr(module, "aot_cases") else []


def stems() -> list[str]:
    return list(MODULES)


_seen: list[tuple[str, Any]] = []  # (name, compiled kernel) of the launches since the last clear()


def _start_worker() -> None:
    """Install the driver without a device, and record what every launch compiles."""
    _start_worker.driver = fake_driver.install()  # type: ignore[attr-defined]
    original = JITFunction.run

    def run(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        compiled = original(self, *args, **kwargs)
        _seen.append((self.fn.__name__, compiled))
        return compiled

    JITFunction.run = run


def compile_case(job: tuple[str, int, str]) -> list[Row]:
    stem, index, target = job
    case = cases_of(stem)[index]
    _start_worker.driver.name = target  # type: ignore[attr-defined]
    _seen.clear()
    try:
        case.launch(*case.args)
        if not _seen:
            raise RuntimeError("no kernel was launched")
    except Exception as error:  # any failure of a compiler is a finding about this case
        return [Row(stem, index, case.label, target, "", {}, [f"{type(error).__name__}: {str(error)[:500]}"])]
    rows = []
    distinct = {id(compiled): (name, compiled) for name, compiled in _seen}  # a loop may launch one thousands of times
    for name, compiled in distinct.values():
        found = stats(compiled)
        rows.append(Row(stem, index, case.label, target, name, found, problems(found, case, name, target)))
    return rows


class _NotCompiled:
    """What a launch returns while kernels are only listed."""

    def __getattr__(self, name: str) -> _NotCompiled:
        return self


def kernels_of(stem: str) -> list[set[str]]:
    """The kernels that each call of a file launches."""
    run, found = JITFunction.run, []
    try:
        for case in cases_of(stem):
            found.append(set())
            JITFunction.run = lambda kernel, *args, **kwargs: found[-1].add(kernel.fn.__name__) or _NotCompiled()
            try:
                case.launch(*case.args)
            except Exception:  # what is wrong is found again, and told, where this call is compiled
                found[-1].add(case.label)
    finally:
        JITFunction.run = run
    return found


def calls_with_each(stem: str, kernels: list[set[str]], times: int) -> list[tuple[str, int]]:
    """Few calls of a file that together launch each of its kernels `times`, or as often as there are calls for it."""
    order = random.Random(stem).sample(range(len(kernels)), len(kernels))  # always the same
    counts = collections.Counter(name for names in kernels for name in names)
    missing = {name: min(times, count) for name, count in counts.items()}
    chosen: list[int] = []
    while any(missing.values()):
        rest = (index for index in order if index not in chosen)
        chosen.append(max(rest, key=lambda index: sum(missing[name] > 0 for name in kernels[index])))
        missing |= {name: max(missing[name] - 1, 0) for name in kernels[chosen[-1]]}
    return [(stem, index) for index in sorted(chosen)]


def check(
    names: list[str], everything: bool, jobs: int, each: int | None = None, targets: Sequence[str] = ()
) -> list[Row]:
    first, *others = targets or fake_driver.TARGETS
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(jobs, context, initializer=_start_worker) as pool:
        launched = dict(zip(names, pool.map(kernels_of, names), strict=True))

        def calls(times: int | None) -> list[tuple[str, int]]:
            if times is None:
                return [(stem, index) for stem, kernels in launched.items() for index in range(len(kernels))]
            return [call for stem, kernels in launched.items() for call in calls_with_each(stem, kernels, times)]

        def times(target: str) -> int | None:
            return None if everything else MORE.get(target, 1) if each is None else 1

        chosen = [(*call, first) for call in calls(each)]
        chosen += [(*call, target) for target in others for call in calls(times(target))]
        return [row for rows in pool.map(compile_case, chosen) for row in rows]


def table(rows: list[Row]) -> str:
    """One line per kernel and target: the worst of its configurations."""
    groups = collections.defaultdict(list)
    for row in rows:
        if row.stats:
            groups[row.stem, row.kernel, row.target].append(row.stats)
    heads = ("calls", "regs", "spills", "lanes", "shared", "128-bit", "matrix")
    lines = [f"{'stem':12} {'kernel':32} {'target':7} {'{:>5} {:>5} {:>6} {:>5} {:>7} {:>8} {:>6}'.format(*heads)}"]
    for (stem, kernel, target), found in sorted(groups.items()):
        most = {key: max(s.get(key, 0) for s in found) for key in ("regs", "spills", "lanes", "shared")}
        least = {key: min(s[key] for s in found) for key in ("vector", "matrix")}
        lines.append(
            f"{stem:12} {kernel:32} {target:7} {len(found):5} {most['regs']:5} {most['spills']:6} {most['lanes']:5} "
            f"{most['shared']:7} {least['vector']:8.0%} {least['matrix']:6}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.triton.aot", description=__doc__.split("\n")[0])
    parser.add_argument("stems", nargs="*", help="files of kernels, without .py; default: all")
    parser.add_argument("--all", action="store_true", help="compile every call for every target")
    parser.add_argument("--each", type=int, help="compile each kernel this often, not all calls")
    parser.add_argument("--targets", nargs="+", choices=list(fake_driver.TARGETS), help="these alone; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("-v", "--verbose", action="store_true", help="one line per compiled kernel")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("unset TRITON_INTERPRET: the kernels would be interpreted functions, which nothing compiles")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        rows = check(options.stems or stems(), options.all, options.jobs, options.each, options.targets or ())
    if options.verbose:
        for row in rows:
            print(f"{row.stem} {row.label} [{row.target}] {row.kernel} {row.stats}")
    print(f"triton {triton.__version__}, {len(rows)} kernels compiled\n{table(rows)}")
    failed = [row for row in rows if row.problems]
    for row in failed:
        print(f"FAILED {row.stem}: {row.label} [{row.target}] {row.kernel}: {'; '.join(row.problems)}")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
