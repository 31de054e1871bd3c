"""Two groups of three ranks, one of whose ranks dies or stops: `python -m tests.distributed.failing FOLDER`.

Plain processes, forked after the imports, which take longer than all else; torchrun would kill the survivors before
they can say anything. Each rank leaves FOLDER/RANK.said (what the mismatches raised) and FOLDER/RANK.txt (its output);
FOLDER/RANK.seconds has how long after the failure it raised, FOLDER/codes the exit codes, FOLDER/exits when it
was gone.
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
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastloss import clip_loss, info_nce, nt_xent_loss, siglip_loss, supcon_loss

WORLD, TIMEOUT_S = 3, 3
SIGNALS = (signal.SIGKILL, signal.SIGSTOP)  # of each group's last rank to itself

LOSSES: dict[str, Callable[..., Tensor]] = {
    "info_nce": lambda x, **o: info_nce(x, x, **o),
    "clip_loss": lambda x, **o: clip_loss(x, x, logit_scale=3.0, **o),
    "siglip_loss": lambda x, **o: siglip_loss(x, x, logit_scale=3.0, logit_bias=-1.0, **o),
    "nt_xent_loss": lambda x, **o: nt_xent_loss(x, x, **o),
    "supcon_loss": lambda x, **o: supcon_loss(x, torch.zeros(len(x), dtype=torch.int64), **o),
}


def mismatches(rank: int) -> dict[str, Any]:
    """[what was raised, seconds] of each loss where the last rank has another D, dtype, number of rows, or option."""
    plain = torch.randn(4, 8)
    odd = {
        "width": {"x": plain[:, :6]},
        "dtype": {"x": plain.double()},
        "rows": {"x": plain[:3]},
        "no rows": {"x": plain[:0]},
        "option": {"reduction": "sum"},
    }
    said: dict[str, Any] = {}
    for name, loss in LOSSES.items():
        for kind, differs in odd.items():
            options = {"x": plain} | (differs if rank == WORLD - 1 else {})
            began = time.monotonic()
            try:
                text = f"loss {loss(**options, group=dist.group.WORLD)}"
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
            said[f"{name}, {kind}"] = [text, time.monotonic() - began]
    return said


def one_rank(rank: int, how: signal.Signals, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else ""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store of {how.name}"), WORLD)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timeout)
    if how == SIGNALS[0]:
        (folder / f"{rank}.said").write_text(json.dumps(mismatches(rank)))
    group = dist.new_group(timeout=datetime.timedelta(seconds=TIMEOUT_S))
    x = torch.randn(4, 8).requires_grad_()
    LOSSES["clip_loss"](x, group=group).backward()
    dist.barrier()
    (folder / f"{how.name}{rank}.ready").touch()
    if rank == WORLD - 1:
        os.kill(os.getpid(), how)
    began = time.monotonic()
    (folder / f"{how.name}{rank}.began").write_text(f"{began}")
    try:
        LOSSES["clip_loss"](x, group=group).backward()
    finally:
        (folder / f"{how.name}{rank}.seconds").write_text(f"{time.monotonic() - began}")


def forked(rank: int, how: signal.Signals, folder: Path) -> int:
    """The process id of the rank."""
    child = os.fork()
    if child:
        return child
    code = 0
    out = os.open(folder / f"{how.name}{rank}.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(out, 1), os.dup2(out, 2)
    try:
        one_rank(rank, how, folder)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    sys.exit(code)


def main(folder: Path) -> None:
    gc.freeze()  # else a child's last collection copies the pages of all modules: seconds on a busy machine
    ranks = {forked(rank, how, folder): (how, rank) for how in SIGNALS for rank in range(WORLD)}
    stopped = next(child for child, (how, rank) in ranks.items() if how == signal.SIGSTOP and rank == WORLD - 1)
    codes: dict[str, int] = {}
    exits: dict[str, float] = {}
    while len(list(folder.glob("*.ready"))) < len(ranks):
        time.sleep(0.05)
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            how, rank = ranks[child]
            codes[f"{how.name}{rank}"] = os.waitstatus_to_exitcode(status)
            if rank != WORLD - 1 and not (folder / f"{how.name}{rank}.ready").exists():
                break  # it failed before its time; its output says why
    while len(codes) < len(ranks) - 1:
        child, status = os.waitpid(-1, 0)
        how, rank = ranks[child]
        exits[f"{how.name}{rank}"] = time.monotonic()  # of the machine, the same clock in all processes
        codes[f"{how.name}{rank}"] = os.waitstatus_to_exitcode(status)
    os.kill(stopped, signal.SIGKILL)
    os.waitpid(stopped, 0)
    (folder / "codes").write_text(json.dumps(codes))
    took = {
        name: at - float(began.read_text())
        for name, at in exits.items()
        if (began := folder / f"{name}.began").exists()
    }
    (folder / "exits").write_text(json.dumps(took))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
