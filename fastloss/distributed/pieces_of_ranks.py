"""What the ranks of a cached step agree on: how many pieces each has, and the mean of their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def most_pieces(shards: Sequence[Any], pieces: int) -> int:
    """The largest number of pieces that a rank has among those that share the parameters of FSDP modules."""
    if not shards:
        return pieces
    mesh = next(p.device_mesh for module in shards for p in module.parameters() if hasattr(p, "device_mesh"))
    most = torch.tensor(pieces, device=mesh.device_type)
    for group in mesh.get_all_groups():
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    return int(most)


def check_sync_norms(modules: Sequence[nn.Module], pieces: int) -> None:
    """SyncBatchNorm normalises over a piece of every rank: one that has no further piece would let the others wait."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    norms = [module for module in modules if isinstance(module, nn.SyncBatchNorm) and module.training]
    groups = {id(group): (group, norm) for norm in norms for group in [norm.process_group or dist.group.WORLD]}
    for group, norm in groups.values():
        mine = torch.tensor([pieces], device=next((p.device for p in norm.parameters()), None))
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, mine, group=group)
        counts = [int(count) for count in everyone]
        other = next((rank for rank, count in enumerate(counts) if count != counts[0]), None)
        if other is not None:
            raise ValueError(
                f"inputs: expected as many pieces of `chunk` rows on all ranks, which SyncBatchNorm normalises as one, "
                f"got {counts[0]} on rank 0 and {counts[other]} on rank {other}; BatchNorm has no such need"
            )


@torch.no_grad()
def average_gradients(replicas: DistributedDataParallel) -> None:
    """One all-reduce for all parameters of a dtype. Not by DDP itself, which waits in silence for the gradients of
    parameters that were read beside its forward, and leaves those of all others unreduced."""
    group = replicas.process_group
    buckets: dict[Any, list[Tensor]] = {}
    for parameter in replicas.module.parameters():
        if parameter.grad is not None:
            key = parameter.grad.dtype, parameter.grad.device
            buckets.setdefault(key, []).append(parameter.grad)
    for grads in buckets.values():
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))
