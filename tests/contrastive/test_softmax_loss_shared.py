"""The op of the plain loss with shared, frozen negatives: both of its ways, what is differentiated, edges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastloss import NegativeSampling, core, info_nce
from fastloss.contrastive.ops.softmax_loss_shared import softmax_loss_shared
from fastloss.contrastive.save_plan import KEY, QUERY, SCALE
from tests.conformance.cases import CASES
from tests.conformance.tools import INTERPRETING, Errors, places, recorded

pytestmark = pytest.mark.kernels

CASE = next(case for case in CASES if case.name == "info_nce bank")
PLACES = [place for place in places(CASE) if place[1] != "reference"]
each_place = pytest.mark.parametrize("place", PLACES)
OPS = {"triton": "softmax_loss_shared", "cpp": "softmax_stats"}  # without kernels of its own it is assembled
BITS = (QUERY, KEY, SCALE)
NEEDS = (QUERY, QUERY + KEY, KEY + SCALE, QUERY + KEY + SCALE)
# One pass for bfloat16 of up to 512 numbers (32 interpreted), several splits; blocks of exponentials for the others.
WAYS = (
    (torch.bfloat16, (18, 70, 20)), (torch.bfloat16, (3, 200, 33)), (torch.float16, (5, 37, 20)),
    (torch.float32, (5, 37, 20)),
)  # fmt: skip

if any(place[0] == "cuda" for place in PLACES):  # a tile for each width; the interpreter has one
    WAYS += tuple((torch.bfloat16, (130, 9001, width)) for width in (512, 300, 256, 128, 96, 600))


def inputs(rows: int, count: int, width: int, dtype=torch.bfloat16, device="cpu", seed=0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key, negatives = (torch.randn(size, width, generator=generator) for size in (rows, rows, count))
    return [t.to(device, dtype) for t in (query, query + key, negatives)]


def run(backend: str | None, args: list[Tensor], needs: int, **options) -> list[Tensor]:
    """The loss and the gradients of what `needs` has of query, key and the temperature."""
    temperature = torch.tensor(0.07, dtype=torch.promote_types(args[0].dtype, torch.float32), device=args[0].device)
    query, key, negatives, temperature = [t.detach().clone() for t in (*args, temperature)]
    leaves = [t.requires_grad_() for t, bit in zip((query, key, temperature), BITS, strict=True) if needs & bit]
    with core.use_backend(backend):
        out = info_nce(query, key, negatives, temperature=temperature if needs & SCALE else 0.07, **options)
    up = torch.linspace(0.5, 2, out.numel(), dtype=out.dtype, device=out.device).reshape(out.shape)
    return [out.detach(), *(torch.autograd.grad(out, leaves, up) if leaves else ())]


def judge(place: tuple, samples: list[list[Tensor]], needs: int, **options) -> list[Tensor]:
    """The one rule over all the samples; what the last of them gave."""
    errors = Errors(samples[0][0].dtype)
    double = {k: v.double() if k == "weights" else v for k, v in options.items()}
    for args in samples:
        with recorded() as calls:
            ours = run(place[1], args, needs, **options)
        assert [op.name for op, _ in calls] == [OPS[place[1]]]
        results = [ours, run("reference", args, needs, **options)]
        results.append(run("reference", [t.double() for t in args], needs, **double))
        for k, each in enumerate(zip(*results, strict=True)):
            errors.add(str(k), *each)
    errors.check()
    return ours


@each_place
@pytest.mark.parametrize(("dtype", "shape"), WAYS)
def test_every_gradient(place, dtype, shape):
    options = ((True, True, "mean"), (True, False, "sum"), (False, True, "none"), (False, False, "mean"))
    for needs, (normalize, include_positive, reduction) in zip(NEEDS, options, strict=True):
        samples = [inputs(*shape, dtype, place[0], seed) for seed in range(2)]
        if not normalize:
            samples = [[0.05 * query, *rest] for query, *rest in samples]
        judge(place, samples, needs, normalize=normalize, include_positive=include_positive, reduction=reduction)
    judge(place, samples, 0)


@each_place
@pytest.mark.parametrize("workspace_mib", [0.001, 0.01])
def test_small_workspaces(place, workspace_mib):
    """Of few splits, or of none that holds the sums; blocks of exponentials of few rows."""
    for dtype in (torch.bfloat16, torch.float16):
        judge(place, [inputs(19, 60, 20, dtype, place[0], seed) for seed in range(2)], 7, workspace_mib=workspace_mib)


@each_place
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_weights(place, reduction):
    weights = torch.rand(2, 6).T[:, 0].to(place[0])  # with a stride
    weights[2] = 0
    samples = [inputs(6, 50, 20, device=place[0], seed=seed) for seed in range(2)]
    out = judge(place, samples, QUERY + KEY + SCALE, weights=weights, reduction=reduction)
    assert not out[1][2].any() and not out[2][2].any()
    samples[0][0][2] = torch.nan  # the row that is left out
    assert all(t.isfinite().all() for t in run(place[1], samples[0], QUERY + KEY + SCALE, weights=weights))
    none = run(place[1], samples[1], QUERY, weights=torch.zeros_like(weights), reduction=reduction)
    assert not none[0].any() and not none[1].any()


@each_place
def test_ids(place):
    """A row whose id all negatives have is left without any; ids of the keys alone leave out nothing."""
    for dtype in (torch.bfloat16, torch.float16):
        samples = [inputs(5, 40, 20, dtype, place[0], seed) for seed in range(2)]
        query_ids = torch.tensor([3, 1, 7, 2, 3], device=place[0])
        key_ids = torch.cat((query_ids, torch.arange(40, device=place[0]) % 4))
        judge(place, samples, QUERY + KEY, query_ids=query_ids, key_ids=key_ids)
        loss, query_grad, _ = run(
            place[1], samples[0], QUERY + KEY, reduction="none", query_ids=query_ids,
            key_ids=torch.cat((query_ids, torch.full((40,), 3, device=place[0]))),
        )  # fmt: skip
        assert (loss == 0).tolist() == [True, False, False, False, True] and not query_grad[0].any()
    plain = run(place[1], samples[0], QUERY + KEY)
    own = run(place[1], samples[0], QUERY + KEY, query_ids=query_ids, key_ids=query_ids)
    assert all(torch.equal(a, b) for a, b in zip(plain, own, strict=True))


@each_place
def test_zero_vectors_none_and_no_rows(place):
    for dtype in (torch.bfloat16, torch.float16):
        args = inputs(4, 20, 12, dtype, place[0])
        args[0][0], args[1][1], args[2][2] = 0, 0, 0
        out = judge(place, [args, inputs(4, 20, 12, dtype, place[0], 1), args], QUERY + KEY)
        assert not out[1][0].any() and not out[2][1].any()
        for shape in ((3, 0, 5), (0, 4, 5)):
            empty = inputs(*shape, dtype, place[0])
            loss, *grads = run(place[1], empty, QUERY + KEY + SCALE, reduction="sum")
            assert loss == 0 and not any(grad.any() for grad in grads)


@each_place
def test_far_apart_logits(place):
    """Rows whose maxima rise by hundreds from split to split, and rows that are done."""
    args = inputs(18, 100, 16, device=place[0])
    args[2] *= torch.linspace(0, 30, 100, device=place[0])[:, None].to(args[2].dtype)
    late = [args[0], args[0] + 0.01 * args[1], args[2]]
    judge(place, [args, late], QUERY + KEY, normalize=False)
    assert judge(place, [late, args, late], QUERY + KEY)[0] < 2e-2


@each_place
def test_layouts_and_saved_tensors(place):
    query, key, negatives = inputs(3, 10, 8, device=place[0])
    expected = run(place[1], [query, key, negatives], QUERY + KEY)
    for form in (lambda t: torch.stack((t, t), -1)[..., 1], lambda t: torch.cat((t, t), 1)[:, : t.shape[1]]):
        *leaves, bank = [form(t).detach() for t in (query, key, negatives)]
        leaves = [t.requires_grad_() for t in leaves]
        with core.use_backend(place[1]):
            got = torch.autograd.grad(0.5 * info_nce(*leaves, bank, temperature=0.07), leaves)
        assert all(torch.equal(a, b) for a, b in zip(got, expected[1:], strict=True))
    for needs in (0, QUERY, QUERY + KEY + SCALE) if place[1] == "triton" else ():
        got = softmax_loss_shared.fwd(
            query, key, negatives, None, None, None, None, 1.0, True, True, "mean", needs, 256.0
        )
        sizes = [24 * bool(needs & QUERY), 24 * bool(needs & KEY), 3 * bool(needs & SCALE)]
        assert [t.numel() for t in got] == [1, *sizes]


@each_place
def test_options_that_need_statistics(place):
    query, key, negatives = inputs(3, 10, 8, device=place[0])
    learned, targets = negatives.clone().requires_grad_(), torch.tensor([2, 0, 1], device=place[0])
    others = ({"return_lse": True}, {"label_smoothing": 0.1}, {"sampling": NegativeSampling(margin=0.1)},
              {"in_batch": True}, {"targets": targets}, {"negatives": learned})  # fmt: skip
    for options in others:
        with recorded() as calls, core.use_backend(place[1]):
            info_nce(query, key, **({"negatives": negatives} | options))
        assert "softmax_loss_shared" not in [op.name for op, _ in calls], options
    with recorded() as calls, core.use_backend(place[1]):
        info_nce(query, key, negatives, bias=-1.0)
    assert [op.name for op, _ in calls] == [OPS[place[1]]]


@pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1; tests/triton runs it so")
def test_splits():
    from fastloss.contrastive.kernels.softmax_loss_shared import SLOTS
    from fastloss.contrastive.kernels.weighted_keys import TABLE, splits_of

    assert max(programs for programs, _ in TABLE.values()) <= SLOTS
    assert splits_of(4, 1024, 132, 10**6) == 32
    assert splits_of(4, 1024, 132, 5) == 5 and splits_of(4, 1024, 132, 0) == 1
    assert splits_of(500, 1024, 132, 10**6) <= 5 and splits_of(1, 3, 132, 10**6) <= 3
