"""Many drawn calls in processes of their own, so that a crash or a hang is one call's failure and not the run's end."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from tqdm import tqdm

from tests.fuzz.targets import SPECIAL

Case = tuple[str, int, str | None]  # a loss, a seed, and the mode if it is not drawn
COMPILED = 10  # times the limit of other calls
BATCH = 200


@dataclasses.dataclass
class Found:
    """A failure as it comes out of a process: plain text."""

    name: str
    seed: int
    kind: str
    what: str
    figures: str
    code: str

    @property
    def replay(self) -> str:
        return f"{self.name}:{self.seed}" + (":compile" if self.kind.startswith("compiled") else "")


@dataclasses.dataclass
class Totals:
    """What a run has seen."""

    calls: int = 0
    seconds: float = 0.0
    failures: list[Found] = dataclasses.field(default_factory=list)
    refused: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    drawn: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def groups(self) -> dict[tuple[str, str, str], list[Found]]:
        found: dict[tuple[str, str, str], list[Found]] = collections.defaultdict(list)
        for one in self.failures:
            found[one.name, one.kind, one.what].append(one)
        return dict(sorted(found.items(), key=lambda pair: (pair[0][0], -len(pair[1]))))


def judged(case: Case, shrinks: bool = True) -> tuple[Found | None, str | None]:
    """(the failure of one case, the message of a documented refusal)."""
    from tests.fuzz.draw import draw
    from tests.fuzz.judge import Failure, judge
    from tests.fuzz.shrink import shrunk

    name, seed, mode = case
    call = draw(name, seed, mode)
    found = judge(call)
    if not isinstance(found, Failure):
        return None, found
    told = ""
    if shrinks:
        simpler = shrunk(call, found)
        again = judge(simpler) if simpler is not call else found
        told = again.figures if isinstance(again, Failure) else ""
        call = simpler
    kind, what = found.group
    kind = f"compiled: {kind}" if mode == "compile" else kind
    return Found(name, seed, kind, what, told or found.figures, call.code()), None


def _work(pipe: Connection) -> None:
    """A process: takes batches of cases, tells which one it begins, and what came out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.environ.get("TRITON_INTERPRET") == "1":
        import tests.triton.interpreter  # noqa: F401 patches Triton's interpreter
    from tests.fuzz import judge  # noqa: F401 before the first call is timed

    shrunk_groups: set = set()
    while (batch := pipe.recv()) is not None:
        for case in batch:
            pipe.send(("begins",))
            found, refused = judged(case, shrinks=False)
            if found is not None and (group := (found.name, found.kind, found.what)) not in shrunk_groups:
                shrunk_groups.add(group)
                found, _ = judged(case)  # again, and simpler
            pipe.send(("ends", case, found, refused))
        pipe.send(("idle",))


@dataclasses.dataclass
class Worker:
    """A process, the cases it has still to do, and since when it has been at the first."""

    pipe: Connection
    process: Any
    left: collections.deque
    since: float | None = None  # None: it is starting, which takes longer than a call

    @classmethod
    def start(cls) -> Worker:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there,), daemon=True)
        process.start()
        there.close()
        return cls(here, process, collections.deque())

    def give(self, batch: list[Case]) -> None:
        self.left, self.since = collections.deque(batch), None
        self.pipe.send(batch)

    def limit(self, timeout: float) -> float:
        """Seconds that the case may take: the compiler makes several graphs of a compiled one."""
        return timeout * (COMPILED if self.left and self.left[0][2] == "compile" else 1)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def cases(names: list[str], calls: int, seed: int, compiled: float) -> Iterator[Case]:
    """The losses in turn, seeds from `seed` on; a share of the calls of functions compiled: modules are built outside
    of a graph, and :func:`loss_and_grads` holds a backward."""
    every = round(1 / compiled) if compiled else 0
    for i in range(calls):
        chosen = every and (i + 1) % every == 0 and names[i % len(names)] not in SPECIAL
        mode = "compile" if chosen else None
        yield names[i % len(names)], seed + i // len(names), mode


