"""NaN in, NaN out: the deep-feature losses at NaN and infinity in either list, against eager, on every backend."""

from __future__ import annotations

import math

import pytest
import torch

from fastloss import core, dists_distance, feature_distance, lpips_distance, style_distance, tap
from tests.conformance.cases import CASES
from tests.conformance.cases.perceptual import (
    eager_dists_distance,
    eager_feature_distance,
    eager_lpips_distance,
    eager_style_distance,
)
from tests.conformance.tools import INTERPRETING, places

PLACES = places(next(case for case in CASES if case.name == "feature_distance"))
NAN, INF = math.nan, math.inf
PAIRS = ((NAN, 1.0), (1.0, NAN), (INF, 1.0), (-INF, 1.0), (1.0, INF), (1.0, -INF), (INF, -INF), (INF, INF), (NAN, INF))
OPTIONS = ({}, {"criterion": "l2"}, {"criterion": "charbonnier", "eps": 0.1}, {"criterion": "smooth_l1", "beta": 0.3},
           {"criterion": "smooth_l1", "beta": 0.3, "reduction": "none"}, {"reduction": "none"})  # fmt: skip
SHAPES = ((2, 3, 5, 7), (2, 33))  # with and without a whole group of signs
DTYPES = (torch.float32, torch.float16) if INTERPRETING else (torch.float32, torch.bfloat16, torch.float16)
each_place = pytest.mark.parametrize("place", PLACES)


def lists(pair, shapes, dtype=torch.float32, device="cpu"):
    """The pair stands in the first and in the last element of the second layer."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(s, generator=generator) for s in shapes]
    targets = [f + torch.randn(f.shape, generator=generator) for f in features]
    for side, value in zip((features, targets), pair, strict=True):
        side[1].view(-1)[0] = side[1].view(-1)[-1] = value
    return [[t.to(device, dtype) for t in side] for side in (features, targets)]


def run(fn, features, targets, **options):
    leaves = [t.detach().requires_grad_() for t in (*features, *targets)]
    out = fn(leaves[: len(features)], leaves[len(features) :], **options)
    upstream = torch.linspace(0.5, 2, out.numel()).reshape(out.shape).to(out)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


def agree(ours, eager, rtol=1e-5):
    for mine, theirs in zip(ours, eager, strict=True):
        rtol_of = max(rtol, 2 * torch.finfo(mine.dtype).eps)
        largest = theirs.double().abs().nan_to_num(0, 0, 0).max().item()
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=rtol_of, atol=rtol_of * largest, equal_nan=True)


@each_place
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_elementwise(place, options, dtype):
    for pair in PAIRS:
        features, targets = lists(pair, SHAPES, dtype, place[0])
        with core.use_backend(place[1]):
            value, *grads = run(feature_distance, features, targets, **options)
        wide = [[t.float() for t in side] for side in (features, targets)]
        expected, *eager = run(eager_feature_distance, *wide, **options)
        if options.get("criterion", "l1") == "l1":  # torch's |d| has the gradient 0 where d is NaN
            for k, f in enumerate((*wide[0], *wide[1])):
                other = (*wide[1], *wide[0])[k]
                eager[k] = torch.where((f - other).isnan(), NAN, eager[k])
        agree((value, *grads), (expected, *eager))
        bad = math.isnan(pair[0] - pair[1])
        for grad in (grads[1], grads[3]):
            assert grad.isfinite().sum() == grad.numel() - (2 if bad or not at_an_infinity(options) else 0)


def at_an_infinity(options):
    """Whether the gradient at an infinite difference is a number."""
    return options.get("criterion", "l1") in ("l1", "smooth_l1")


@each_place
@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_tap(place, options):
    for pair in PAIRS:
        features, targets = lists(pair, SHAPES, device=place[0])
        f, t = (side[1].requires_grad_() for side in (features, targets))
        with core.use_backend(place[1]):
            handed_on, distance = tap(f, t, **options)
            got = torch.autograd.grad(0.25 * handed_on.nan_to_num(0, 0, 0).sum() + distance, (f, t))
            _, own_f, own_t = run(feature_distance, [f], [t], **options)
        finite = f.detach().isfinite()
        agree((distance, *got), (feature_distance([f], [t], **options).detach(), 2 * own_f + 0.25 * finite, 2 * own_t))


@each_place
@pytest.mark.parametrize("criterion", ["l1", "smooth_l1"])
def test_style(place, criterion):
    """A pixel of NaN spoils a row and a column of the Gram matrix, and through them the gradient of its sample."""
    for pair in PAIRS:
        features, targets = lists(pair, ((2, 3, 5, 7), (2, 2, 3, 3)), device=place[0])
        with core.use_backend(place[1]):
            value, *grads = run(style_distance, features, targets, criterion=criterion)
        expected, *eager = run(eager_style_distance, features, targets, criterion=criterion)
        agree((value, grads[0], grads[2]), (expected, eager[0], eager[2]))
        assert value.isfinite().item() is False
        for mine, theirs in ((grads[1], eager[1]), (grads[3], eager[3])):
            assert not mine[~theirs.isfinite()].isfinite().any()
        if math.isnan(sum(pair)):
            assert grads[1].isnan().any() and grads[3].isnan().any()


@each_place
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["lpips", "dists"])
def test_heads(place, name, layout):
    """The sample with the NaN is NaN, and so is the gradient of what it is compared with; the others are as ever."""
    ours, eager_fn = {
        "lpips": (lambda f, t: lpips_distance(f, t, None), lambda f, t: eager_lpips_distance(f, t, None)),
        "dists": (dists_distance, eager_dists_distance),
    }[name]
    for pair in PAIRS:
        features, targets = lists(pair, ((3, 4, 3, 3), (3, 2, 4, 4)), device=place[0])
        features, targets = ([x.contiguous(memory_format=layout) for x in side] for side in (features, targets))
        with core.use_backend(place[1]):
            value, *grads = run(ours, features, targets)
        expected, *eager = run(eager_fn, features, targets)
        assert value[0].isnan() and value[2].isnan()
        agree((value, grads[0], grads[2]), (expected, eager[0], eager[2]), 1e-4)
        for mine, theirs in ((grads[1], eager[1]), (grads[3], eager[3])):
            assert mine.isnan().any()
            finite = theirs.isfinite() & mine.isfinite()
            agree([torch.where(finite, mine, 0)], [torch.where(finite, theirs, 0)], 1e-4)
            assert not mine[~theirs.isfinite()].isfinite().any()
            assert mine[1].isfinite().all()
