"""Per-sample negatives: sizes around a vector and a tile, pieces, masks, layouts, what is kept, CPUs, threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastloss import core, info_nce
from fastloss.contrastive.ops.softmax_stats_per_query import Inputs, softmax_stats_per_query
from tests.conformance.cases import CASES
from tests.conformance.tools import INTERPRETING, Errors, places, recorded

pytestmark = pytest.mark.kernels

PLACES = places(next(case for case in CASES if case.name == "info_nce own negatives"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = ((False, 0.0), (True, 0.0), (True, 0.5))
each_place = pytest.mark.parametrize("place", PLACES)
each_form = pytest.mark.parametrize(("moments", "hardness"), FORMS)
cpp_only = pytest.mark.skipif(core.backend_report()["cpp"] != "available", reason="the C++ kernels are not built")


def inputs(rows: int, count: int, width: int, dtype=torch.float32, device="cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, width, generator=generator)
    negatives = torch.randn(rows, count, width, generator=generator)
    scale = 0.5 + torch.rand(rows, generator=generator)
    return [query.to(device, dtype), negatives.to(device, dtype), scale.to(device)]


def run(
    backend: str,
    args: list[Tensor],
    moments=False,
    hardness=0.0,
    normalize=True,
    logit_limit=None,
    frozen=False,
    mask=None,
) -> list[Tensor]:
    """Statistics, and the gradients of query, negatives (unless frozen) and scale."""
    double = args[0].dtype == torch.float64
    args = [t.detach().to(torch.float64 if double else t.dtype) for t in args]
    leaves = [t.requires_grad_() for i, t in enumerate(args) if not (frozen and i == 1)]
    logit_limit = logit_limit.double() if double and logit_limit is not None else logit_limit
    with core.use_backend(backend):
        query, negatives, scale = args
        stats = softmax_stats_per_query(
            query,
            negatives,
            mask,
            scale,
            logit_limit,
            normalize,
            moments,
            hardness,
            "weighted_keys" if frozen else "logits",
        )
        upstream = torch.linspace(0.5, 1.5, stats.numel(), device=stats.device).reshape(stats.shape)
        upstream = upstream.masked_fill(stats.isinf(), 0.0).to(stats.dtype)
        return [stats.detach(), *torch.autograd.grad(stats, leaves, upstream)]


def judge(place: tuple, args: list[Tensor], errors: Errors | None = None, **options) -> list[Tensor]:
    """The one rule for statistics and embeddings' gradients; the scale's gradient is a sum that cancels."""
    alone, errors = errors is None, errors or Errors(args[0].dtype)
    doubled = [t.double() for t in args]
    results = [run(place[1], args, **options), run("reference", args, **options), run("reference", doubled, **options)]
    for name, *each in zip(("stats", "query", "negatives"), *(r[:-1] for r in results), strict=False):
        errors.add(name, *each)
    if alone:
        errors.check()
    tolerance = 1e-4 if args[0].dtype == torch.float32 else 2e-2
    torch.testing.assert_close(results[0][-1].double(), results[2][-1], rtol=tolerance, atol=tolerance)
    return results[0]


@each_place
@each_form
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_around_a_vector_and_a_group(place, moments, hardness, dtype):
    shapes = ((2, 9, 33), (1, 1, 3)) if INTERPRETING else ((2, 9, 33), (3, 8, 64), (1, 1, 3), (2, 37, 17), (4, 16, 130))
    for normalize in (True, False):
        errors = Errors(dtype)
        for shape in shapes:
            judge(
                place, inputs(*shape, dtype, place[0]), errors, moments=moments, hardness=hardness, normalize=normalize
            )
        errors.check()


@each_place
@each_form
def test_rows_in_pieces(place, moments, hardness):
    """Few rows with many negatives are shared by several threads or programs and merged in a fixed order."""
    args = inputs(1, 300 if INTERPRETING else 3000, 24, device=place[0])
    first = judge(place, args, moments=moments, hardness=hardness)
    assert all(torch.equal(a, b) for a, b in zip(first, run(place[1], args, moments, hardness), strict=True))


@each_place
@each_form
def test_masks_and_rows_without_negatives(place, moments, hardness):
    args = inputs(4, 20, 12, device=place[0])
    args[1][0, 0] = 0
    logit_limit = torch.tensor([0.1, -1e9, float("nan"), 0.3], device=place[0])
    stats, query, negatives, _ = judge(place, args, moments=moments, hardness=hardness, logit_limit=logit_limit)
    assert stats[0, 1] == -torch.inf and stats[1, 1] == -torch.inf and not query[1].any() and not negatives[1].any()
    assert not negatives[0, 0].any()
    with core.use_backend(place[1]):
        query, negatives, scale = inputs(2, 0, 3, device=place[0])
        none = softmax_stats_per_query(query, negatives, None, scale, None, True, moments, hardness, "")
    assert (none[:2] == -torch.inf).all()


@each_place
@each_form
@pytest.mark.parametrize("normalize", [True, False])
def test_negatives_outside_the_mask(place, moments, hardness, normalize):
    """Groups of eight and tiles that are whole, in part and not at all in the mask; what is outside may be NaN."""
    args = inputs(5, 21, 12, device=place[0])
    mask = torch.ones(5, 21, dtype=torch.bool, device=place[0])
    mask[0, 13:], mask[1, 1::2], mask[2], mask[3, :9] = False, False, False, False
    form = {"moments": moments, "hardness": hardness, "normalize": normalize}
    stats, _, negatives, _ = judge(place, args, mask=mask, **form)
    args[1].masked_fill_(~mask[:, :, None], float("nan"))
    with_nan = run(place[1], args, mask=mask, **form)
    assert torch.equal(with_nan[0], stats) and torch.equal(with_nan[2], negatives)
    assert not negatives[~mask].any() and negatives[mask].all() and (stats[:2, 2] == -torch.inf).all()
    few = run(place[1], [args[0][:1], args[1][:1, :13], args[2][:1]], **form)
    torch.testing.assert_close(few[0], stats[:, :1])  # as if the others were not there
    frozen = run(place[1], args, mask=mask, frozen=True, **form)
    assert torch.equal(frozen[1], with_nan[1])


@each_place
def test_large_and_infinite_logits(place):
    args = inputs(3, 40, 8, device=place[0])
    args[2] *= 200
    judge(place, args, normalize=False)
    args[1][0, 3] = torch.inf * args[0][0].sign()
    assert run(place[1], args, normalize=False)[0][0, 0] == torch.inf


@each_place
def test_layouts(place):
    query, negatives, scale = inputs(3, 10, 8, device=place[0])
    for form in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), lambda t: torch.cat((t, t), 1)[:, ::2],
        lambda t: t[:1].expand_as(t), lambda t: torch.stack((t, t), -1)[..., 1],
    ):  # fmt: skip
        laid = form(negatives)
        expected = run(place[1], [query, laid.contiguous(), scale])
        for got, want in zip(run(place[1], [query, laid, scale]), expected, strict=True):
            assert torch.equal(got, want)


@each_place
def test_frozen_negatives_cost_the_backward_nothing(place):
    """The forward keeps one vector per row and nothing of K; without gradients it keeps nothing."""
    query, negatives, _ = inputs(3, 10, 8, device=place[0])
    none, one, both = (False, False), (True, False), (True, True)
    for requires, save, keys, logits in ((one, "weighted_keys", 24, 0), (both, "logits", 24, 30), (none, "", 0, 0)):
        q, n = (t.detach().requires_grad_(r) for t, r in zip((query, negatives), requires, strict=True))
        with recorded() as calls, core.use_backend(place[1]):
            info_nce(q, query, n, return_lse=True)
        ((op, args),) = calls
        assert op is softmax_stats_per_query and Inputs(*args).save == save
        if place[1] != "reference":
            sizes = [t.numel() for t in op.fwd(*(a.detach() if isinstance(a, Tensor) else a for a in args))]
            assert sizes[1:] == [keys, logits, logits]
    judge(place, inputs(3, 10, 8, device=place[0]), frozen=True)


@cpp_only
@pytest.mark.parametrize("cpu", ["default", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES)
@each_form
def test_every_instruction_set(monkeypatch, cpu, dtype, moments, hardness):
    monkeypatch.setenv("FASTLOSS_CPU", cpu)
    for shape in ((3, 29, 37), (1, 200, 64)):
        judge(("cpu", "cpp"), inputs(*shape, dtype), moments=moments, hardness=hardness)


@cpp_only
@pytest.mark.parametrize("cpu", ["default", "avx2", "avx512"])
def test_large_gradients_are_streamed_whole(monkeypatch, cpu):
    monkeypatch.setenv("FASTLOSS_CPU", cpu)
    for dtype in (torch.float32, torch.bfloat16):
        judge(("cpu", "cpp"), inputs(20, 700, 320, dtype))


@cpp_only
def test_thread_counts_give_the_same_bits():
    args = inputs(3, 500, 48)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run("cpp", args, True, 0.5))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
