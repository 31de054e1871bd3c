"""cached_step of FSDP2 modules on two ranks: the gradients of one process."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.encoders import Encoder, data_of_ranks, with_graphs
from tests.distributed.worker import run


@pytest.mark.slow
def test_sharded_encoders_get_the_gradients_of_one_process(tmp_path):
    encoders = Encoder(12, scale=True), Encoder(10)
    loss = with_graphs(encoders, data_of_ranks(), chunk=32)
    wanted = [p.grad for encoder in encoders for p in encoder.parameters()]
    for rank in run("sharded", 2, tmp_path):
        for reduce in ("step", "chunk"):
            torch.testing.assert_close(rank[reduce]["loss"], loss, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(rank[reduce]["grads"], wanted, rtol=0, atol=1e-6)
        shards, pieces = 4, 4  # two modules of each of two encoders
        assert [rank[reduce]["reductions"] for reduce in ("step", "chunk")] == [shards, shards * pieces]
