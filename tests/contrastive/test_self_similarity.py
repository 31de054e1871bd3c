"""The statistics of a symmetric matrix of logits from the pairs above its diagonal: they must be those of the whole."""

from __future__ import annotations

import pytest
import torch

from fastloss import NegativeSampling, core, nt_xent_loss, supcon_loss
from fastloss.contrastive.ops.softmax_stats import Inputs, softmax_stats
from fastloss.contrastive.options import Form
from fastloss.contrastive.save_plan import save_of_stats
from tests.conformance.tools import INTERPRETING, Errors, recorded

KERNELS = INTERPRETING or core.backend_report()["cpp"] == "available"
pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not KERNELS, reason="the C++ kernels are not built"),
]
# MiB of workspace, rows: one block, blocks of the least size, of several tiles
SIZES = {256.0: (1, 2, 15, 67, 1025, 2300), 0.003: (1, 2, 15, 67), 1.0: (1025, 2300)}
INTERPRETED = {256.0: (1, 2, 17, 50), 0.003: (33, 50)}
OPTIONS = ["", "ids", "moments", "logit_limit", "hardness"]
SELF, SQUARE = Form(self_similarity=True), Form(diagonal=True)
BACKEND = "triton" if INTERPRETING else "cpp"


def values(op, dtype, rows, option, form, workspace_mib, scale=6.0, draw=0):
    """Statistics of rows against themselves, each without its partner, and gradients of rows and scale."""
    random = torch.Generator().manual_seed(rows + 10000 * draw)
    draws = torch.randn(rows, 20, generator=random).bfloat16(), torch.rand(rows, generator=random)
    x = torch.nn.functional.normalize(draws[0].float(), dim=1).to(dtype).requires_grad_()
    scale = torch.tensor(scale, dtype=dtype, requires_grad=True)
    partner = torch.arange(rows).roll(rows // 2) if rows % 2 == 0 else None
    ids = torch.arange(rows) % max(rows // 3, 1) if option == "ids" else None
    logit_limit = (scale.detach() * (draws[1] - 0.5)).to(dtype) if option == "logit_limit" else None
    form, hardness = form._replace(moments=option == "moments"), 0.5 * (option == "hardness")
    given = (x, x, scale.expand(rows), None, None, partner, ids, ids, logit_limit, *form, hardness, workspace_mib)
    save = save_of_stats(BACKEND, x, x, form, partner, logit_limit, hardness, workspace_mib, True)
    stats = op(*Inputs(*given, save))
    upstream = torch.linspace(-1, 2, stats.numel()).reshape(stats.shape).to(dtype)
    upstream[:, 1] = 0  # the maximum has no gradient, neither has the count
    if option == "moments":
        upstream[:, 3] = 0
    grads = torch.autograd.grad(stats, (x, scale), upstream.masked_fill(stats == -torch.inf, 0))
    return stats.detach(), *grads


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("workspace_mib", INTERPRETED if INTERPRETING else SIZES)
def test_pairs_above_the_diagonal_give_what_the_whole_square_gives(option, workspace_mib):
    errors = Errors(torch.float32)
    sizes = (INTERPRETED if INTERPRETING else SIZES)[workspace_mib]
    for draw, rows in ((draw, rows) for draw in errors.draws() for rows in sizes):
        got = values(softmax_stats, torch.float32, rows, option, SELF, workspace_mib, draw=draw)
        same = values(softmax_stats.reference, torch.float32, rows, option, SQUARE, workspace_mib, draw=draw)
        exact = values(softmax_stats.reference, torch.float64, rows, option, SQUARE, workspace_mib, draw=draw)
        for name, *each in zip(("stats", "rows", "scale"), got, same, exact, strict=True):
            errors.add(name, *each, where=f"{rows} rows, draw {draw}")
    errors.check()


def test_reference_is_the_whole_square():
    for option in OPTIONS:
        results = (values(softmax_stats.reference, torch.float64, 9, option, form, 1.0) for form in (SQUARE, SELF))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_nt_xent_and_supcon_use_self_similarity():
    x, y = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    with recorded() as calls:
        nt_xent_loss(x, y)
        nt_xent_loss(x, y, ids=torch.arange(5), sampling=NegativeSampling(tau_plus=0.1, hardness=0.5, margin=0.2))
        supcon_loss(x, torch.tensor([0, 0, 1, 1, 1]), return_lse=True)
    assert [Inputs(*args).self_similarity for _, args in calls] == [True] * 4
