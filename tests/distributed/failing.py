"""Groups of three ranks, one of whose ranks dies or stops: `python -m tests.distributed.failing FOLDER`.

Plain processes, forked after the imports, which take longer than all else; torchrun would kill the survivors before
they can say anything. Each rank of the first group leaves FOLDER/RANK.said (what the mismatches raised), each of all of
them FOLDER/NAME.txt (its output) and FOLDER/NAME.seconds (how long after the failure it raised); FOLDER/codes has the
exit codes, FOLDER/exits when each was gone.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastloss import Exchange, clip_loss, info_nce, nt_xent_loss, siglip_loss, supcon_loss
from fastloss.distributed import walks
from tests.distributed.cases import STRATEGIES

WORLD, TIMEOUT_S, LAST = 3, 3, 2
SMALL = 5e-4  # MiB, of chunks of one row of each rank


class Failure(NamedTuple):
    """What the last rank of a group does to itself, and how the group exchanges its rows."""

    how: signal.Signals
    strategy: str

    def of(self, rank: int) -> str:
        return f"{self.how.name} {self.strategy} {rank}"

    def prepare(self) -> None:
        """A gather fails before its call; the others in the midst of it, as the second piece is on its way."""
        if self.strategy == "gather":
            os.kill(os.getpid(), self.how)
        name, count = {"chunked": "all_gather", "ring": "send_and_receive"}[self.strategy], [0]
        plain = getattr(walks, name)

        def failing(*args: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == 2:
                os.kill(os.getpid(), self.how)
            return plain(*args, **options)

        setattr(walks, name, failing)


FAILURES = [Failure(how, strategy) for strategy in STRATEGIES for how in (signal.SIGKILL, signal.SIGSTOP)]

LOSSES: dict[str, Callable[..., Tensor]] = {
    "info_nce": lambda x, **o: info_nce(x, x, **o),
    "clip_loss": lambda x, **o: clip_loss(x, x, logit_scale=3.0, **o),
    "siglip_loss": lambda x, **o: siglip_loss(x, x, logit_scale=3.0, logit_bias=-1.0, **o),
    "nt_xent_loss": lambda x, **o: nt_xent_loss(x, x, **o),
    "supcon_loss": lambda x, **o: supcon_loss(x, torch.zeros(len(x), dtype=torch.int64), **o),
}


def mismatches(rank: int) -> dict[str, Any]:
    """[what was raised, seconds] of each loss and strategy where the last rank has another D, dtype, number of rows,
    option or strategy, or an argument that it refuses by itself."""
    plain = torch.randn(4, 8)
    odd = {
        "width": {"x": plain[:, :6]},
        "dtype": {"x": plain.double()},
        "rows": {"x": plain[:3]},
        "no rows": {"x": plain[:0]},
        "option": {"reduction": "sum"},
        "refused": {"x": plain[0]},
    }
    said: dict[str, Any] = {}
    for strategy, other in zip(STRATEGIES, STRATEGIES[1:] + STRATEGIES[:1], strict=True):
        odd["strategy"] = {"exchange": Exchange(strategy=other, mib=SMALL)}
        for name, loss in LOSSES.items():
            for kind, differs in odd.items():
                options = {"x": plain, "exchange": Exchange(strategy=strategy, mib=SMALL)}
                options |= differs if rank == LAST else {}
                began = time.monotonic()
                try:
                    text = f"loss {loss(**options, group=dist.group.WORLD)}"
                except Exception as error:
                    text = f"{type(error).__name__}: {error}"
                said[f"{name}, {strategy}, {kind}"] = [text, time.monotonic() - began]
    return said


def one_rank(rank: int, failure: Failure, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else ""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store of {failure.of(0)}"), WORLD)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timeout)
    if failure == FAILURES[0]:
        (folder / f"{rank}.said").write_text(json.dumps(mismatches(rank)))
    exchange, x = Exchange(strategy=failure.strategy, mib=SMALL), torch.randn(4, 8).requires_grad_()
    LOSSES["clip_loss"](x, group=dist.group.WORLD, exchange=exchange).backward()  # takes longer, the first time
    group = dist.new_group(timeout=datetime.timedelta(seconds=TIMEOUT_S))
    dist.barrier()
    name = failure.of(rank)
    (folder / f"{name}.ready").touch()
    while not (folder / "go").exists():  # when all are ready: a start takes the time of those that are to end
        time.sleep(0.05)
    if rank == LAST:
        failure.prepare()
    began = time.monotonic()
    (folder / f"{name}.began").write_text(f"{began}")
    try:
        LOSSES["clip_loss"](x, group=group, exchange=exchange).backward()
    finally:
        (folder / f"{name}.seconds").write_text(f"{time.monotonic() - began}")


def forked(rank: int, failure: Failure, folder: Path) -> int:
    """The process id of the rank."""
    child = os.fork()
    if child:
        return child
    code = 0
    out = os.open(folder / f"{failure.of(rank)}.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(out, 1), os.dup2(out, 2)
    try:
        one_rank(rank, failure, folder)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    if rank:  # one rank of each group ends as a process does, its group with what is on its way in it
        os._exit(code)
    sys.exit(code)


def main(folder: Path) -> None:
    gc.freeze()  # else a child's last collection copies the pages of all modules: seconds on a busy machine
    ranks = {forked(rank, failure, folder): (failure, rank) for failure in FAILURES for rank in range(WORLD)}
    stopped = [child for child, (failure, rank) in ranks.items() if failure.how == signal.SIGSTOP and rank == LAST]
    codes: dict[str, int] = {}
    exits: dict[str, float] = {}
    while len(list(folder.glob("*.ready"))) < len(ranks):
        time.sleep(0.05)
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            failure, rank = ranks[child]
            exits[failure.of(rank)], codes[failure.of(rank)] = time.monotonic(), os.waitstatus_to_exitcode(status)
            if rank != LAST and not (folder / f"{failure.of(rank)}.ready").exists():
                break  # it failed before its time; its output says why
    (folder / "go").touch()
    while len(codes) < len(ranks) - len(stopped):
        child, status = os.waitpid(-1, 0)
        failure, rank = ranks[child]
        exits[failure.of(rank)] = time.monotonic()  # of the machine, the same clock in all processes
        codes[failure.of(rank)] = os.waitstatus_to_exitcode(status)
    for child in stopped:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    (folder / "codes").write_text(json.dumps(codes))
    took = {
        name: at - float(began.read_text())
        for name, at in exits.items()
        if (began := folder / f"{name}.began").exists()
    }
    (folder / "exits").write_text(json.dumps(took))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
