"""The op of the plain loss with per-sample negatives: what is differentiated, what is kept, edges, what it leaves."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fastloss import NegativeSampling, core, info_nce
from fastloss.contrastive.ops.softmax_loss_per_query import softmax_loss_per_query
from fastloss.contrastive.save_plan import KEY, NEGATIVES, QUERY, SCALE
from tests.conformance.cases import CASES
from tests.conformance.tools import INTERPRETING, Errors, places, recorded

pytestmark = pytest.mark.kernels

CASE = next(case for case in CASES if case.name == "info_nce own negatives")
PLACES = [place for place in places(CASE) if place[1] != "reference"]
each_place = pytest.mark.parametrize("place", PLACES)
BITS = (QUERY, KEY, NEGATIVES, SCALE)
NEEDS = (QUERY, QUERY + KEY, KEY + SCALE, NEGATIVES, QUERY + KEY + SCALE + NEGATIVES)


def inputs(rows: int, count: int, width: int, dtype=torch.float32, device="cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, width, generator=generator)
    key, negatives = (torch.randn(*size, width, generator=generator) for size in ((rows,), (rows, count)))
    return [t.to(device, dtype) for t in (query, query + key, negatives)]


def run(backend: str | None, args: list[Tensor], needs: int, **options) -> list[Tensor]:
    """The loss and the gradients of what `needs` has of query, key, negatives and the temperature."""
    temperature = torch.tensor(0.07, dtype=torch.promote_types(args[0].dtype, torch.float32), device=args[0].device)
    given = [t.detach().clone() for t in (*args, temperature)]
    leaves = [t.requires_grad_() for t, bit in zip(given, BITS, strict=True) if needs & bit]
    with core.use_backend(backend):
        out = info_nce(*given[:3], temperature=given[3] if needs & SCALE else 0.07, **options)
    up = torch.linspace(0.5, 2, out.numel(), dtype=out.dtype, device=out.device).reshape(out.shape)
    return [out.detach(), *(torch.autograd.grad(out, leaves, up) if leaves else ())]


def judge(place: tuple, samples: list[list[Tensor]], needs: int, **options) -> list[Tensor]:
    """The one rule over all the samples; what the last of them gave."""
    errors = Errors(samples[0][0].dtype)
    double = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}
    for args in samples:
        with recorded() as calls:
            ours = run(place[1], args, needs, **options)
        assert [op.name for op, _ in calls] == ["softmax_loss_per_query"]
        results = [ours, run("reference", args, needs, **options)]
        results.append(run("reference", [t.double() for t in args], needs, **double))
        for k, each in enumerate(zip(*results, strict=True)):
            errors.add(str(k), *each)
    errors.check()
    return ours


def scaled(args: list[Tensor], factors=(1.0, 0.97, 0.93, 0.9, 0.87)) -> list[list[Tensor]]:
    return [[factor * t for t in args] for factor in factors]


@each_place
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("needs", NEEDS)
def test_every_gradient(place, needs, dtype):
    shapes = ((3, 9, 33),) if INTERPRETING else ((7, 9, 33), (5, 40, 64), (9, 17, 20))
    options = itertools.product((True, False), (True, False), ("mean", "sum", "none"))
    for normalize, include_positive, reduction in list(options)[:: 5 if INTERPRETING else 1]:
        samples = [sample for shape in shapes for sample in scaled(inputs(*shape, dtype, place[0]))]
        if not normalize:
            samples = [[0.05 * query, *rest] for query, *rest in samples]
        judge(place, samples, needs, normalize=normalize, include_positive=include_positive, reduction=reduction)


@each_place
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights(place, reduction):
    weights = torch.rand(2, 6).T[:, 0].to(place[0])  # with a stride
    weights[2] = 0
    samples = scaled(inputs(6, 11, 20, device=place[0]))
    out = judge(place, samples, QUERY + KEY + SCALE + NEGATIVES, weights=weights, reduction=reduction)
    assert not out[1][2].any() and not out[3][2].any()
    none = run(place[1], samples[0], 0, weights=torch.zeros_like(weights), reduction=reduction)[0]
    assert not none.any()


@each_place
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_negatives_outside_the_mask(place, dtype):
    """They are as if they were not there, and what they hold is not read."""
    mask = torch.arange(14) < torch.tensor([[14], [9], [0], [3], [8], [1]])  # lists of unequal lengths
    mask = mask.to(place[0])
    samples, every = scaled(inputs(6, 14, 20, dtype, place[0])), QUERY + KEY + NEGATIVES + SCALE
    out = judge(place, samples, every, negatives_mask=mask, reduction="none")
    assert out[0][2] == 0 and not out[1][2].any() and not out[3][~mask].any()
    query, key, negatives = samples[-1]
    with_nan = [query, key, negatives.masked_fill(~mask[:, :, None], float("nan"))]
    for ours, wanted in zip(run(place[1], with_nan, every, negatives_mask=mask, reduction="none"), out, strict=True):
        assert torch.equal(ours, wanted)
    for i, length in ((1, 9), (5, 1)):
        alone = run(place[1], [query[i : i + 1], key[i : i + 1], negatives[i : i + 1, :length]], 0, reduction="none")
        torch.testing.assert_close(alone[0], out[0][i : i + 1])


@each_place
def test_zero_vectors_none_and_no_rows(place):
    args = inputs(4, 6, 12, device=place[0])
    args[0][0], args[1][1], args[2][2, 3] = 0, 0, 0
    out = judge(place, scaled(args), QUERY + KEY + NEGATIVES)
    assert not out[1][0].any() and not out[2][1].any() and not out[3][2, 3].any()
    for shape in ((3, 0, 5), (0, 4, 5)):
        loss, *grads = run(place[1], inputs(*shape, device=place[0]), QUERY + KEY + SCALE + NEGATIVES, reduction="sum")
        assert loss == 0 and not any(grad.any() for grad in grads)


@each_place
def test_late_in_training(place):
    """p -> 0.999 and more: the loss and its slope keep their digits."""
    args = inputs(8, 30, 24, device=place[0])
    args[1] = args[0] + 0.01 * args[1]
    assert judge(place, scaled(args), QUERY + KEY + NEGATIVES, include_positive=True)[0] < 1e-2


@each_place
def test_layouts(place):
    query, key, negatives = inputs(3, 10, 8, device=place[0])
    expected = run(place[1], [query, key, negatives], QUERY + KEY + NEGATIVES)
    for form in (lambda t: torch.stack((t, t), -1)[..., 1], lambda t: torch.cat((t, t), 1)[:, : t.shape[1]]):
        given = [form(t) for t in (query, key, negatives)]
        leaves = [t.detach().requires_grad_() for t in given]
        with core.use_backend(place[1]):
            got = torch.autograd.grad(0.5 * info_nce(*leaves, temperature=0.07), leaves)
        assert all(torch.equal(a, b) for a, b in zip(got, expected[1:], strict=True))


@each_place
def test_saved_tensors(place):
    """Frozen negatives leave nothing of K; without gradients nothing is kept at all."""
    query, key, negatives = inputs(3, 10, 8, device=place[0])
    for needs, stats, logits in ((0, 0, 0), (QUERY + KEY + SCALE, 0, 0), (QUERY + NEGATIVES, 12, 30)):
        with core.use_backend(place[1]):
            got = softmax_loss_per_query.fwd(query, key, negatives, None, None, None, 1.0, True, True, "mean", needs)
        sizes = [24 * bool(needs & QUERY), 24 * bool(needs & KEY), 3 * bool(needs & SCALE)]
        assert [t.numel() for t in got] == [1, stats, logits, logits, *sizes]


@each_place
def test_gradients_of_gradients(place):
    args = [t.requires_grad_() for t in inputs(3, 4, 5, device=place[0])]
    results = []
    for backend in (place[1], "reference"):
        with core.use_backend(backend):
            grads = torch.autograd.grad(info_nce(*args), args, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), args))
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-4)


@each_place
def test_options_that_need_softmax_stats_per_query(place):
    query, key, negatives = inputs(3, 10, 8, device=place[0])
    sampling = NegativeSampling(margin=0.1)
    for options in ({"return_lse": True}, {"label_smoothing": 0.1}, {"sampling": sampling}, {"in_batch": True},
                    {"targets": torch.tensor([2, 0, 1], device=place[0])}):  # fmt: skip
        with recorded() as calls, core.use_backend(place[1]):
            info_nce(query, key, negatives, **options)
        assert "softmax_stats_per_query" in [op.name for op, _ in calls], options
    with recorded() as calls, core.use_backend(place[1]):
        info_nce(query, key, negatives, bias=-1.0)
    assert [op.name for op, _ in calls] == ["softmax_loss_per_query"]
