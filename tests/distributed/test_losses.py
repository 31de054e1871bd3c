"""Losses with a group: what one rank alone shows. Several: test_ranks.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import fastloss
from fastloss import Exchange, clip_loss
from tests.distributed import jobs
from tests.distributed.checks import check_losses, check_similarities


@pytest.fixture(scope="module")
def alone():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_one_rank_is_no_other_than_no_group(alone):
    check_losses(1, [{"losses": jobs.losses(0, 1)}])
    check_similarities(1, [{"similarities": jobs.similarities(0, 1)}])


def test_the_ops_are_what_torch_expects(alone):
    from fastloss.contrastive import siglip
    from fastloss.contrastive.ops import softmax_stats
    from fastloss.distributed import collectives, pieces, siglip_pieces
    from fastloss.distributed.agreement import NO_CALL

    x, ids, name = torch.randn(4, 3, dtype=torch.float64).requires_grad_(), torch.arange(4), alone.group_name
    keys, scale, one = (torch.randn(*size, dtype=torch.float64).requires_grad_() for size in ((4, 3), (4,), (1,)))
    of_rows = softmax_stats.Inputs(
        x, keys, scale, None, None, None, ids, ids, None, True, True, False, True, False, False, 0.5, 256.0
    )  # fmt: skip
    of_pairs = siglip.Inputs(x, keys, one, one, None, None, None, None, None, True, False, False, 7, 256.0)
    weighted = of_pairs._replace(row_weight=scale.detach().abs())
    routes = [pieces.Route(strategy, "float64", 2, [4], name) for strategy in ("chunked", "ring")]
    gathered = ([x, ids], [0, 0], [4], [4], False, "x,ids", "loss=none", "", "x", "equal", name)
    for op, args in (
        (collectives.gather_rows, gathered),
        (collectives.scatter_rows, ([x], [0], [4], [4], name)),
        (collectives.sum_over_ranks, (x, 1.0, 0.5, name)),
        (collectives.replicated, (x, name)),
        (collectives.rows_to_owners, (x, 4, [4], name)),
        (collectives.rows_from_owners, (x[None].detach().requires_grad_(), 4, [4], name)),
        (collectives.compared, (x.detach(), [x.detach()], "x", "loss=none", "", "x", [4], "equal", name)),
        (pieces.statistics_of_pieces, (*of_rows, ids, ids, *routes[0], *NO_CALL)),
        (siglip_pieces.siglip_of_pieces, (*of_pairs, *routes[1], *NO_CALL)),
        (siglip_pieces.siglip_of_pieces, (*weighted, *routes[0], *NO_CALL)),
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
        lambda t: collectives.rows_to_owners(t, 4, [4], name),
        lambda t: collectives.rows_from_owners(t[None], 4, [4], name),
    ):
        assert torch.autograd.gradcheck(fn, (x,))
        assert torch.autograd.gradgradcheck(fn, (x,))


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"strategy": "rings"}, ValueError, "strategy: expected one of"),
        ({"rows": "same"}, ValueError, "rows: expected one of"),
        ({"rows": [4, -1]}, ValueError, r"rows\[1\]: expected a whole number from 0"),
        ({"rows": 4}, TypeError, "rows: expected a list of whole numbers"),
        ({"wire": torch.float16}, ValueError, "wire: expected None or torch.bfloat16"),
        ({"gradients": "none"}, ValueError, "gradients: expected one of"),
        ({"negatives": True}, TypeError, "negatives: expected one of"),
        ({"mib": 0}, ValueError, "mib: expected"),
        ({"rows": {"image": [4, "5"]}}, TypeError, r"rows\['image'\]\[1\]: expected a whole number"),
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
    with pytest.raises(ValueError, match="rows: expected numbers of rows for 'view', got"):
        fastloss.nt_xent_loss(x, x, group=alone, exchange=Exchange(rows={"image": [4]}))
    with pytest.raises(ValueError, match="rows: expected one number per rank, 1 of them, got 2"):
        clip_loss(x, x, logit_scale=1.0, group=alone, exchange=Exchange(rows=[4, 4]))
    for loss in ("clip_loss", "siglip_loss"):
        with pytest.raises(ValueError, match="reduction: the mean of an empty batch is undefined"):
            getattr(fastloss, loss)(x[:0], x[:0], logit_scale=1.0, logit_bias=0.0, group=alone)
