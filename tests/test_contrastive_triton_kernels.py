"""Contrastive Triton launchers: blocks of G within the workspace, plans, wide spreads."""

from __future__ import annotations

import pytest
import torch

from fastloss.losses.contrastive_softmax import contrastive, contrastive_stats_reference
from tests.battery import INTERPRETING, Errors

triton_only = pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1; test_triton.py runs it so")
KINDS = ("diagonal", "diagonal+stash", "diagonal+symmetric", "diagonal+symmetric+stash", "upper+stash")


def values(op, dtype, kind, scale, workspace_mib, rows=37, width=20):
    """Statistics and gradients of every input for an upstream that differs everywhere."""
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(rows, width, generator=random).bfloat16() for _ in range(2))
    scales = [torch.rand(rows, generator=random).to(dtype) * scale + 0.1 for _ in "rc"]
    leaves = [query.to(dtype), key.to(dtype), *scales]
    leaves = [t.requires_grad_() for t in leaves]
    stats = op(*leaves, None, None, None, None, None, kind, 0.0, workspace_mib, False)
    upstream = torch.linspace(-1, 2, stats.numel()).reshape(stats.shape).to(dtype)
    upstream[:, 1] = 0  # the maximum has no gradient
    return stats.detach(), *torch.autograd.grad(stats, leaves, upstream)


@triton_only
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 12.0, 100.0])
@pytest.mark.parametrize("workspace_mib", [0.002, 0.035, 256.0])  # of a stash 0.022 and blocks; with none, blocks too
def test_blocks_and_wide_spreads(kind, scale, workspace_mib):
    """From scale 12 on a tile is too wide for one exponential to serve rows and columns."""
    errors = Errors(torch.float32)
    got = values(contrastive, torch.float32, kind, scale, workspace_mib)
    same = values(contrastive_stats_reference, torch.float32, kind, scale, workspace_mib)
    exact = values(contrastive_stats_reference, torch.float64, kind, scale, workspace_mib)
    for name, *each in zip(("stats", "query", "key", "row_scale", "column_scale"), got, same, exact, strict=True):
        errors.add(name, *each)
    errors.check()


@triton_only
def test_plans_cover_the_blocks_within_their_bounds():
    from fastloss.kernels.contrastive_blocks import block_plan
    from fastloss.kernels.contrastive_table import Tile, walk_plan

    tile = Tile(128, 128, 64, True, True, 4, 3)
    for rows, columns in ((1, 1), (200, 70000), (70000, 200), (65536, 65536), (2**20, 2**20)):
        for elements in (128 * 128, 10**6, 2**27):
            high, wide = block_plan(rows, columns, elements, tile)
            assert high * wide <= elements and wide % tile.columns == 0 and high >= 1
        groups, splits = walk_plan(-(-rows // 128), -(-columns // 128), 264)
        assert groups * splits <= 264 and groups <= -(-rows // 128) and splits <= -(-columns // 128)
    assert walk_plan(64, 64, 264) == (16, 16)
