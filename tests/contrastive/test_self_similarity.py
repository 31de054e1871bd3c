"""The statistics of a symmetric matrix of logits from the pairs above its diagonal: they must be those of the whole."""

from __future__ import annotations

import pytest
import torch

from fastloss import NegativeSampling, core, nt_xent_loss, supcon_loss
from fastloss.contrastive.ops.softmax_stats import Inputs, softmax_stats
from tests.conformance.tools import INTERPRETING, Errors, recorded

KERNELS = INTERPRETING or core.backend_report()["cpp"] == "available"
pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not KERNELS, reason="the C++ kernels are not built"),
]
# MiB of workspace, rows: one block, blocks of the least size, of several tiles
SIZES = {256.0: (1, 2, 15, 67, 1025, 2300), 0.003: (1, 2, 15, 67), 1.0: (1025, 2300)}
INTERPRETED = {256.0: (1, 2, 17, 50), 0.003: (33, 50)}
OPTIONS = ["", "ids", "moments", "ceiling", "hardness"]


def values(op, dtype, rows, option, kind, workspace_mib, scale=6.0, draw=0):
    """Statistics of rows against themselves, each without its partner, and gradients of rows and scale."""
    random = torch.Generator().manual_seed(rows + 10000 * draw)
    draws = torch.randn(rows, 20, generator=random).bfloat16(), torch.rand(rows, generator=random)
    x = torch.nn.functional.normalize(draws[0].float(), dim=1).to(dtype).requires_grad_()
    factor = torch.tensor(scale, dtype=dtype, requires_grad=True)
    partner = torch.arange(rows).roll(rows // 2) if rows % 2 == 0 else None
    ids = torch.arange(rows) % max(rows // 3, 1) if option == "ids" else None
    ceiling = (scale * (draws[1] - 0.5)).to(dtype) if option == "ceiling" else None
    words, hardness = kind + "+moments" * (option == "moments"), 0.5 * (option == "hardness")
    stats = op(x, x, factor.expand(rows), None, None, partner, ids, ids, ceiling, words, hardness, workspace_mib, False)
    upstream = torch.linspace(-1, 2, stats.numel()).reshape(stats.shape).to(dtype)
    upstream[:, 1] = 0  # the maximum has no gradient, neither has the count
    if option == "moments":
        upstream[:, 3] = 0
    grads = torch.autograd.grad(stats, (x, factor), upstream.masked_fill(stats == -torch.inf, 0))
    return stats.detach(), *grads


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("workspace_mib", INTERPRETED if INTERPRETING else SIZES)
def test_upper_gives_what_the_whole_square_gives(option, workspace_mib):
    errors = Errors(torch.float32)
    sizes = (INTERPRETED if INTERPRETING else SIZES)[workspace_mib]
    for draw, rows in ((draw, rows) for draw in errors.draws() for rows in sizes):
        got = values(softmax_stats, torch.float32, rows, option, "upper", workspace_mib, draw=draw)
        same = values(softmax_stats.reference, torch.float32, rows, option, "diagonal", workspace_mib, draw=draw)
        exact = values(softmax_stats.reference, torch.float64, rows, option, "diagonal", workspace_mib, draw=draw)
        for name, *each in zip(("stats", "rows", "scale"), got, same, exact, strict=True):
            errors.add(name, *each, where=f"{rows} rows, draw {draw}")
    errors.check()


def test_reference_of_upper_is_the_whole_square():
    for option in OPTIONS:
        results = (values(softmax_stats.reference, torch.float64, 9, option, k, 1.0) for k in ("diagonal", "upper"))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_losses_of_one_set_of_rows_take_it():
    x, y = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    with recorded() as calls:
        nt_xent_loss(x, y)
        nt_xent_loss(x, y, ids=torch.arange(5), sampling=NegativeSampling(tau_plus=0.1, hardness=0.5, margin=0.2))
        supcon_loss(x, torch.tensor([0, 0, 1, 1, 1]), return_lse=True)
    assert ["upper" in Inputs(*args).kind for _, args in calls] == [True] * 4
