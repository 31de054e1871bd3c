"""One rank of a test: `python -m tests.distributed.worker JOB RANK WORLD FOLDER`, JOB a function of jobs.py.

What the job returns is saved to FOLDER/RANK.pt. Plain processes, not torchrun, which kills the others when one fails.
"""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run(job: str, world: int, folder: Path, timeout: int = 900) -> list[Any]:
    """What the job returned on each rank; an AssertionError with the output of all if one failed."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    command = [sys.executable, "-m", "tests.distributed.worker", job]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    failed = [f"rank {rank}: {text[-3000:]}" for rank, text in enumerate(said) if processes[rank].returncode]
    assert not failed, "\n".join(failed)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def main(job: str, rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60))
    from tests.distributed import fsdp_jobs, jobs

    work = getattr(jobs, job, None) or getattr(fsdp_jobs, job)
    torch.save(work(rank, world), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
