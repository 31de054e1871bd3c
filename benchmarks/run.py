"""Time the losses against eager, torch.compile and other libraries, and say what came of it.

`fastloss bench [LOSS ...] [--device cuda] [--dtype float32 bfloat16] [--headline] [--out FOLDER]`. Prints a table and a
sentence for each loss, options, shape and dtype. Only with `--out` does each loss write a CSV,
`<out>/<device>/<loss>.csv`, rewritten whole. A provider that is missing, fails, runs out of memory, or whose value or
gradient is wrong at that very shape has the reason in `note` and no time. How it is measured: benchmarks/METHOD.md.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

import torch

from benchmarks.harness import measure
from benchmarks.harness.memory import Child
from benchmarks.harness.progress import Progress
from benchmarks.harness.results import write
from benchmarks.harness.session import Session, measured
from benchmarks.report.verdict import busy, table_of, verdict
from benchmarks.workloads.items import items, named
from benchmarks.workloads.providers import known
from tests.conformance.tools import ops_of


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fastloss bench", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("losses", nargs="*", metavar="LOSS", help=f"default: all of {', '.join(named())}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", nargs="+", help="default: float32 on the CPU, float32 and bfloat16 on CUDA")
    parser.add_argument("--sizes", nargs="+", default=(), help="shapes (8x3x512x512), or rows, pixels or tokens (4096)")
    parser.add_argument("--providers", nargs="+", help="default: all there are")
    parser.add_argument("--autotune", action="store_true", help="torch.compile max-autotune too: minutes for each row")
    parser.add_argument("--headline", action="store_true", help="the few rows that the README shows")
    parser.add_argument("--seconds", type=float, default=3.0, help="time to spend on each shape and option")
    parser.add_argument("--minutes", type=float, default=0.0, help="of the whole run; the default is 9 for --headline")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; default: torch's")
    parser.add_argument("--out", type=pathlib.Path, help="a folder for the result files; without it none is written")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.losses) - set(named()))
    if unknown:
        parser.error(f"no benchmark row for {', '.join(unknown)}; there are {', '.join(named())}")
    unknown = sorted(set(args.providers or ()) - set(known()))
    if unknown:
        parser.error(f"--providers: no {', '.join(unknown)}; with spaces between them, of {', '.join(known())}")
    args.losses = args.losses or named()
    args.dtype = args.dtype or (["float32", "bfloat16"] if args.device == "cuda" else ["float32"])
    args.minutes = args.minutes or (9.0 if args.headline else 0.0)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    work = [i for i in items(args.losses, args.device, args.dtype, args.headline, args.sizes) if ops_of(i.case.name)]
    if warning := busy():
        print(warning, flush=True)
    common, tops = measure.common_columns(args.device), measure.ceilings(args.device)
    roofs = ", ".join(f"{name} {top:.4g} {'GB/s' if name == 'copy' else 'TFLOP/s'}" for name, top in tops.items())
    print(f"{common['device']}, {common['threads']} threads, commit {common['commit']}; {roofs}", flush=True)
    folder = args.out / measure.device_folder(args.device) if args.out else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ceilings.json").write_text(json.dumps(tops | common, indent=1) + "\n", encoding="utf8")
    written: dict[str, list[dict]] = {}
    said: list[str] = []
    # beside the child, the checks in float64 may take 60 % of what is free
    with Child(int(0.4 * measure.free_mib())) as child, Progress(len(work)) as progress:
        session = Session(args.device, args.seconds, args.providers, child, common, args.autotune)
        for item, rows in measured(work, session, args.minutes, progress):
            said.append(verdict(rows))
            for line in (*table_of(rows), f"  {said[-1]}"):
                progress.say(line)
            written.setdefault(item.case.name, []).extend(rows)
            if folder:  # an interrupted run counts too
                write(folder / f"{item.case.name}.csv", written[item.case.name])
    print("\n".join(["", *said, warning] if warning else ["", *said]))
    where = f"wrote {', '.join(f'{name}.csv' for name in written)} to {folder}"
    print(where if folder else "no file written; --out FOLDER keeps the rows")
    return 0


def command(argv: list[str]) -> None:
    """The process of `fastloss bench`."""
    measure.prepare_process()
    sys.exit(main(argv))


if __name__ == "__main__":
    command(sys.argv[1:])
