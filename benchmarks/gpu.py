"""Everything a GPU is needed for, for people who have one by the minute: `python -m benchmarks.gpu` (`make gpu`).

Parts in the order of what they tell (workloads/gpu_parts.py): is it right, is it fast, why, what fits, the rest. A part
that has finished for this commit is skipped, so a call goes on where the last one stopped; `--minutes 9.5` ends a call
that may not last longer, `--timetable` shows which parts fit into each. Needs torch, triton, numpy, pytest and
hypothesis, no network and no installed project; libraries that are compared with travel as wheels. Each part writes its
results as it goes, to `benchmarks/results/<gpu>/`; `--archive FILE` packs them, and the parts' logs, at the end.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.harness import measure
from benchmarks.harness.results import RESULTS
from benchmarks.workloads.gpu_parts import LONGEST, Part, parts, seconds_of, timetable, together

LEAST = 60.0  # s that must be left for a part that ends itself to be begun


def record_of(part: Part, results: pathlib.Path) -> pathlib.Path:
    """Where it is written that a part has finished; beside the caches where it filled those."""
    folder = results / "parts" if part.stays else pathlib.Path(tempfile.gettempdir()) / "fastloss-gpu-parts"
    return folder / f"{part.name}.json"


def finished(part: Part, results: pathlib.Path, commit: str) -> bool:
    try:
        found = json.loads(record_of(part, results).read_text(encoding="utf8"))
        return found["ok"] and found["commit"] == commit
    except (OSError, ValueError, KeyError):
        return False


def run_one(command: list[str], seconds: float, log: Any) -> tuple[int, str]:
    """(exit code, last line) of a process that is killed after so many seconds; its lines are shown and logged."""
    lines: list[str] = []
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, cwd=measure.ROOT) as run:
        assert run.stdout
        timer = threading.Timer(seconds, run.kill)
        timer.start()
        for line in run.stdout:
            print(line, end="", flush=True)
            log.write(line)
            lines = [*lines[-20:], line.strip()]
        run.wait()
        timer.cancel()
    return run.returncode, next((line for line in reversed(lines) if line), "")


def do(part: Part, seconds: float, log: pathlib.Path) -> tuple[bool, str]:
    """(whether it succeeded, its last line)."""
    absent = [command[0] for command in part.commands if not shutil.which(command[0])]
    if absent:
        return False, f"absent: {absent[0]} is not installed"
    more = ["--minutes", f"{max(1.0, seconds / 60 - 1):.1f}"] if part.takes_minutes else []
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf8") as lines, ThreadPoolExecutor(len(part.commands)) as threads:
        ended = list(threads.map(lambda command: run_one([*command, *more], seconds, lines), part.commands))
    for code, last in ended:
        if code == -signal.SIGKILL:
            return False, f"stopped after {seconds:.0f} s, or killed"
        nothing_chosen = code == 5 and "pytest" in part.commands[0]
        if code and not nothing_chosen:
            return False, last
    return True, ended[0][1]


def do_and_record(part: Part, seconds: float, results: pathlib.Path, commit: str) -> str:
    """Empty, or how it failed."""
    begun = time.monotonic()
    ok, last = do(part, seconds, results / "parts" / f"{part.name}.log")
    record = record_of(part, results)
    record.parent.mkdir(parents=True, exist_ok=True)
    took = round(time.monotonic() - begun)
    record.write_text(json.dumps(dict(commit=commit, ok=ok, seconds=took, last=last)) + "\n", encoding="utf8")
    return "" if ok else f"{part.name}: {last}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("only", nargs="*", metavar="PART", help="default: all that have not finished for this commit")
    parser.add_argument("--list", action="store_true", help="name the parts and what they came to")
    parser.add_argument("--timetable", action="store_true", help="which parts fit into each call of --minutes")
    parser.add_argument("--minutes", type=float, default=0.0, help="of the whole call; default: all parts")
    parser.add_argument("--archive", type=pathlib.Path, help="pack results and logs into this .tar.gz at the end")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args(argv)
    looks = args.list or args.timetable
    if args.device == "cuda" and not torch.cuda.is_available() and not looks:
        parser.error("no CUDA or ROCm device is visible to torch")
    there = args.device == "cpu" or torch.cuda.is_available()
    args.results = args.out / (measure.device_folder(args.device) if there else "h200")
    args.todo = parts(args.device, args.out, args.results)
    unknown = sorted(set(args.only) - {p.name for p in args.todo})
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(p.name for p in args.todo)}")
    return args


def show(args: argparse.Namespace, commit: str) -> None:
    if args.timetable:
        left = [part for part in args.todo if not finished(part, args.results, commit)]
        for number, call in enumerate(timetable(left, args.minutes or LONGEST / 60), 1):
            names = ", ".join(" with ".join(part.name for part in group) for group in call)
            print(f"call {number}: {sum(map(seconds_of, call))} s: {names}")
        return
    for part in args.todo:
        print(f"{part.name:20}{part.seconds:5} s  {'finished' if finished(part, args.results, commit) else 'to do'}")


def pack(archive: pathlib.Path, results: pathlib.Path) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(results, results.name)
    print(f"packed {results} into {archive}")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    commit, start, failed = measure.commit(), time.monotonic(), []
    if args.list or args.timetable:
        show(args, commit)
        return 0
    chosen = [part for part in args.todo if not args.only or part.name in args.only]
    over = False
    for group in together([part for part in chosen if not finished(part, args.results, commit)]):
        left = 60 * args.minutes - (time.monotonic() - start) if args.minutes else LONGEST
        if left < (LEAST if group[0].takes_minutes else min(seconds_of(group), LONGEST)):
            print(f"the {args.minutes:g} minutes are over; call again for {group[0].name} and what follows")
            over = True
            break
        for part in group:
            print(f"== {part.name}, about {part.seconds} s", flush=True)
        with ThreadPoolExecutor(len(group)) as threads:
            seconds = min(LONGEST, left)
            failed += threads.map(lambda part: do_and_record(part, seconds, args.results, commit), group)  # noqa: B023
    failed = [line for line in failed if line]
    for line in failed:
        print(f"failed: {line}")
    if args.archive:
        pack(args.archive, args.results)
    return 3 if over else int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
