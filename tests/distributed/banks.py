"""diversity_loss of a bank that lies on several ranks, against the whole bank on one process."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastloss import Exchange, diversity_loss

IMAGES, SHARDS, SIZE = [3, 0, 4, 2], [5, 4, 0, 7], 6  # a rank without images, and one without rows
OPTIONS: dict[str, dict[str, Any]] = {
    "nearest": {"return_nearest": True},
    "nearest, l2, margin": {"metric": "l2", "margin": 0.2, "return_nearest": True, "reduction": "sum"},
    "nearest, cosine": {"metric": "cosine"},
    "mean": {"mode": "mean"},
    "mean, l2": {"mode": "mean", "metric": "l2"},
    "mean, cosine": {"mode": "mean", "metric": "cosine", "reduction": "none"},
    "softmin": {"mode": "softmin", "temperature": 0.02},
    "softmin, cosine, margin": {"mode": "softmin", "metric": "cosine", "margin": 0.5},
}


class Data(NamedTuple):
    noise: Tensor  # [N, 4]
    bank: Tensor  # [M, SIZE], float64
    weight: Tensor  # [4, SIZE], the parameter that all ranks have
    upstream: Tensor  # [N], for losses of rows


def data(world: int) -> Data:
    g = torch.Generator().manual_seed(11)
    images, rows = sum(IMAGES[:world]), sum(SHARDS[:world])
    noise, bank, weight, upstream = (
        torch.rand(*size, generator=g, dtype=torch.float64)
        for size in ((images, 4), (rows, SIZE), (4, SIZE), (images,))
    )
    bank[SHARDS[0]] = bank[2]  # the same row on two ranks, and an image that is equal to both
    noise[0], weight[0], bank[2] = torch.tensor([1.0, 0, 0, 0]), bank[2], bank[2]
    return Data(noise, bank, weight.requires_grad_(), upstream)


def answers(out: Any, weight: Tensor, upstream: Tensor) -> list[Tensor]:
    """[loss, gradient, and where they are asked for distance and row]."""
    loss, found = out if isinstance(out, tuple) else (out, ())
    (grad,) = torch.autograd.grad(loss, weight, upstream if loss.ndim else None)
    return [loss.detach(), grad, *found]


def sharded_bank(rank: int, world: int) -> dict[str, Any]:
    """All options with the gradients averaged, one with them summed, what each mismatch says, and a compiled call."""
    x, group = data(world), dist.group.WORLD
    mine, own = x.noise.split(IMAGES[:world])[rank], x.bank.split(SHARDS[:world])[rank]
    upstream = x.upstream.split(IMAGES[:world])[rank]
    found: dict[str, Any] = {}
    summed = {"exchange": Exchange(rows="uneven", gradients="sum")}
    for name, options in (OPTIONS | {"summed": summed}).items():
        found[name] = answers(diversity_loss(mine @ x.weight, own, group=group, **options), x.weight, upstream)
        dist.all_reduce(found[name][1])
        found[name][1] /= 1 if name == "summed" else world
    rows = {"generated": IMAGES[:world], "bank": SHARDS[:world]}
    for kind in ("compiled", "eager") if world == 2 else ():
        call = (
            torch.compile(diversity_loss, fullgraph=True, backend="aot_eager") if kind == "compiled" else diversity_loss
        )
        out = call(mine @ x.weight, own, group=group, exchange=Exchange(rows=rows), mode="softmin")
        found[kind] = answers(out, x.weight, upstream)
    last = rank == world - 1
    for name, call in {
        "metric": lambda: diversity_loss(mine, mine[:, :4], group=group, metric="l2" if last else "l1"),
        "size": lambda: diversity_loss(own[:, 2 * last :], own[:, 2 * last :], group=group),
        "margin": lambda: diversity_loss(own, own, group=group, margin=1.0 + last),
        "no rows": lambda: diversity_loss(own, own[:0], group=group),
        "strategy": lambda: diversity_loss(own, own, group=group, exchange=Exchange(strategy="ring")),
    }.items():
        try:
            found[f"mismatch, {name}"] = f"loss {call()}"
        except ValueError as error:
            found[f"mismatch, {name}"] = str(error)
    return found


def check_sharded_bank(world: int, ranks: list[Any]) -> None:
    """Values, gradients and rows are those of the whole bank; a rank that differs is named."""
    everyone = [rank["sharded_bank"] for rank in ranks]
    for name, options in (OPTIONS | {"summed": {}}).items():
        x = data(world)
        loss, grad, *where = answers(diversity_loss(x.noise @ x.weight, x.bank, **options), x.weight, x.upstream)
        if loss.ndim:  # the mean over ranks of what each makes of its rows
            grad = grad / world
        for rank, (value, of_rank, *_) in enumerate(found[name] for found in everyone):
            wanted = loss.split(IMAGES[:world])[rank] if loss.ndim else loss
            torch.testing.assert_close(
                [value, of_rank], [wanted, grad], rtol=0, atol=1e-12, msg=lambda m, n=name: n + m
            )
        if where:
            distance, row = (torch.cat(parts) for parts in zip(*(found[name][2:] for found in everyone), strict=True))
            torch.testing.assert_close([distance, row], where, rtol=0, atol=1e-12)
            assert row[0] == 2, "of the two equal rows the first"
    for found in everyone:
        if world == 2:
            torch.testing.assert_close(found["compiled"], found["eager"], rtol=0, atol=1e-12)
        assert "metric=l1 on rank 0" in found["mismatch, metric"] and f"rank {world - 1}" in found["mismatch, metric"]
        assert f"generated [*, {SIZE}]" in found["mismatch, size"]
        assert "margin=1.0" in found["mismatch, margin"] and "margin=2.0" in found["mismatch, margin"]
        assert "at least one image on one of the ranks" in found["mismatch, no rows"]
        assert "expected strategy='gather'" in found["mismatch, strategy"]
