"""The Triton launchers: blocks of G within the workspace, plans, exponents that lie far apart."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastloss.contrastive.ops.softmax_loss import Inputs as LossInputs
from fastloss.contrastive.ops.softmax_loss import softmax_loss
from fastloss.contrastive.ops.softmax_stats import Inputs, softmax_statistics, softmax_stats
from fastloss.contrastive.options import Form
from fastloss.contrastive.save_plan import save_of_loss, save_of_stats
from tests.conformance.tools import INTERPRETING, Errors, recorded

pytestmark = pytest.mark.kernels

triton_only = pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1; tests/triton runs it so")
ONE, BOTH, SELF = Form(diagonal=True), Form(diagonal=True, symmetric=True), Form(self_similarity=True)
FORMS = {  # whether exponentials are saved
    "one": (ONE, False), "one saved": (ONE, True), "both": (BOTH, False), "both saved": (BOTH, True),
    "self saved": (SELF, True),
}  # fmt: skip


def values(op, dtype, form, saved, scale, workspace_mib, rows=37, width=20):
    """Statistics and gradients of every input for an upstream that differs everywhere."""
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(rows, width, generator=random).bfloat16() for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scales = [torch.rand(rows, generator=random).to(wide) * scale + 0.1 for _ in "rc"]
    leaves = [query.to(dtype), key.to(dtype), *scales]
    leaves = [t.requires_grad_() for t in leaves]
    x = Inputs(*leaves, None, None, None, None, None, *form, 0.0, workspace_mib)
    if saved:
        x = x._replace(save=save_of_stats("triton", query, key, form, None, None, 0.0, workspace_mib, True))
    stats = op(*x)
    upstream = torch.linspace(-1, 2, stats.numel()).reshape(stats.shape).to(wide)
    upstream[:, 1] = 0  # the maximum has no gradient
    return stats.detach(), *torch.autograd.grad(stats, leaves, upstream)


@triton_only
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("scale", [1.0, 12.0, 100.0])
@pytest.mark.parametrize("workspace_mib", [0.002, 0.035, 256.0])  # exponentials take 0.022
def test_blocks_and_wide_spreads(name, scale, workspace_mib):
    """From scale 12 on a tile is too wide for one exponential to serve rows and columns."""
    form, saved = FORMS[name]
    dtype = torch.bfloat16 if saved else torch.float32  # exponentials are saved in half precision only
    errors = Errors(dtype)
    got = values(softmax_stats, dtype, form, saved, scale, workspace_mib)
    same = values(softmax_stats.reference, dtype, form, saved, scale, workspace_mib)
    exact = values(softmax_stats.reference, torch.float64, form, saved, scale, workspace_mib)
    for name, *each in zip(("stats", "query", "key", "row_scale", "column_scale"), got, same, exact, strict=True):
        errors.add(name, *each)
    errors.check()


@triton_only
def test_plans_cover_the_blocks_within_their_bounds():
    from fastloss.contrastive.kernels.blocking import block_plan, walk_plan
    from fastloss.contrastive.kernels.tile_configs import Tile

    tile = Tile(128, 128, 64, True, True, 4, 3)
    for rows, columns in ((1, 1), (200, 70000), (70000, 200), (65536, 65536), (2**20, 2**20)):
        for elements in (128 * 128, 10**6, 2**27):
            block_rows, block_columns = block_plan(rows, columns, elements, tile)
            assert block_rows * block_columns <= elements and block_columns % tile.columns == 0 and block_rows >= 1
        groups, splits = walk_plan(-(-rows // 128), -(-columns // 128), 264)
        assert groups * splits <= 264 and groups <= -(-rows // 128) and splits <= -(-columns // 128)
    assert walk_plan(64, 64, 264) == (16, 16)


@triton_only
def test_chunks_are_of_alike_sizes():
    from fastloss.contrastive.kernels.blocking import CHUNK, chunk_plan

    for rows, columns, workspace_mib in (
        (32768, 32768, 256.0),
        (65536, 65536, 256.0),
        (300, 2**20, 64.0),
        (50, 9, 1.0),
    ):
        chunk = chunk_plan(rows, columns, 2, workspace_mib)
        *whole, last = [min(chunk.rows, rows - start) for start in range(0, rows, chunk.rows)]
        assert chunk.elements * 2 <= workspace_mib * 2**20 and set(whole) <= {chunk.rows}
        assert chunk.rows - last < CHUNK * len(whole) or chunk.rows < CHUNK
    assert chunk_plan(32768, 32768, 2, 256.0).rows == 3328  # ten chunks, the last of 2816; not of 3584, the last of 512


def plain_values(op, dtype, needs, symmetric, options, workspace_mib, rows=19, keys=33, width=20):
    """The loss and the gradients of what `needs` says."""
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(n, width, generator=random).bfloat16().to(dtype) for n in (rows, keys))
    key[3] = 0
    key = key[:rows] if symmetric else key
    scale = torch.tensor(7.0, dtype=dtype if dtype == torch.float64 else torch.float32)
    row_weight = torch.rand(rows, generator=random).to(scale.dtype) if options.get("row_weight") else None
    targets = None if symmetric else torch.arange(rows).flip(0)
    targets = targets if options.get("targets") else None
    leaves = [t for bit, t in ((1, query), (2, key), (4, scale)) if needs & bit]
    for t in leaves:
        t.requires_grad_()
    reduction = options.get("reduction", "mean")
    out = op(
        query, key, scale, row_weight, targets, 0.5, options.get("include_positive", True), symmetric,
        options.get("normalize", True), reduction, needs,
        *save_of_loss("triton", query, key, symmetric, reduction, needs, workspace_mib), workspace_mib,
    )  # fmt: skip
    upstream = torch.linspace(0.5, 2, out.numel(), dtype=out.dtype).reshape(out.shape)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


# chunks of some rows, of more, of all; blocks of G with and without saved exponentials
@triton_only
@pytest.mark.parametrize("workspace_mib", [0.004, 0.02, 256.0])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_losses_in_every_workspace(dtype, symmetric, workspace_mib):
    for name, needs, options in (
        ("all", 7, {"row_weight": True}),
        ("frozen keys", 5, {"reduction": "none", "normalize": False}),
        ("keys", 2, {"targets": True, "reduction": "sum", "include_positive": False}),
        ("scale", 4, {"row_weight": True, "reduction": "none", "targets": True}),
    ):
        errors = Errors(dtype)
        given = needs, symmetric, options, workspace_mib
        got = plain_values(softmax_loss, dtype, *given)
        same = plain_values(softmax_loss_eager, dtype, *given)
        exact = plain_values(softmax_loss.reference, torch.float64, *given)
        for i, each in enumerate(zip(got, same, exact, strict=True)):
            errors.add(f"{name} {i}", *each)
        errors.check()


def softmax_loss_eager(query, key, *rest):
    """As a user's dense torch has it: products in the embeddings' dtype."""
    x = LossInputs(query, key, *rest)
    column, symmetric = torch.arange(key.shape[0]), x.symmetric
    if x.normalize:
        query, key = (torch.nn.functional.normalize(t, dim=1) for t in (query, key))
    logits = (x.scale * x.fixed_scale).to(query.dtype) * (query @ key.T)
    target = column[: logits.shape[0]] if x.targets is None else x.targets

    def rows(s, target):
        positive = s.gather(1, target[:, None])[:, 0]
        left_out = s.masked_fill(column[: s.shape[1]] == target[:, None], -torch.inf) if not x.include_positive else s
        return left_out.logsumexp(1) - positive

    loss = rows(logits, target)
    loss = ((loss + rows(logits.T, target)) / 2 if symmetric else loss).float()
    loss = loss if x.row_weight is None else loss * x.row_weight
    return loss if x.reduction == "none" else getattr(loss, x.reduction)()


@triton_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("workspace_mib", [0.008, 256.0])
def test_frozen_keys_leave_a_backward_without_products(dtype, workspace_mib):
    """The weighted keys are summed in the forward, a chunk of rows at a time; without and with a diagonal."""
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(n, 20, generator=random).bfloat16() for n in (37, 50))
    scales = torch.rand(37, generator=random) + 0.5, torch.rand(50, generator=random) * 4
    for form in (Form(), ONE):
        errors, results = Errors(dtype), []
        for op, precision in ((softmax_statistics, dtype), (eager, dtype), (eager, torch.float64)):
            wide = torch.float64 if precision == torch.float64 else torch.float32
            leaves = query.to(precision).requires_grad_(), scales[0].to(wide).requires_grad_()
            with recorded() as calls:
                stats = op(Inputs(
                    leaves[0], key.to(precision), leaves[1], scales[1].to(wide), *[None] * 5, *form, 0.0, workspace_mib
                ))  # fmt: skip
            if op is softmax_statistics:
                assert Inputs(*calls[0][1]).save == "weighted_keys"
            upstream = torch.linspace(-1, 2, 37, dtype=wide)
            results.append((stats.detach()[:, :1], *torch.autograd.grad(stats[0, 0], leaves, upstream)))
        for i, each in enumerate(zip(*results, strict=True)):
            errors.add(str(i), *each)
        errors.check()


def eager(x):
    return softmax_stats.reference(*x)


@pytest.mark.parametrize("line", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_forward_and_backward_have_tiles_of_one_width_where_exponentials_are_saved(monkeypatch, line, dtype):
    from fastloss.contrastive.kernels import logit_matrix
    from fastloss.contrastive.kernels.arguments import Columns, Rows
    from fastloss.core.kernels import tile_table

    monkeypatch.setattr(tile_table, "target_of", lambda device: line)
    for form, rows, dim, ids in itertools.product((ONE, BOTH, SELF), (200, 4096), (16, 32, 77, 512), (False, True)):
        query = torch.empty(rows, dim, dtype=dtype, device="meta")
        vector = torch.empty(rows, dtype=torch.int64, device="meta") if ids else None
        of_rows = Rows(torch.empty(rows, device="meta"), None, vector, None)
        widths = {
            logit_matrix.LogitMatrix(
                query, query, of_rows, Columns(None, None, vector), form, 0.0, backward, True
            ).tile.columns
            for backward in (False, True)
        }  # fmt: skip
        assert len(widths) == 1, (form, rows, dim, ids)


def test_one_row_of_any_stride_is_given_to_the_copy_engine_densely():
    from fastloss.core.kernels.matmul import embeddings

    big = torch.arange(84.0).reshape(4, 21)
    for one in (big[:1, :16], torch.zeros(16, 1).T, big[1:2, 5:21]):
        dense = embeddings(one)
        assert dense.stride() == (16, 1) and dense.data_ptr() % 16 == 0 and torch.equal(dense, one)
