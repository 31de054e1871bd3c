"""What the tests look at in what the ranks returned (jobs.py), part by part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss import clip_loss, core
from tests.conformance.tools import Errors
from tests.distributed.banks import check_sharded_bank
from tests.distributed.cases import (
    CASES,
    COUNTS,
    EQUAL,
    Case,
    counts_of,
    data,
    embedded,
    parameters,
    result,
)
from tests.distributed.encoders import Encoder, data_of_ranks, with_graphs


def of_all_ranks(parts: list[Tensor], case: Case) -> Tensor:
    """Losses of rows, or what is one a row, in the order of one process: of NT-Xent view_a's rows come first."""
    if case.loss != "nt_xent_loss":
        return torch.cat(parts, -1)
    return torch.cat([half for view in range(2) for half in (p.chunk(2)[view] for p in parts)])


def expected(case: Case, dtype: torch.dtype, counts: list[int]) -> list[Tensor]:
    """Loss, by-products and gradients of one process."""
    with core.use_backend("reference"):
        one = result(case, dtype, counts, None)
    if case.options.get("reduction") == "none":  # the mean over ranks of what each makes of its rows
        one["grads"] = [grad / len(counts) for grad in one["grads"]]
    return [one["loss"], *one["by-products"], *one["grads"]]


def found(case: Case, ranks: list[dict]) -> list[list[Tensor]]:
    """The same as each rank has it, rows put together."""
    extra = [of_all_ranks(list(parts), case) for parts in zip(*(r["by-products"] for r in ranks), strict=True)]
    losses = [r["loss"] for r in ranks]
    if losses[0].ndim:
        losses = [of_all_ranks(losses, case)] * len(ranks)
    return [[loss, *extra, *r["grads"]] for loss, r in zip(losses, ranks, strict=True)]


def check_losses(world: int, ranks: list[Any]) -> None:
    """Value and averaged gradients are those of one process."""
    ranks = [rank["losses"] for rank in ranks]
    errors = {loss: Errors(torch.float32) for loss in {case.loss for case in CASES.values()}}
    for name, case in CASES.items():
        counts = counts_of(case, world)
        exact, eager = (expected(case, dtype, counts) for dtype in (torch.float64, torch.float32))
        for strategy in dict.fromkeys(strategy for of, strategy, _ in ranks[0] if of == name):
            for ours in found(case, [rank[name, strategy, torch.float64] for rank in ranks]):
                for i, (value, want) in enumerate(zip(ours, exact, strict=True)):
                    said = f"{name}, {strategy}: {i} {value} {want}"
                    torch.testing.assert_close(value, want, rtol=0, atol=1e-10, msg=said)
            if (name, strategy, torch.float32) not in ranks[0]:
                continue
            for ours in found(case, [rank[name, strategy, torch.float32] for rank in ranks]):
                for i, (value, their, want) in enumerate(zip(ours, eager, exact, strict=True)):
                    kind = "loss" if i == 0 else "gradient" if i >= len(exact) - 5 else "by-product"
                    errors[case.loss].add(kind, value, their, want, f"{name}, {strategy}")
    for each in errors.values():
        each.check()


def check_module(world: int, ranks: list[Any]) -> None:
    """With real DDP, a module and a mesh."""
    of = parameters(torch.float64)
    e = embedded(data(COUNTS[world]), of)
    loss = clip_loss(e.a, e.b, logit_scale=e.scale)
    wanted = [loss.detach(), *torch.autograd.grad(loss, [of[0], of[1], of[3]])]
    for rank in ranks:
        torch.testing.assert_close(list(rank["by_module"].values()), wanted, rtol=0, atol=1e-10)


def check_open_clip(world: int, ranks: list[Any]) -> None:
    """open_clip has the same averages."""
    for rank in ranks:
        torch.testing.assert_close(rank["open_clip"]["ours"], rank["open_clip"]["theirs"], rtol=0, atol=1e-10)


def check_mismatches(world: int, ranks: list[Any]) -> None:
    """A rank that differs is named on all ranks."""
    named = {
        "width": ("key [*, 8] torch.float32", "key [*, 6] torch.float32"),
        "rows": ("4 on rank 0", f"3 on rank {world - 1}", "Exchange(rows='uneven')"),
        "dtype": ("key [*, 8] torch.float32", "key [*, 8] torch.float64"),
        "option": ("normalize=False", "normalize=True"),
        "number": ("label_smoothing=0.1", "label_smoothing=0.2"),
        "loss": ("loss=clip_loss", "loss=siglip_loss"),
        "gradient": ("gradients of=query", "gradients of=none"),
        "weights": ("dtype of weights=none", "dtype of weights=torch.float32"),
        "one dtype": ("dtype of query=torch.float32", "dtype of query=torch.float64"),
        "one dtype, siglip": ("dtype of image=torch.float32", "dtype of image=torch.float64"),
        "one dtype, groups": ("dtype of image=torch.float32", "dtype of image=torch.float64"),
        "ids": ("nothing of that kind on rank 0", "key ids [*] torch.int64"),
        "negatives": ("1 on rank 0", f"2 on rank {world - 1}"),
        "labels": ("include_positive=False", "include_positive=True"),
        "list": (f"5 rows on rank {world - 1}", "got 4"),
        "exchange": ("gradients=mean", "gradients=sum"),
    }
    everyone = [rank["mismatches"] for rank in ranks]
    assert all(said == everyone[0] for said in everyone), everyone
    for name, words in named.items():
        said = everyone[0][name]
        assert said.startswith("ValueError: ") and f"rank {world - 1}" in said, f"{name}: {said}"
        assert all(word in said for word in words), f"{name}: {said}"
        assert name == "list" or "rank 0" in said, f"{name}: {said}"
    assert everyone[0]["right"].startswith("loss "), everyone[0]["right"]


