"""DISTS beyond the conformance tests: piq's statistics, digits of small distances, layouts, instruction sets,
threads."""

from __future__ import annotations

import pytest
import torch

from fastloss import core, dists_distance
from tests.conformance.cases import CASES
from tests.conformance.cases.perceptual import eager_dists_distance
from tests.conformance.tools import INTERPRETING, Errors, places

pytestmark = pytest.mark.kernels

PLACES = places(next(case for case in CASES if case.name == "dists_distance"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# many samples: on a single number eager may be exact by luck
SHAPES = ((4, 3, 17, 9), (4, 5, 4, 4)) if INTERPRETING else ((8, 3, 97, 61), (8, 5, 16, 16), (8, 2, 1, 1), (8, 7, 3, 5))
each_place = pytest.mark.parametrize("place", PLACES)
cpp_only = pytest.mark.skipif(core.backend_report()["cpp"] != "available", reason="the C++ kernels are not built")


def lists(dtype=torch.float32, device="cpu", mean=0.0, noise=0.3, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    features = [mean + torch.randn(s, generator=generator) for s in shapes]
    targets = [f + noise * torch.randn(f.shape, generator=generator) for f in features]
    return [[t.to(device, dtype) for t in side] for side in (features, targets)]


def values(fn, backend, features, targets):
    features, targets = ([t.detach().requires_grad_() for t in side] for side in (features, targets))
    with core.use_backend(backend):
        out = fn(features, targets)
        upstream = torch.linspace(0.5, 2, out.numel(), device=out.device).to(out.dtype)
        return out.detach(), *torch.autograd.grad(out, (*features, *targets), upstream)


def check(place, features, targets):
    """The conformance tests' rule, against the formula as DISTS has it."""
    errors = Errors(features[0].dtype)
    got = values(dists_distance, place[1], features, targets)
    dense = [[t.contiguous() for t in side] for side in (features, targets)]
    same = values(eager_dists_distance, "reference", *dense)
    exact = values(eager_dists_distance, "reference", *([t.double() for t in side] for side in dense))
    for i, each in enumerate(zip(got, same, exact, strict=True)):
        errors.add("value" if i == 0 else "gradients", *each, where=str(i))
    errors.check()
    return got, exact


@each_place
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_means_far_above_the_deviations(place, dtype, mean):
    check(place, *lists(dtype, place[0], mean))


@each_place
@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_means_near_zero(place, noise):
    """Of many pixels about zero the means are tiny, and the gradients are divided by them: they need all digits."""
    shapes = ((1, 12, 64, 64),) if INTERPRETING else ((2, 64, 256, 256), (2, 64, 32, 32), (2, 64, 1, 1))
    check(place, *lists(device=place[0], noise=noise, shapes=shapes))


@each_place
def test_small_distances_keep_their_digits(place):
    """At a distance of 1e-8 the formula itself has no digit left in float32; the statistics of f - t have all."""
    features, targets = lists(device=place[0], noise=1e-4)
    got, exact = check(place, features, targets)
    torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-4, atol=0)
    for mine, true in zip(got[1:], exact[1:], strict=True):
        assert (mine - true).abs().max() <= 1e-3 * true.abs().max()


@each_place
def test_equal_and_constant_features_have_distance_and_gradient_zero(place):
    features, _ = lists(device=place[0])
    for chosen in (features, [torch.full_like(f, 7.3) for f in features]):
        out, *grads = values(dists_distance, place[1], chosen, [f.clone() for f in chosen])
        assert not out.any() and not any(g.any() for g in grads)


LAYOUTS = {
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "gaps": lambda t: torch.stack([t, t], -1)[..., 1],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@each_place
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(place, layout):
    features, targets = lists(device=place[0])
    check(place, [LAYOUTS[layout](f) for f in features], targets)


@each_place
def test_more_layers_than_a_launch_takes(place):
    check(place, *lists(device=place[0], shapes=[(4, 1 + i % 2, 2, 3 + i % 3) for i in range(10)]))


@cpp_only
@pytest.mark.parametrize("cpu", ["default", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(monkeypatch, cpu, dtype):
    monkeypatch.setenv("FASTLOSS_CPU", cpu)
    check(("cpu", "cpp"), *lists(dtype, mean=2.0))


@cpp_only
def test_thread_counts_give_the_same_bits():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(values(dists_distance, "cpp", *lists()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@cpp_only
def test_large_gradients_are_streamed_whole():
    features, targets = lists(shapes=((2, 8, 512, 512), (2, 3, 999, 501)))
    ours, theirs = (values(dists_distance, backend, features, targets) for backend in ("cpp", "reference"))
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() <= 1e-5 * other.abs().max()


def test_weights_are_normalised_by_their_sum():
    features, targets = lists()
    weights = [torch.rand(f.shape[1]) for f in features], [torch.rand(f.shape[1]) for f in features]
    once = dists_distance(features, targets, *weights)
    scaled = ([3 * w.view(1, -1, 1, 1) for w in side] for side in weights)
    torch.testing.assert_close(dists_distance(features, targets, *scaled), once)
    assert not dists_distance(features, targets, *([0 * w for w in side] for side in weights)).any()


def test_the_statistics_are_piqs():
    piq = pytest.importorskip("piq")
    features, targets = lists(torch.float64)
    weights = [[torch.rand(f.shape[1], dtype=torch.float64) for f in features] for _ in range(2)]
    total = sum(w.sum() for side in weights for w in side)
    similar = piq.DISTS.compute_distance(None, features, targets)  # structure of all layers, then texture
    flat = [w.view(1, -1, 1, 1) / total for side in weights for w in side]
    expected = 1 - sum((w * s).sum((1, 2, 3)) for w, s in zip(flat, similar, strict=True))
    torch.testing.assert_close(dists_distance(features, targets, *weights), expected)
