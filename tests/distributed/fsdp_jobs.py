"""What the ranks do in test_fsdp.py: cached_step of modules whose parameters are sharded."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fastloss import Exchange, cached_step, clip_loss
from tests.distributed.encoders import Encoder, data_of_ranks


def sharded(rank: int, world: int) -> dict[str, Any]:
    """17 rows on one rank and 3 on the other, in pieces of 5 (4 of them and 1), by both values of `reduce`."""
    x, y = data_of_ranks()
    mine = slice(0, 17) if rank == 0 else slice(17, 20)
    mesh = init_device_mesh("cpu", (world,))
    exchange = Exchange(rows="uneven")

    def loss_fn(a: dict, b: Tensor) -> Tensor:
        scale = a["logit_scale"]
        return clip_loss(a["emb"], b, logit_scale=scale, normalize=True, group=mesh, exchange=exchange)

    names = [name for name in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(dist, name)]
    originals, reductions = {name: getattr(dist, name) for name in names}, [0]

    def counting(original: Any) -> Any:
        def reduce_scatter(*args: Any, **options: Any) -> Any:
            reductions[0] += "fsdp" in sys._getframe(1).f_code.co_filename  # the loss has one of its own
            return original(*args, **options)

        return reduce_scatter

    for name, original in originals.items():
        setattr(dist, name, counting(original))
    found: dict[str, Any] = {}
    for reduce in ("step", "chunk"):
        encoders = Encoder(12, scale=True), Encoder(10)
        for encoder in encoders:
            fully_shard(encoder.first, mesh=mesh)
            fully_shard(encoder, mesh=mesh)
        for _ in range(2):  # the second finds the state that the first left
            for encoder in encoders:
                encoder.zero_grad()
            torch.manual_seed(3)
            before, reductions[0] = torch.get_rng_state(), 0
            loss = cached_step(encoders, (x[mine], y[mine]), loss_fn, chunk=5, reduce=reduce)
            assert torch.equal(before, torch.get_rng_state())
        grads = [p.grad.full_tensor() for encoder in encoders for p in encoder.parameters()]
        found[reduce] = {"loss": loss, "grads": grads, "reductions": reductions[0]}
    for name, original in originals.items():
        setattr(dist, name, original)
    return found
