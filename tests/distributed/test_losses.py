"""Losses across ranks against one process that has the whole batch: 1, 2 and 3 ranks with 7, 5 and 9 rows."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastloss
from fastloss import Exchange, clip_loss, core
from tests.conformance.tools import Errors
from tests.distributed import jobs
from tests.distributed.cases import CASES, COUNTS, EQUAL, Case, counts_of, data, embedded, parameters, result
from tests.distributed.worker import run


@functools.cache
def started(world: int) -> list[dict[str, Any]]:
    """What each rank returned; all parts of a world run in one start of its processes."""
    with tempfile.TemporaryDirectory() as folder:
        return run("everything", world, Path(folder))


@pytest.fixture(scope="module")
def alone():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


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


def check_losses(world: int, ranks: list[dict]) -> None:
    errors = {loss: Errors(torch.float32) for loss in {case.loss for case in CASES.values()}}
    for name, case in CASES.items():
        counts = counts_of(case, world)
        exact, eager = (expected(case, dtype, counts) for dtype in (torch.float64, torch.float32))
        for ours in found(case, [rank[name, torch.float64] for rank in ranks]):
            for i, (value, want) in enumerate(zip(ours, exact, strict=True)):
                torch.testing.assert_close(value, want, rtol=0, atol=1e-10, msg=f"{name}: {i} {value} {want}")
        for ours in found(case, [rank[name, torch.float32] for rank in ranks]):
            for i, (value, their, want) in enumerate(zip(ours, eager, exact, strict=True)):
                kind = "loss" if i == 0 else "gradient" if i >= len(exact) - 5 else "by-product"
                errors[case.loss].add(kind, value, their, want, name)
    for each in errors.values():
        each.check()


@pytest.mark.parametrize("world", [2, 3])
def test_value_and_averaged_gradients_are_those_of_one_process(world):
    check_losses(world, [rank["losses"] for rank in started(world)])


def test_one_rank_is_no_other_than_no_group(alone):
    check_losses(1, [jobs.losses(0, 1)])


@pytest.mark.parametrize("world", [2, 3])
def test_with_ddp_a_module_and_a_mesh(world):
    of = parameters(torch.float64)
    e = embedded(data(COUNTS[world]), of)
    loss = clip_loss(e.a, e.b, logit_scale=e.scale)
    wanted = [loss.detach(), *torch.autograd.grad(loss, [of[0], of[1], of[3]])]
    for rank in started(world):
        torch.testing.assert_close(list(rank["by_module"].values()), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("world", [2, 3])
def test_open_clip_has_the_same_averages(world):
    pytest.importorskip("open_clip")
    for rank in started(world):
        torch.testing.assert_close(rank["open_clip"]["ours"], rank["open_clip"]["theirs"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("world", [2, 3])
def test_a_rank_that_differs_is_named_on_all_ranks(world):
    named = {
        "width": ("query [*, 8] torch.float32", "query [*, 6] torch.float32"),
        "rows": ("4 on rank 0", f"3 on rank {world - 1}", "Exchange(rows='uneven')"),
        "dtype": ("key [*, 8] torch.float32", "key [*, 8] torch.float64"),
        "option": ("normalize=False", "normalize=True"),
        "number": ("label_smoothing=0.1", "label_smoothing=0.2"),
        "loss": ("loss=clip_loss", "loss=siglip_loss"),
        "gradient": ("gradients of=query", "gradients of=none"),
        "weights": ("weights=False", "weights=True"),
        "ids": ("nothing of that kind on rank 0", "key ids [*] torch.int64"),
        "negatives": ("1 on rank 0", f"2 on rank {world - 1}"),
        "labels": ("include_positive=False", "include_positive=True"),
        "list": (f"5 rows on rank {world - 1}", "got 4"),
        "exchange": ("gradients=mean", "gradients=sum"),
    }
    everyone = [rank["mismatches"] for rank in started(world)]
    assert all(said == everyone[0] for said in everyone), everyone
    for name, words in named.items():
        said = everyone[0][name]
        assert said.startswith("ValueError: ") and f"rank {world - 1}" in said, f"{name}: {said}"
        assert all(word in said for word in words), f"{name}: {said}"
        assert name == "list" or "rank 0" in said, f"{name}: {said}"
    assert everyone[0]["right"].startswith("loss "), everyone[0]["right"]


@pytest.mark.parametrize("world", [2, 3])
def test_rows_that_travel_in_bfloat16_arrive_rounded_and_own_rows_stay(world):
    for rank in started(world):
        for ours, wanted in zip(rank["wire"]["ours"], rank["wire"]["by hand"], strict=True):
            torch.testing.assert_close(ours.double(), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("world", [2, 3])
def test_bytes_are_those_of_the_formula(world):
    """(W - 1) b D (e + e_g): keys in their own dtype or the wire's, their gradients in float32."""
    rows = (world - 1) * EQUAL * 8
    for rank in started(world):
        assert rank["traffic"] == {
            "float32": [4 * rows, 4 * rows], "bfloat16": [2 * rows, 4 * rows], "wire": [2 * rows, 4 * rows],
        }  # fmt: skip


