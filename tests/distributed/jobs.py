"""What the ranks do in the tests; each returns what the test then looks at."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.cases import CASES, counts_of, exchange_of, result


def averaged(grads: list[torch.Tensor], world: int, how: str) -> list[torch.Tensor]:
    """As DDP averages the gradients of parameters, or as a training does that sums them."""
    for grad in grads:
        dist.all_reduce(grad)
    return [grad / world for grad in grads] if how == "mean" else grads


def losses(rank: int, world: int) -> dict[str, Any]:
    """All cases in both dtypes."""
    found = {}
    for name, case in CASES.items():
        counts = counts_of(case, world)
        exchange = exchange_of(case, counts)
        for dtype in (torch.float64, torch.float32):
            got = result(case, dtype, counts, rank, dist.group.WORLD, exchange)
            got["grads"] = averaged(got["grads"], world, exchange.gradients)
            found[name, dtype] = got
    return found
