"""What the ranks do in test_fsdp.py: cached_step of modules whose parameters are sharded."""

from __future__ import annotations

from typing import Any

import torch
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
            before = torch.get_rng_state()
            loss = cached_step(encoders, (x[mine], y[mine]), loss_fn, chunk=5, reduce=reduce)
            assert torch.equal(before, torch.get_rng_state())
        grads = [p.grad.full_tensor() for encoder in encoders for p in encoder.parameters()]
        found[reduce] = {"loss": loss, "grads": grads}
    return found