def run(
    todo: Iterator[Case], total: int, processes: int, timeout: float, seconds: float | None, quiet: bool = False
) -> Totals:
    """All cases, or as many as fit into `seconds`."""
    totals, began = Totals(), time.monotonic()
    batch_size = max(1, min(BATCH, total // (4 * processes)))
    workers = [Worker.start() for _ in range(processes)]
    bar = tqdm(total=total, unit="call", disable=quiet, smoothing=0.05)

    def batch() -> list[Case]:
        late = seconds is not None and time.monotonic() - began > seconds
        return [] if late else list(itertools.islice(todo, batch_size))

    def refill(worker: Worker) -> bool:
        rest = list(worker.left) or batch()
        if rest:
            worker.give(rest)
        return bool(rest)

    busy = [worker for worker in workers if refill(worker)]
    try:
        while busy:
            ready = wait([worker.pipe for worker in busy], timeout=0.5)
            for worker in list(busy):
                if worker.pipe in ready:
                    end = _receive(worker, totals, bar)
                else:
                    end = "hang" if worker.since and time.monotonic() - worker.since > worker.limit(timeout) else None
                if end in ("crash", "hang"):
                    _lost(worker, end, totals, timeout)
                    worker.stop()
                    fresh = Worker.start()
                    fresh.left = worker.left
                    busy[busy.index(worker)] = fresh
                    worker = fresh
                if end and not refill(worker):
                    busy.remove(worker)
                    worker.stop()
    finally:
        for worker in busy:
            worker.stop()
        bar.close()
    totals.seconds = time.monotonic() - began
    return totals


def _receive(worker: Worker, totals: Totals, bar: Any) -> str | None:
    """Takes one message; "idle" at the end of a batch, "crash" when the process is gone."""
    try:
        message = worker.pipe.recv()
    except (EOFError, OSError):
        return "crash" if worker.left else "idle"
    worker.since = None if message[0] == "idle" else time.monotonic()
    if message[0] == "idle":
        return "idle"
    if message[0] == "ends":
        _, case, found, refused = message
        worker.left.popleft()
        totals.calls += 1
        totals.drawn[case[0]] += 1
        if found is not None:
            totals.failures.append(found)
            bar.set_postfix(failures=len(totals.failures), kinds=len(totals.groups()))
        if refused:
            totals.refused[case[0]] += 1
        bar.update()
    return None


def _lost(worker: Worker, end: str, totals: Totals, timeout: float) -> None:
    """The case that ended its process, or did not end."""
    from tests.fuzz.draw import draw

    worker.process.join(5)
    name, seed, mode = worker.left.popleft()
    limit = timeout * (COMPILED if mode == "compile" else 1)
    told = f"exit code {worker.process.exitcode}" if end == "crash" else f"longer than {limit:g} s"
    totals.calls += 1
    totals.failures.append(Found(name, seed, end, told, "", draw(name, seed, mode).code()))


def report(totals: Totals) -> str:
    """The failures in groups, each with how often, the seeds to replay, and the first as code."""
    lines = []
    for (name, kind, what), found in totals.groups().items():
        seeds = ", ".join(one.replay for one in found[:5])
        lines += [f"\n{name}: {kind}: {what}", f"    {len(found)} calls: {seeds}"]
        lines += [f"    {found[0].figures}"] if found[0].figures else []
        lines += [f"    {line}" for line in found[0].code.split("\n")[:1] + found[0].code.split("\n")[5:]]
    rate = totals.calls / max(totals.seconds, 1e-9)
    refused = sum(totals.refused.values())
    lines.append(
        f"\n{totals.calls} calls of {len(totals.drawn)} losses in {totals.seconds:.0f} s ({rate:.0f} a second), "
        f"{refused} refused as documented, {len(totals.failures)} failures of {len(totals.groups())} kinds"
    )
    return "\n".join(lines).strip("\n")
