"""Compile what the headline rows need, one process per core: `python -m benchmarks.compile_ahead [LOSS ...]`.

Triton and torch.compile keep what they compile on disk (TRITON_CACHE_DIR, TORCHINDUCTOR_CACHE_DIR), where the timed run
finds it: on 16 cores two minutes, which one process after the other would make twenty of. Nothing here is timed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from typing import NamedTuple

import torch

from benchmarks.harness import measure
from benchmarks.harness.progress import Progress
from benchmarks.harness.session import once
from benchmarks.workloads.items import Item, item_of, items, named
from benchmarks.workloads.providers import providers
from tests.conformance.tools import cast, ops_of

COMPILED = ("fastloss", "torch.compile")
MOST_ROWS = 2**15  # of embeddings: longer ones compile to the same kernels, and many processes share the memory
CALLS = 3  # of fastloss: sizes and addresses of a first call, then the recorded plan, then its replay


class Task(NamedTuple):
    columns: dict  # of an Item
    provider: str


def tasks(losses: list[str], device: str, dtypes: list[str]) -> list[Task]:
    """The longest first: torch.compile's graphs."""
    found = [item for item in items(losses, device, dtypes, headline=True) if ops_of(item.case.name)]
    found = [item for item in found if len(item.shape) != 2 or item.shape[0] <= MOST_ROWS]
    return [Task(item.columns(), name) for name in reversed(COMPILED) for item in found]


def compile_one(task: Task, device: str) -> str:
    """Empty, or why it failed."""
    item: Item = item_of(task.columns)
    dtype = getattr(torch, item.dtype)
    try:
        torch._dynamo.reset()
        function = providers(item.case, item.options, device, [task.provider])[task.provider]
        assert not isinstance(function, str)
        inputs = cast(item.inputs(device), dtype)
        for _ in range(CALLS if task.provider == "fastloss" else 1):
            once(item, function, dtype, inputs, device)
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        return ""
    except Exception as error:
        return f"{task.provider}, {item.name}: {measure.reason(error)}"


def _compile(pair: tuple[Task, str]) -> str:
    return compile_one(*pair)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.compile_ahead", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("losses", nargs="*", metavar="LOSS", help="default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--minutes", type=float, default=9.0, help="after which what is left is left")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.losses) - set(named()))
    if unknown:
        parser.error(f"no benchmark row for {', '.join(unknown)}; there are {', '.join(named())}")
    todo = tasks(args.losses or named(), args.device, args.dtype)
    end, failed, done = time.monotonic() + 60 * args.minutes, [], 0
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")  # of each process
    pool = multiprocessing.get_context("spawn").Pool(min(args.processes, len(todo)))
    with pool, Progress(len(todo)) as progress:
        results = pool.imap_unordered(_compile, [(task, args.device) for task in todo])
        try:
            while done < len(todo):
                why = results.next(timeout=max(0.1, end - time.monotonic()))
                done += 1
                progress.done()
                if why:
                    failed.append(why)
                    progress.say(why)
        except multiprocessing.TimeoutError:
            progress.say(f"the {args.minutes:g} minutes are over")
    print(f"compiled {done} of {len(todo)}, {len(failed)} failed")
    return int(bool(failed))


if __name__ == "__main__":
    measure.prepare_process()
    sys.exit(main())
