"""One rank of a test: `python -m tests.distributed.worker JOB RANK WORLD FOLDER`, JOB a function of jobs.py.

What the job returns is saved to FOLDER/RANK.pt.
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.processes import run_ranks


def run(job: str, world: int, folder: Path, timeout: int = 900) -> list[Any]:
    """What the job returned on each rank."""
    return run_ranks(
        "tests.distributed.worker", lambda rank: [job, str(rank), str(world), str(folder)], world, folder, timeout
    )


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
