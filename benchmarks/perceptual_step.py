"""The whole perceptual step, network included: `python -m benchmarks.perceptual_step [--device cuda] [--shape ...]`.

Loss and gradient of the predicted images, VGG16 with the same random weights for everybody. `l1` on the taps of the
first three blocks, `lpips` on its five. Who computes it, besides fastloss:

    eager          the article's own code, vgg16.features as it comes: unfrozen, so the backward makes gradients of the
                   weights too; both images with a graph, all features kept
    basicsr-style  frozen, target without a graph, every tap cloned because the next ReLU is in-place
    piq-style      frozen, target with a graph, mean absolute difference over the pixels, sum over the channels
    torch.compile  frozen, target without a graph, compiled as a whole
    lpips          the lpips package

Rows with an `execution` among their options are fastloss with that `Execution`. On CUDA everybody runs under autocast
to bfloat16. Values must agree with those of the first (piq's formula is another) before a time is kept.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

import torch

from benchmarks.harness import measure
from benchmarks.harness.memory import Child
from benchmarks.harness.results import RESULTS, read, write
from benchmarks.workloads.items import options_text
from benchmarks.workloads.perceptual_step import TAPS, step_of, who

SHAPES = {"cpu": "4x3x128x128", "cuda": "16x3x256x256"}
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def criterion_of(row: dict) -> str:
    return json.loads(row["options"])["criterion"]


def measure_criterion(criterion: str, shape: str, device: str, seconds: float, child: Child) -> list[dict]:
    dtype = "float32" if device == "cpu" else "bfloat16"
    rows: list[dict] = []
    calls: dict[str, measure.Pass] = {}
    truth = None
    for options, provider in who(criterion, device):
        row = dict(loss="perceptual_step", options=options_text(options), shape=shape, dtype=dtype, mode="step",
                   provider=provider, headline=int("execution" not in options), checked=who(criterion, device)[0][1],
                   note="")  # fmt: skip
        rows.append(row)
        try:
            step, value = step_of(row, device)
            got = value()
        except ImportError as error:
            row["note"] = f"absent: {error}"
            continue
        except Exception as error:
            row["note"] = measure.reason(error)
            continue
        truth = got if truth is None else truth
        if provider != "piq-style":
            error = abs(got / truth - 1)
            row["error"] = f"{error:.1e}"
            if error > TOLERANCE[dtype]:
                row["note"] = f"wrong: relative error {error:.1e}"
                continue
        calls[row["options"] + provider] = (step, lambda out: None)
    times, failed = measure.interleaved(calls, measure.Clock(device, ahead=False), seconds, least=5)
    for row in rows:
        name = row["options"] + row["provider"]
        if name in failed:
            row["note"] = measure.reason(failed[name])
        if name in times:
            p20, p50, p80 = measure.quantiles([forward for forward, _ in times[name]])
            row |= dict(p20_ms=f"{p20:.4f}", p50_ms=f"{p50:.4f}", p80_ms=f"{p80:.4f}")
            if device == "cuda":
                row["peak_mib"] = f"{measure.peak_mib(calls[name][0], device):.1f}"
            else:
                row["peak_mib"] = child.peak(row, row["provider"])[0]
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.perceptual_step", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shape", help="of the images, such as 4x3x128x128")
    parser.add_argument("--seconds", type=float, default=6.0, help="time to spend on each criterion")
    parser.add_argument("--criteria", nargs="+", default=list(TAPS), choices=list(TAPS))
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args(argv)
    common = measure.common_columns(args.device)
    path = args.out / measure.device_folder(args.device) / "perceptual_step.csv"
    rows: list[dict] = []
    if path.exists():  # rows of the other criteria stay
        rows += [r for r in read(path) if criterion_of(r) not in args.criteria]
    with Child() as child:
        for criterion in args.criteria:
            shape = args.shape or SHAPES[args.device]
            for row in measure_criterion(criterion, shape, args.device, args.seconds, child):
                figures = f"{row['p50_ms']} ms, {row['peak_mib'] or '-'} MiB" if row.get("p50_ms") else row["note"]
                print(f"  {row['provider']:16}{row['options']:64}{figures}", flush=True)
                rows.append(row | common)
            write(path, sorted(rows, key=lambda r: list(TAPS).index(criterion_of(r))))
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    measure.prepare_process()
    sys.exit(main())
