"""How exact value and gradient are: `python -m benchmarks.accuracy [LOSS ...] [--dtype bfloat16] [--more]`.

Every loss, on inputs as training has them (workloads/states.py), in every dtype, by every provider, against eager
PyTorch in float64 of the same inputs; harness/errors.py says what an error is. Errors hardly depend on the load of a
machine, so it may be busy. Each loss writes `benchmarks/results/<device>/accuracy/<loss>.csv`, and `--more` keeps the
losses whose file is whole.
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

DTYPES = ("float32", "bfloat16", "float16")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.accuracy", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("losses", nargs="*", metavar="LOSS", help=f"default: all of {', '.join(TABLE)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--providers", nargs="+", help="default: all there are")
    parser.add_argument("--more", action="store_true", help="keep the losses that have every state and dtype already")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the command")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args(argv)
    unknown = sorted(set(args.losses) - set(TABLE))
    if unknown:
        parser.error(f"no states for {', '.join(unknown)}; there are {', '.join(TABLE)}")
    args.losses = args.losses or list(TABLE)
    return args


def whole(path: pathlib.Path, wanted: set[tuple]) -> bool:
    """The file has all of these (state, options, dtype)."""
    return path.exists() and wanted <= {(r["inputs"], r["options"], r["dtype"]) for r in read(path, ERROR_COLUMNS)}


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    common = measure.common_columns(args.device)
    folder = args.out / measure.device_folder(args.device) / "accuracy"
    work: dict[str, list] = {}
    for loss in args.losses:
        own = states([loss], args.small)
        wanted = {(s.name, errors.options_text(s.options), dtype) for s in own for dtype in args.dtype}
        if not (args.more and whole(folder / f"{loss}.csv", wanted)):
            work[loss] = [(block, dtype) for dtype in args.dtype for block in errors.blocks(own)]
    with Progress(sum(map(len, work.values()))) as progress:
        for loss, parts in work.items():
            rows = []
            for block, dtype in parts:
                progress.start(f"{loss} {errors.options_text(block[0].options)} {dtype}")
                for row in errors.measured(block, dtype, args.device, args.providers):
                    rows.append(row | common)
                    figures = f"{row.get('value_error', ''):>10}{row.get('gradient_error', ''):>10}"
                    progress.say(f"  {row['inputs']:12}{row['provider']:26}{figures} {row.get('note', '')}")
                progress.done()
            write(folder / f"{loss}.csv", rows, ERROR_COLUMNS)
    print(f"wrote {', '.join(f'{loss}.csv' for loss in work) or 'nothing'} to {folder}")
    return 0


if __name__ == "__main__":
    measure.prepare_process()
    sys.exit(main())