def test_compiled_without_a_graph_break():
    for rank in started(2):
        for name, rows, kind in rank["compiled"]:
            got, eager = (rank["compiled"][name, rows, k] for k in (kind, "eager"))
            torch.testing.assert_close(got, eager, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_rank_that_is_gone_is_an_error_with_rank_and_operation():
    for rank, said in enumerate(started(3)[:2]):
        assert said["death"].startswith("fastloss: "), said["death"]
        assert f"failed on rank {rank} of 3" in said["death"], said["death"]


def test_the_ops_are_what_torch_expects(alone):
    from fastloss.distributed import collectives

    x, ids, name = torch.randn(4, 3, dtype=torch.float64).requires_grad_(), torch.arange(4), alone.group_name
    gathered = ([x, ids], [0, 0], [4], [4], False, "x,ids", "loss=none", "", "x", "equal", name)
    for op, args in (
        (collectives.gather_rows, gathered),
        (collectives.scatter_rows, ([x], [0], [4], [4], name)),
        (collectives.sum_over_ranks, (x, 1.0, 0.5, name)),
        (collectives.replicated, (x, name)),
    ):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_gradients_of_gradients(alone):
    """The ops are linear: their backwards are ops with backwards."""
    from fastloss.distributed import collectives

    x, name = torch.randn(4, 3, dtype=torch.float64).requires_grad_(), alone.group_name
    gather = lambda t: collectives.gather_rows([t], [0], [4], [4], False, "", "", "", "", "", name)[0]  # noqa: E731
    for fn in (
        gather,
        lambda t: collectives.sum_over_ranks(t, 1.0, 1.0, name),
        lambda t: collectives.replicated(t, name),
    ):
        assert torch.autograd.gradcheck(fn, (x,))
        assert torch.autograd.gradgradcheck(fn, (x,))


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"strategy": "ring"}, ValueError, "strategy: expected one of"),
        ({"rows": "same"}, ValueError, "rows: expected one of"),
        ({"rows": [4, -1]}, ValueError, r"rows\[1\]: expected a whole number from 0"),
        ({"rows": 4}, TypeError, "rows: expected a list of whole numbers"),
        ({"wire": torch.float16}, ValueError, "wire: expected None or torch.bfloat16"),
        ({"gradients": "none"}, ValueError, "gradients: expected one of"),
        ({"negatives": True}, TypeError, "negatives: expected one of"),
    ],
)
def test_what_an_exchange_refuses(options, error, said):
    with pytest.raises(error, match=said):
        Exchange(**options)


def test_what_the_losses_refuse(alone):
    x = torch.randn(4, 8)
    with pytest.raises(TypeError, match="group: expected a ProcessGroup or a 1-D DeviceMesh, got str"):
        clip_loss(x, x, logit_scale=1.0, group="world")
    with pytest.raises(TypeError, match="exchange: expected a fastloss.Exchange, got dict"):
        clip_loss(x, x, logit_scale=1.0, group=alone, exchange={"rows": "equal"})
    with pytest.raises(ValueError, match="rows: expected one number per rank, 1 of them, got 2"):
        clip_loss(x, x, logit_scale=1.0, group=alone, exchange=Exchange(rows=[4, 4]))
    for loss in ("clip_loss", "siglip_loss"):
        with pytest.raises(ValueError, match="reduction: the mean of an empty batch is undefined"):
            getattr(fastloss, loss)(x[:0], x[:0], logit_scale=1.0, logit_bias=0.0, group=alone)