def check_wire(world: int, ranks: list[Any]) -> None:
    """Rows that travel in bfloat16 arrive rounded, own rows stay."""
    for rank in ranks:
        for ours, wanted in zip(rank["wire"]["ours"], rank["wire"]["by hand"], strict=True):
            torch.testing.assert_close(ours.double(), wanted, rtol=2e-5, atol=2e-5)


def check_traffic(world: int, ranks: list[Any]) -> None:
    """(W - 1) b D (e + e_g): keys in their own dtype or the wire's, their gradients in float32. In pieces keys come in
    the backward too, of SigLIP gradients go back in the forward, and half of a ring does for NT-Xent."""
    rows = (world - 1) * EQUAL * 8
    wanted: dict[Any, list[int]] = {
        "float32": [4 * rows, 4 * rows], "bfloat16": [2 * rows, 4 * rows], "wire": [2 * rows, 4 * rows],
        "clip, groups": [4 * rows, 4 * rows],
    }  # fmt: skip
    for strategy in ("chunked", "ring"):
        views = 2 * (world // 2 * EQUAL * 8 if strategy == "ring" else rows)
        wanted |= {
            (strategy, "info_nce", "float32"): [4 * rows, 8 * rows],
            (strategy, "info_nce", "bfloat16"): [2 * rows, 6 * rows],
            (strategy, "info_nce", "wire"): [2 * rows, 6 * rows],
            (strategy, "grouped", "float32"): [4 * rows, 8 * rows],
            (strategy, "siglip_loss", "float32"): [8 * rows, 0],
            (strategy, "nt_xent_loss", "float32"): [4 * views, 8 * views],
        }
    for rank in ranks:
        assert rank["traffic"] == wanted


def check_similarities(world: int, ranks: list[Any]) -> None:
    """b B, once forward and, where they are not kept, once backward; SigLIP's gradient is the forward's. Of rows
    compared with one another half, and half of the diagonal more."""
    b = EQUAL
    square = {
        name: rows * rows * (world - 1) // 2 + rows * (rows + 1) // 2
        for name, rows in (("nt_xent", 2 * b), ("supcon", b))
    }
    for rank in ranks:
        for (strategy, name), made in rank["similarities"].items():
            each = square.get(name, b * b * world * (3 if "three texts" in name else 1))
            once = strategy == "gather" or name == "siglip" or world == 1
            assert made == [each, 0 if once else each], (strategy, name, made)


def check_nothing(world: int, ranks: list[Any]) -> None:
    """As on one process: 0."""
    for rank in ranks:
        for name, tensors in rank["nothing"].items():
            assert all(bool((t == 0).all()) for t in tensors), name


def check_of_three(world: int, ranks: list[Any]) -> None:
    check_losses(3, [{"losses": rank["of_three"]} for rank in ranks[:3]])


def check_compiled(world: int, ranks: list[Any]) -> None:
    """Compiled without a graph break is as eager."""
    for rank in ranks:
        for name, rows, kind in rank["compiled"]:
            got, eager = (rank["compiled"][name, rows, k] for k in (kind, "eager"))
            torch.testing.assert_close(got, eager, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def check_death(world: int, ranks: list[Any]) -> None:
    """A rank that is gone is an error with rank and operation on the others."""
    for rank, said in enumerate(ranks[:-1]):
        assert said["death"].startswith("fastloss: "), said["death"]
        assert f"failed on rank {rank} of {world}" in said["death"], said["death"]


def check_cached(world: int, ranks: list[Any]) -> None:
    """cached_step under DDP of two ranks: the gradients of one process, one reduction a model."""
    x, y = data_of_ranks()
    encoders = Encoder(12, scale=True), Encoder(10)
    with_graphs(encoders, (x, y), chunk=32)
    for rank in ranks:
        got = rank["cached"]
        assert got["reductions"] == [1, 1, 0, 0], "one a model and step, none inside no_sync()"
        assert "SyncBatchNorm" in got["SyncBatchNorm"] and "3 on rank 0 and 2 on rank 1" in got["SyncBatchNorm"]
        for one, two in zip(got["grads"], [p.grad for e in encoders for p in e.parameters()], strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


def check_bank(world: int, ranks: list[Any]) -> None:
    """A memory bank is the same on all ranks, and DDP changes nothing."""
    everyone = [rank["bank"] for rank in ranks]
    for ids in everyone:
        assert ids == everyone[0]
    pushed = [100 * step + 10 * rank + i for step in range(3) for rank in range(world) for i in range(rank + 1)]
    assert sorted(everyone[0]) == sorted(pushed[-5:])


def check_drop_ins(world, ranks):
    """Values and gradients of each rank are the library's own."""
    for rank in ranks:
        for name, (theirs, ours) in rank["drop_ins"].items():
            torch.testing.assert_close(
                ours, theirs, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
            )


CHECKS = {
    "losses": check_losses, "by_module": check_module, "open_clip": check_open_clip, "mismatches": check_mismatches,
    "wire": check_wire, "traffic": check_traffic, "compiled": check_compiled, "cached": check_cached,
    "bank": check_bank, "death": check_death, "drop_ins": check_drop_ins, "similarities": check_similarities,
    "nothing": check_nothing, "of_three": check_of_three, "sharded_bank": check_sharded_bank,
}  # fmt: skip
