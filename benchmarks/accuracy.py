"""How exact value and gradient are: `python -m benchmarks.accuracy [LOSS ...] [--dtype bfloat16] [--more]`.

Every loss, on inputs as training has them (workloads/states.py), in every dtype, by every provider, against eager
PyTorch in float64 of the same inputs; harness/errors.py says what an error is. Errors hardly depend on the load of a
machine, so it may be busy. Each loss has its rows in `benchmarks/results/<device>/accuracy/<loss>.csv`, written as they
come. `--more` keeps those that are there and goes on where an interrupted run ended.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import torch

from benchmarks.harness import errors, measure
from benchmarks.harness.progress import Progress
from benchmarks.harness.results import ERROR_COLUMNS, RESULTS, read, write
from benchmarks.workloads.states import TABLE, states

DTYPES = ("bfloat16", "float32", "float16")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.accuracy", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("losses", nargs="*", metavar="LOSS", help=f"default: all of {', '.join(TABLE)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--providers", nargs="+", help="default: all there are")
    parser.add_argument("--more", action="store_true", help="go on from the rows that are there, of whatever commit")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the command")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args(argv)
    unknown = sorted(set(args.losses) - set(TABLE))
    if unknown:
        parser.error(f"no states for {', '.join(unknown)}; there are {', '.join(TABLE)}")
    args.losses = args.losses or list(TABLE)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    common = measure.common_columns(args.device)
    folder = args.out / measure.device_folder(args.device) / "accuracy"
    paths = {loss: folder / f"{loss}.csv" for loss in args.losses}
    rows = {loss: read(path, ERROR_COLUMNS) if path.exists() else [] for loss, path in paths.items()}
    if not args.more:  # the rows of other dtypes stay
        rows = {loss: [r for r in found if r["dtype"] not in args.dtype] for loss, found in rows.items()}
    there = {errors.key_of(r) for found in rows.values() for r in found}
    work = [(block, dtype) for dtype in args.dtype for block in errors.blocks(states(args.losses, args.small))]
    with Progress(len(work)) as progress:
        for block, dtype in work:
            loss = block[0].case.name
            progress.start(f"{loss} {block[0].columns()['options']} {dtype}")
            for row in errors.measured(block, dtype, args.device, args.providers, there):
                rows[loss].append(row | common)
                figures = f"{row.get('value_error', ''):>10}{row.get('gradient_error', ''):>10}"
                progress.say(f"  {row['inputs']:12}{row['provider']:26}{figures} {row.get('note', '')}")
            write(paths[loss], rows[loss], ERROR_COLUMNS)
            progress.done()
    print(f"wrote {', '.join(path.name for path in paths.values())} to {folder}")
    return 0


if __name__ == "__main__":
    measure.prepare_process()
    sys.exit(main())
