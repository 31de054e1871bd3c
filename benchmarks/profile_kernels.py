"""What limits a kernel: one forward and backward of headline rows under Nsight Compute, and what it counted.

`python -m benchmarks.profile_kernels "clip_loss(logit_scale=14.3) 8192x768 bfloat16"`: the rows whose names contain one
of the given texts. Runs itself under `ncu` and prints, for each kernel of fastloss, its time, the shares of the peaks,
the instructions and the registers. The clocks are left alone. Without ncu it says so.
"""

from __future__ import annotations

import argparse
import csv
import io
import pathlib
import shutil
import subprocess
import sys

import torch

from benchmarks.workloads.items import items, named, passes
from tests.conformance.tools import cast, cast_options, to_device

DEFAULT = (
    "clip_loss(logit_scale=14.3) 8192x768 bfloat16", "guide and weight(p=1) 8x3x512x512 float32",
    "ssim=0.2) 8x3x512x512 float32", "lpips_distance() 4x64x256x256",
)  # fmt: skip
WARM = 3  # calls before the one that is looked at
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "InstructionStats", "LaunchStats", "Occupancy")
METRICS = {  # of ncu's pages -> its name here
    "Duration": "us",
    "DRAM Throughput": "DRAM %",
    "L2 Cache Throughput": "L2 %",
    "L1/TEX Cache Throughput": "L1 %",
    "Issue Slots Busy": "issue %",
    "Executed Instructions": "instructions",
    "Registers Per Thread": "registers",
    "Achieved Occupancy": "occupancy %",
}
MICROSECONDS = {"us": 1.0, "usecond": 1.0, "ns": 1e-3, "nsecond": 1e-3, "ms": 1e3, "msecond": 1e3}


def ncu() -> str | None:
    """Where Nsight Compute is: on the PATH, or the newest that CUDA's installer has put beside it."""
    there = sorted(pathlib.Path("/opt/nvidia/nsight-compute").glob("*/ncu"))
    return shutil.which("ncu") or (str(there[-1]) if there else None)


def run_rows(texts: list[str]) -> None:
    """Forward and backward of the rows, the last of each within what the profiler looks at."""
    calls = []
    for item in items(named(), "cuda", ["float32", "bfloat16"], headline=True):
        if not any(text in item.name for text in texts):
            continue
        dtype = getattr(torch, item.dtype)
        options = cast_options(to_device(item.options, "cuda"), dtype)
        forward, backward, _ = passes(item.case, item.case.fn, cast(item.inputs("cuda"), dtype), options)
        for _ in range(WARM):
            backward(forward())
        calls.append((forward, backward))
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    for forward, backward in calls:
        backward(forward())
        torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def table(text: str) -> list[str]:
    """Lines of a table from ncu's CSV, a kernel a line in the order of their launches."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return ["ncu gave no table:", *lines[-5:]]
    kernels: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        found = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"].split("(")[0]})
        name = METRICS.get(row["Metric Name"])
        if name:
            value = float(row["Metric Value"].replace(",", "") or "nan") * MICROSECONDS.get(row["Metric Unit"], 1.0)
            found[name] = f"{value:.1f}" if value < 1000 else f"{value:.3g}"
    heads = list(METRICS.values())
    shown = [" ".join([f"{'kernel':34}", *(f"{head:>13}" for head in heads)])]
    for found in kernels.values():
        shown.append(" ".join([f"{found['kernel']:34}", *(f"{found.get(head, '-'):>13}" for head in heads)]))
    return shown


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.profile_kernels", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("rows", nargs="*", metavar="TEXT", help=f"default: {', '.join(DEFAULT)}")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # this process is the profiled one
    args = parser.parse_args(argv)
    texts = args.rows or list(DEFAULT)
    if args.inside:
        run_rows(texts)
        return 0
    tool = ncu()
    if tool is None:
        print("ncu (Nsight Compute) is not on the PATH: nothing was profiled")
        return 1
    command = [tool, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "details"]
    command += ["-k", "regex:^_", *(word for section in SECTIONS for word in ("--section", section))]
    command += [sys.executable, "-m", "benchmarks.profile_kernels", "--inside", *texts]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    print("\n".join(table(run.stdout)))
    print(run.stderr[-2000:], end="")
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
