"""make sanitize: the C++ kernels under AddressSanitizer and UBSan (GCC's), in a build of their own in build/sanitize.

Their tests and drawn calls (tests/fuzz) are dealt over runs of every instruction set of this CPU, on one thread and
two: each test runs in one of them, with --all in every one. A finding is printed once with its place and the runs that
met it; the whole reports stay in build/sanitize/logs. The exit code is 1 where there is a finding, a test that fails or
a process that dies, else 0. Leaks are not looked for: Python and torch keep memory until the process ends.

    python -m tests.sanitize --isa avx2 --threads 2 -k pixel tests/image/test_pixel.py --calls 0
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import pathlib
import re
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tests import ROOT, kernel_files

BUILD = ROOT / "build" / "sanitize"
LOGS = BUILD / "logs"
EXTENSION = BUILD / "fastloss" / "_C.abi3.so"
NEEDED_FLAGS = {  # what csrc/core/isa.h asks of a CPU
    "default": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_bf16": {"avx512_bf16"},
}
VALUES = re.compile(r"0x[0-9a-f]+|-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")  # differ from call to call at one place
# Left out: what never gets to a kernel (gradcheck), what compiles for minutes and calls the same kernels, and what
# looks at the installed library or at the memory of the process.
CHOICE = (
    "(cpp or kernels or test_matmul) and not reference and not compiles and not opcheck and not gradcheck "
    "and not stable_abi and not triton and not test_blocking"
)


@dataclass(frozen=True)
class Run:
    """One process: a job on an instruction set and a number of threads."""

    job: str  # tests or fuzz
    isa: str
    threads: int
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.job}-{self.isa}-{self.threads}"


def build() -> None:
    environment = os.environ | {"FASTLOSS_SANITIZE": "1"}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext"], cwd=ROOT, env=environment, check=True)


def preloaded() -> str:
    """The sanitizers' own libraries, and libstdc++ so that exceptions are seen: before all that Python loads."""
    compiler = os.environ.get("CXX", "g++").split()
    found = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"):
        path = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        if not os.path.isabs(path.stdout.strip()):
            sys.exit(f"sanitize: {' '.join(compiler)} has no {name}; GCC with its sanitizers is needed (CXX=g++)")
        found.append(path.stdout.strip())
    return " ".join(found)


def instruction_sets() -> list[str]:
    """Those of this CPU, by the names of FASTLOSS_CPU."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ["default"]
    flags = {word for line in lines if line.startswith("flags") for word in line.split()}
    return [name for name, needed in NEEDED_FLAGS.items() if needed <= flags]


def plan(options: argparse.Namespace) -> list[Run]:
    others = ("core/test_cpp.py", "core/test_matmul.py", "conformance/test_every_loss.py")
    files = options.files or [*kernel_files(), *(f"tests/{name}" for name in others)]
    choice = f"({CHOICE}) and ({options.k})" if options.k else CHOICE
    quiet = ("-q", "-s", "--durations=5", "-p", "no:cacheprovider")
    pytest = (sys.executable, "-m", "pytest", *quiet, "-k", choice, *files)
    pairs = list(itertools.product(options.isa or instruction_sets(), options.threads))
    runs = []
    for i, (isa, threads) in enumerate(pairs):
        share = () if options.all else ("-p", "tests.deal", "--deal", f"{i}/{len(pairs)}")
        runs.append(Run("tests", isa, threads, (*pytest, *share)))
    if options.calls and importlib.util.find_spec("tests.fuzz") is not None:
        for seed, (isa, threads) in enumerate(pairs):
            calls = ("--calls", str(max(1, options.calls // len(pairs))), "--seed", str(1_000_000 * seed))
            alone = ("--processes", "1", "--compiled", "0", "--timeout", "600")
            runs.append(Run("fuzz", isa, threads, (sys.executable, "-m", "tests.fuzz", *calls, *alone)))
    return runs


def run(job: Run, preload: str) -> tuple[Run, int, str]:
    """The exit code of a run and the last line that it printed."""
    logs = LOGS / job.name
    environment = os.environ | {
        "LD_PRELOAD": preload,
        "PYTHONMALLOC": "malloc",  # or Python hands out pieces of large blocks, within which nothing is seen
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={logs}.asan",
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={logs}.ubsan",
        "FASTLOSS_EXTENSION": str(EXTENSION),
        "FASTLOSS_CPU": job.isa,
        "OMP_NUM_THREADS": str(job.threads),
        "OMP_WAIT_POLICY": "passive",  # a thread that spins takes the core of the run beside it
    }
    started = time.perf_counter()
    with open(f"{logs}.out", "w") as out:
        code = subprocess.run(job.command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT).returncode
    lines = pathlib.Path(f"{logs}.out").read_text(errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "").strip("= ")
    print(f"{job.name}: exit code {code} after {time.perf_counter() - started:.0f} s: {last}", flush=True)
    return job, code, last


def findings() -> dict[str, set[str]]:
    """What the logs report, by kind and place, and the names of the runs that met it."""
    met: dict[str, set[str]] = defaultdict(set)
    for path in LOGS.iterdir():  # what a process printed too: a report that ends it may stand there
        name, text = path.name.split(".")[0], path.read_text(errors="replace")
        for where, what in re.findall(r"(\S+:\d+:\d+): runtime error: (.*)$", text, re.MULTILINE):
            met[f"{where}: {VALUES.sub('#', what)}"].add(name)
        for what in re.findall(r"SUMMARY: (AddressSanitizer: .*)$", text, re.MULTILINE):
            met[what].add(name)
    return met


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=__doc__)
    parser.add_argument("--isa", nargs="+", choices=tuple(NEEDED_FLAGS), help="these alone; default: all of this CPU")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--all", action="store_true", help="every test in every run, which takes hours")
    parser.add_argument("--calls", type=int, default=4000, help="drawn calls, over all runs together; 0: none")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--no-build", action="store_true", help="take the build that is there")
    parser.add_argument("-k", default="", help="only tests that this pytest expression chooses, too")
    parser.add_argument("files", nargs="*", help="test files; default: those of the kernels")
    return parser.parse_args(arguments)


def main() -> int:
    options = options_of(None)
    if not options.no_build:
        build()
    LOGS.mkdir(parents=True, exist_ok=True)
    for path in LOGS.iterdir():
        path.unlink()
    preload = preloaded()
    with ThreadPoolExecutor(options.at_once) as pool:
        done = list(pool.map(lambda job: run(job, preload), plan(options)))
    met, failed = findings(), [job.name for job, code, _ in done if code != 0]
    for what, names in sorted(met.items()):
        print(f"{what}\n    in {', '.join(sorted(names))}")
    print(f"sanitize: {len(met)} findings in {len(done)} runs; runs that failed: {', '.join(failed) or 'none'}")
    return int(bool(met or failed))


if __name__ == "__main__":
    sys.exit(main())
