"""A guard against regressions: `python -m benchmarks.check` (`make bench-check`).

Runs the headline rows again and compares ratios, fastloss to eager and to torch.compile, with those of the committed
results: a busy machine changes times, hardly their ratio. Another processor changes the ratios too, and that is said
first; there, measure the older commit with `python -m benchmarks.run --headline --out FOLDER` and compare with it:
`--before FOLDER`. A row got worse if its ratio to every baseline
grew by more than 15 %: where only one did, that baseline became faster (eager was seen at half its time of another
run). What got worse is measured a second time, each loss in a process of its own, for what ran before may slow all
that comes after; a row that is worse again is named, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable

import torch

from benchmarks.harness import measure
from benchmarks.harness.results import RESULTS, read_all
from benchmarks.report.tables import Key, grouped, label, time_of
from benchmarks.workloads.items import named

WORSE = 0.15
BASELINES = ("eager", "torch.compile")
Ratios = dict[Key, dict[str, float]]


def ratios(rows: Iterable[dict[str, str]]) -> Ratios:
    """row -> baseline -> fastloss's median over the baseline's, forward plus backward."""
    found: Ratios = {}
    for key, group in grouped(r for r in rows if r["mode"] == "both").items():
        ours = time_of(group["fastloss"])
        for baseline in BASELINES:
            theirs = time_of(group.get(baseline))
            if ours and theirs:
                found.setdefault(key, {})[baseline] = ours / theirs
    return found


def other_processor(rows: Iterable[dict[str, str]], device: str) -> str:
    """A warning where the committed rows are of another processor than this one, else nothing."""
    committed, here = {row["device"] for row in rows} - {""}, measure.device_label(device)
    if committed <= {here}:
        return ""
    return (
        f"warning: the results are of {', '.join(sorted(committed))}, this is {here}: ratios differ between "
        "processors; --before FOLDER compares with results of an older commit on this one"
    )


def growth(before: Ratios, now: Ratios) -> dict[Key, dict[str, float]]:
    """row -> baseline -> by how much the ratio grew, for what is in both."""
    common = {key: before[key].keys() & now[key].keys() for key in before if key in now}
    return {key: {b: now[key][b] / before[key][b] - 1 for b in sorted(names)} for key, names in common.items() if names}


def worse(grown: dict[Key, dict[str, float]]) -> dict[Key, float]:
    """By how much each row got worse: by the least of what its ratios grew, where that is more than 15 %."""
    least = {key: min(by.values()) for key, by in grown.items()}
    return {key: by for key, by in least.items() if by > WORSE}


def measured(losses: list[str], device: str, minutes: float) -> Ratios:
    """The ratios of these losses now, from a process of its own."""
    with tempfile.TemporaryDirectory() as out:
        options = ["--headline", "--device", device, "--minutes", f"{minutes:g}", "--out", out]
        command = [sys.executable, "-m", "benchmarks.run", *losses, *options, "--providers", *BASELINES, "fastloss"]
        subprocess.run(command, cwd=measure.ROOT, check=True)
        return ratios(read_all(pathlib.Path(out) / measure.device_folder(device)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.check", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("losses", nargs="*", metavar="LOSS", help="default: all that have committed results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--minutes", type=float, default=9, help="of the first round; the second takes less")
    parser.add_argument("--before", type=pathlib.Path, default=RESULTS, help="folder of the results to compare with")
    args = parser.parse_args(argv)
    folder = args.before / measure.device_folder(args.device)
    rows = read_all(folder)
    committed = ratios(rows)
    losses = [n for n in named() if n in {key[0] for key in committed} and n in (args.losses or named())]
    before = {key: found for key, found in committed.items() if key[0] in losses}
    if not before:
        print(f"no committed results of these losses in {folder}: nothing to compare with")
        return 2
    if warning := other_processor(rows, args.device):
        print(warning, flush=True)
    grown = growth(before, measured(losses, args.device, args.minutes))
    for key, baseline in ((key, baseline) for key, found in before.items() for baseline in found):
        if baseline not in grown.get(key, ()):
            print(f"not compared: {label(key)} against {baseline} has no time now")
    bad = worse(grown)
    for loss in sorted({key[0] for key in bad}):
        share = args.minutes / len(losses)
        again = growth(before, measured([loss], args.device, max(share, 1)))
        grown |= {key: by for key, by in again.items() if key in bad}
    bad = worse(grown)
    for key, by in sorted(grown.items()):
        for baseline, one in by.items():
            if key in bad:
                print(f"worse by {one:.0%} against {baseline}: {label(key)}")
            elif one > WORSE:
                print(f"{baseline} became faster by {one:.0%}, fastloss did not get worse: {label(key)}")
    print(f"{len(grown)} rows compared, {len(bad)} worse by more than {WORSE:.0%} in both of two runs")
    return int(bool(bad))


if __name__ == "__main__":
    measure.prepare_process()
    sys.exit(main())
