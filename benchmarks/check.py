"""A guard against regressions: `python -m benchmarks.check` (`make bench-check`).

Runs the headline rows again and compares ratios, fastloss to eager and to torch.compile, with those of the committed
results: another machine or a busy one changes times, hardly their ratio. What got worse by more than 15 % is measured a
second time, and named if it is worse again; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile
from collections.abc import Iterable

import torch

from benchmarks import measure, run
from benchmarks.rows import RESULTS, named, read_all
from benchmarks.tables import grouped, label, time_of

WORSE = 0.15
Ratios = dict[tuple, float]


def ratios(rows: Iterable[dict[str, str]]) -> Ratios:
    """(row, baseline) -> fastloss's median over the baseline's, forward plus backward."""
    found: Ratios = {}
    for key, group in grouped(r for r in rows if r["mode"] == "both").items():
        ours = time_of(group["fastloss"])
        for baseline in ("eager", "torch.compile"):
            theirs = time_of(group.get(baseline))
            if ours and theirs:
                found[key, baseline] = ours / theirs
    return found


def worse(before: Ratios, now: Ratios) -> dict[tuple, float]:
    """By how much each ratio that is in both got worse, where that is more than 15 %."""
    growth = {key: now[key] / before[key] - 1 for key in before.keys() & now.keys()}
    return {key: by for key, by in growth.items() if by > WORSE}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.check", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("losses", nargs="*", metavar="LOSS", help="default: all that have committed results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--minutes", default="9", help="of the first round; the second takes less")
    args = parser.parse_args(argv)
    folder = measure.device_folder(args.device)
    before = ratios(read_all(RESULTS / folder))
    losses = [n for n in named() if n in {key[0][0] for key in before} and n in (args.losses or named())]
    if not losses:
        print(f"no committed results of these losses in {RESULTS / folder}: nothing to compare with")
        return 2
    bad: dict[tuple, float] = {}
    for again in (False, True):
        with tempfile.TemporaryDirectory() as out:
            options = ["--headline", "--device", args.device, "--minutes", args.minutes, "--out", out]
            run.main([*losses, *options, "--providers", "eager", "torch.compile", "fastloss"])
            now = ratios(read_all(pathlib.Path(out) / folder))
        found = worse(before, now)
        bad = {key: min(by, bad[key]) for key, by in found.items() if key in bad} if again else found
        if not again:
            missing = [key for key in before if key[0][0] in losses and key not in now]
            for key, baseline in missing:
                print(f"not compared: {label(key)} against {baseline} has no time now")
        losses = sorted({key[0][0] for key in bad})
        if not losses:
            break
    for (key, baseline), by in sorted(bad.items()):
        print(f"worse by {by:.0%} against {baseline}: {label(key)}")
    print(f"{len(before)} committed ratios, {len(bad)} worse by more than {WORSE:.0%} in both of two runs")
    return int(bool(bad))


if __name__ == "__main__":
    measure.prepare_process()
    sys.exit(main())
