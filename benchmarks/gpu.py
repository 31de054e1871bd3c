"""Everything a GPU is needed for, in parts of at most nine minutes: `python -m benchmarks.gpu` (`make gpu`).

Device tests, then the headline rows of each loss, whole training steps, errors, scaling. A part that has finished for
this commit is skipped, so an interrupted run goes on where it stopped; `--minutes` ends a run between or inside parts.
Needs torch, triton, numpy, pytest and hypothesis, no network and no installed project. Results:
`benchmarks/results/<gpu>/`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import torch

from benchmarks import accuracy
from benchmarks.harness import measure
from benchmarks.harness.results import RESULTS
from benchmarks.workloads.items import named
from tests import kernel_files
from tests.conformance.cases import CASES

LONGEST = 9.0  # minutes
LEAST = 1.5  # minutes that must be left for a part to be begun
SHARDS = 4
GROUPS = {
    "clip": ("clip",), "siglip": ("siglip",), "planes": ("pixel", "smoothness"), "images": ("ssim", "ms_ssim", "image"),
    "features": ("feature", "lpips", "dists", "style"),
}  # fmt: skip
WORKERS = min(12, (os.cpu_count() or 2) - 1)  # each a context on the device, and most of a test's time is compiling
PYTEST = ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
if importlib.util.find_spec("xdist") and WORKERS > 1:
    PYTEST += ["-n", str(WORKERS), "--dist", "worksteal"]
KERNELS = kernel_files()


@dataclass
class Part:
    name: str
    command: list[str]
    takes_minutes: bool = False  # the command has --minutes


def parts(device: str, out: pathlib.Path) -> list[Part]:
    families = sorted({case.name.split()[0] for case in CASES})
    shards = [families[i::SHARDS] for i in range(SHARDS)]
    device_tests, every_loss = "tests/conformance/test_gpu.py", "tests/conformance/test_every_loss.py"
    tests = [Part("tests-device", [*PYTEST, device_tests]), Part("tests-kernels", [*PYTEST, *KERNELS])]
    tests += [Part(f"tests-{i + 1}", [*PYTEST, every_loss, "-k", " or ".join(shard)]) for i, shard in enumerate(shards)]
    tests.append(Part("tests-rest", [*PYTEST, every_loss, "-k", f"not ({' or '.join(families)})"]))
    more = ["--device", device, "--out", str(out)]
    groups: dict[str, list[str]] = {}  # losses measured in one process, for a start takes ten seconds
    for name in named():
        group = next((g for g, words in GROUPS.items() if name.startswith(words)), "contrastive")
        groups.setdefault(group, []).append(name)
    run = ["-m", "benchmarks.run", "--headline", *more]
    loss = [Part(f"bench-{group}", [*run, *names], True) for group, names in groups.items()]
    steps = Part("steps", ["-m", "benchmarks.train_steps", *more], True)
    perceptual = Part("perceptual-step", ["-m", "benchmarks.perceptual_step", *more])
    exact = [Part(f"accuracy-{d}", ["-m", "benchmarks.accuracy", "--dtype", d, *more]) for d in accuracy.DTYPES]
    return [*tests, *loss, steps, perceptual, *exact, Part("scaling", ["-m", "benchmarks.scaling", *more], True)]


def finished(record: pathlib.Path, commit: str) -> bool:
    try:
        found = json.loads(record.read_text(encoding="utf8"))
        return found["ok"] and found["commit"] == commit
    except (OSError, ValueError, KeyError):
        return False


def do(part: Part, minutes: float) -> tuple[bool, str]:
    """(whether it succeeded, its last line)."""
    command = [sys.executable, *part.command]
    command += ["--minutes", f"{max(1.0, minutes - 1):.1f}"] if part.takes_minutes else []
    lines: list[str] = []
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, cwd=measure.ROOT) as run:
        assert run.stdout
        timer = threading.Timer(60 * minutes, run.kill)
        timer.start()
        for line in run.stdout:
            print(line, end="", flush=True)
            lines = [*lines[-20:], line.strip()]
        run.wait()
        timer.cancel()
    if run.returncode == -signal.SIGKILL:
        return False, f"stopped after {minutes:.1f} minutes, or killed"
    nothing_chosen = run.returncode == 5 and "pytest" in command
    return run.returncode == 0 or nothing_chosen, next((line for line in reversed(lines) if line), "")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("only", nargs="*", metavar="PART", help="default: all that have not finished for this commit")
    parser.add_argument("--list", action="store_true", help="name the parts and what they came to")
    parser.add_argument("--minutes", type=float, default=0.0, help="of the whole call; default: all parts")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args(argv)
    todo = parts(args.device, args.out)
    unknown = sorted(set(args.only) - {p.name for p in todo})
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(p.name for p in todo)}")
    if args.device == "cuda" and not torch.cuda.is_available() and not args.list:
        parser.error("no CUDA or ROCm device is visible to torch")
    there = args.device == "cpu" or torch.cuda.is_available()
    records = args.out / (measure.device_folder(args.device) if there else "h200") / "parts"
    commit, start, failed = measure.commit(), time.monotonic(), []
    for part in todo:
        record = records / f"{part.name}.json"
        done = finished(record, commit)
        if args.list:
            print(f"{part.name:32}{'finished' if done else 'to do'}")
            continue
        if done or (args.only and part.name not in args.only):
            continue
        left = args.minutes - (time.monotonic() - start) / 60 if args.minutes else LONGEST
        if left < LEAST:
            print(f"the {args.minutes:g} minutes are over; call again for {part.name} and what follows")
            return 3
        print(f"== {part.name}", flush=True)
        begun = time.monotonic()
        ok, last = do(part, min(LONGEST, left))
        records.mkdir(parents=True, exist_ok=True)
        seconds = round(time.monotonic() - begun)
        record.write_text(json.dumps(dict(commit=commit, ok=ok, seconds=seconds, last=last)) + "\n", encoding="utf8")
        failed += [] if ok else [f"{part.name}: {last}"]
    for line in failed:
        print(f"failed: {line}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
