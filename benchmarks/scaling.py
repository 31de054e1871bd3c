"""How cost grows with size: `python -m benchmarks.scaling [LOSS ...] [--sizes 256 1024] [--threads 1 2]`.

Rows of embeddings double from 256, images and features go from 32 x 32 to 1024 x 1024, attention maps over the same
numbers of tokens. Each provider goes on until it runs out of memory (on the CPU: of `--limit-mib`) or a forward and
backward takes longer than `--slowest`; what stopped it stands in its row. `results/<device>/scaling/<loss>.csv` has the
columns of the other results. `--more` keeps the rows that are there and goes on where the time of the run before ended.
"""

from __future__ import annotations

import argparse
import gc
import pathlib
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks.harness import measure
from benchmarks.harness.memory import Child
from benchmarks.harness.progress import Progress
from benchmarks.harness.results import RESULTS, read, write
from benchmarks.harness.session import Session, measure_item, show
from benchmarks.workloads.items import Item, items, named, shape_text, sized, sweep
from benchmarks.workloads.providers import providers
from tests.conformance.tools import ops_of


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.scaling", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("losses", nargs="*", metavar="LOSS", help=f"default: all of {', '.join(named())}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", help="default: float32 on the CPU, bfloat16 on CUDA")
    parser.add_argument("--sizes", nargs="+", type=int, help="default: 256 to 262144 rows, 32 to 1024 pixels")
    parser.add_argument("--providers", nargs="+", help="default: all there are")
    parser.add_argument("--threads", nargs="+", type=int, help="of the CPU; default: 1 and torch's")
    parser.add_argument("--seconds", type=float, default=0.5, help="time to spend on each size")
    parser.add_argument("--minutes", type=float, default=60.0, help="of the whole run, shared between the losses")
    parser.add_argument("--slowest", type=float, default=3.0, help="seconds of one pass that end a provider's sweep")
    parser.add_argument("--limit-mib", type=int, default=4096, help="memory a provider may take on the CPU")
    parser.add_argument("--more", action="store_true", help="go on from the sizes that the result files have")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args(argv)
    unknown = sorted(set(args.losses) - set(named()))
    if unknown:
        parser.error(f"no benchmark row for {', '.join(unknown)}; there are {', '.join(named())}")
    args.losses = args.losses or named()
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.threads = args.threads or (sorted({1, torch.get_num_threads()}) if args.device == "cpu" else [0])
    return args


class Sweep:
    """One loss over its sizes, with those who have dropped out and why."""

    def __init__(self, item: Item, args: argparse.Namespace, session: Session) -> None:
        self.item, self.args, self.session = item, args, session
        self.left_out: dict[str, str] = {}

    def at(self, n: int) -> list[dict]:
        item = Item(self.item.case, self.item.options, sized(self.item.shape, n), self.item.dtype)
        # the child goes first: what does not fit there is not tried in this process
        if self.session.device == "cpu" and self.session.child:
            names = providers(item.case, item.options, "cpu", self.session.asked)
            for name in names:
                if name not in self.left_out and not isinstance(names[name], str):
                    why = self.session.child.peak(item.columns(), name)[1]
                    if "memory" in why:
                        self.left_out[name] = f"out of memory at {n}: more than {self.args.limit_mib} MiB"
        # what this process cannot have is an exception, not the end of it; the child needs memory as well
        with measure.address_limit(0.4 * measure.free_mib() if self.session.device == "cpu" else 0):
            rows = measure_item(item, self.session, self.left_out)
        for row in rows:
            name, note = row["provider"], row["note"]
            if note.startswith("out of memory") and name not in self.left_out:
                self.left_out[name] = f"out of memory at {n}"
            self.leave_out_if_slow(row, n)
        return rows

    def leave_out_if_slow(self, row: dict, n: int) -> None:
        if row["mode"] == "both" and row.get("p50_ms") and float(row["p50_ms"]) > 1e3 * self.args.slowest:
            self.left_out[row["provider"]] = f"slower than {self.args.slowest:g} s from {n} on"

    def resume(self, rows: list[dict], sizes: Sequence[int]) -> tuple[list[dict], list[int]]:
        """(rows of the largest size that an earlier run has, sizes left), with those left out who dropped out then."""
        threads, found, left = str(self.session.common["threads"]), [], []
        for n in sizes:
            shape = shape_text(sized(self.item.shape, n))
            own = [r for r in rows if r["threads"] == threads and r["shape"] == shape and r["dtype"] == self.item.dtype]
            found, left = (own, left) if own else (found, [*left, n])
            for r in own:
                self.leave_out_if_slow(r, n)
                if r["note"].startswith("no time for"):
                    r["note"] = ""
                elif r["note"] and not r["note"].startswith("slower"):  # a larger --slowest may be given now
                    self.left_out[r["provider"]] = r["note"]
        return found, left

    def stop(self, rows: list[dict], n: int) -> None:
        """Says in the last rows of those who would have gone on that there was no time for n."""
        for r in rows:
            if r["mode"] == "both" and r["provider"] not in self.left_out and not r.get("note"):
                r["note"] = f"no time for {n}"

    def over(self, rows: list[dict]) -> bool:
        """Nobody is left to go on; a size too small for the loss itself, which has a row of `all`, ends nothing."""
        if any(r["provider"] == "all" and not r["note"].startswith("out of memory") for r in rows):
            return False
        return not any(r.get("p50_ms") and r["provider"] not in self.left_out for r in rows)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    chosen = [i for i in items(args.losses, args.device, [args.dtype], headline=True) if ops_of(i.case.name)]
    work = list({i.case.name: i for i in reversed(chosen)}.values())[::-1]  # the first row of each loss
    folder = args.out / measure.device_folder(args.device) / "scaling"
    start, before = time.monotonic(), torch.get_num_threads()
    sessions = []
    for threads in args.threads:
        torch.set_num_threads(threads or before)
        common = measure.common_columns(args.device)
        sessions.append(Session(args.device, args.seconds, args.providers, None, common))
    with Child(args.limit_mib) as child, Progress(len(work) * len(sessions)) as progress:
        for done, item in enumerate(work):
            path = folder / f"{item.case.name}.csv"
            rows: list[dict] = list(read(path)) if args.more and path.exists() else []
            end = start + 60 * args.minutes * (done + 1) / len(work)  # what one loss does not use the next ones have
            for i, session in enumerate(sessions):
                torch.set_num_threads(args.threads[i] or before)
                session.child = child if i == len(sessions) - 1 else None  # memory once: threads do not change it
                sweep_of = Sweep(item, args, session)
                progress.start(f"{item.case.name}, {session.common['threads']} threads")
                part = time.monotonic() + (end - time.monotonic()) / (len(sessions) - i)
                found, sizes = sweep_of.resume(rows, args.sizes or sweep(item.shape))
                for n in [] if found and sweep_of.over(found) else sizes:
                    if time.monotonic() > part:
                        progress.say(f"  the time of this loss is over before {n}")
                        sweep_of.stop(found, n)
                        write(path, rows)
                        break
                    found = sweep_of.at(n)
                    show([r for r in found if r["mode"] == "both"], progress.say)
                    rows += found
                    write(path, rows)
                    gc.collect()
                    if sweep_of.over(found):
                        break
                progress.done()
    torch.set_num_threads(before)
    print(f"wrote {', '.join(i.case.name + '.csv' for i in work)} to {folder}")
    return 0


if __name__ == "__main__":
    measure.prepare_process()
    sys.exit(main())
