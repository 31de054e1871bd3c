"""Deep-feature losses at the edges of float32, in inference mode and under other default dtypes."""

from __future__ import annotations

import pytest
import torch

from fastloss import PerceptualLoss, core, dists_distance, feature_distance, lpips_distance, tap
from fastloss.perceptual.normalisation import FromImageNet
from tests.conformance.cases import CASES
from tests.conformance.tools import Errors, places
from tests.perceptual.test_perceptual_loss import MEAN, STD, Net, images, twice_pooled

PLACES = places(next(case for case in CASES if case.name == "feature_distance"))
each_place = pytest.mark.parametrize("place", PLACES)
EXTREMES = [{"criterion": "charbonnier", "eps": e} for e in (1e-37, 1e-30, 1e-19, 1e19, 1e30, 1e38)]
EXTREMES += [{"criterion": "smooth_l1", "beta": b} for b in (1.2e-38, 1e-30, 1e30, 3e38)]
EXTREMES += [{"criterion": c, "weights": [3e38, -1e38]} for c in ("l1", "l2", "charbonnier", "smooth_l1")]


def pair(dtype=torch.float32, device="cpu"):
    """Two layers with ties, and differences that are small against 1."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(s, generator=generator) for s in ((2, 3, 5, 7), (2, 4, 3, 3))]
    targets = [f + 0.1 * torch.randn(f.shape, generator=generator).clamp(-0.5, 0.5).round(decimals=1) for f in features]
    return [[t.to(device, dtype) for t in side] for side in (features, targets)]


def run(fn, features, targets, options, upstream=1.0):
    leaves = [t.detach().requires_grad_() for t in (*features, *targets)]
    loss = fn(leaves[: len(features)], leaves[len(features) :], **options)
    return loss.detach(), *torch.autograd.grad(loss, leaves, torch.full_like(loss, upstream))


@each_place
@pytest.mark.parametrize("options", EXTREMES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_options_at_the_edge_of_float32(place, options, reduction):
    """The float64 result, rounded, from the kernels or, where they decline, from the reference."""
    options = options | {"reduction": reduction}
    with core.use_backend(None if place[1] != "reference" else "reference"):
        got = run(feature_distance, *pair(device=place[0]), options)
    with core.use_backend("reference"):
        exact = run(feature_distance, *pair(torch.float64), options)
    for mine, truth in zip(got, exact, strict=True):
        assert mine.isfinite().all()
        bound = 1e-5 * truth.abs().max().item() + 1.2e-38
        assert (mine.double() - truth).abs().max() <= bound, (mine.flatten()[:3], truth.flatten()[:3])


@pytest.mark.parametrize("criterion", ["l1", "l2", "lpips", "dists", "style"])
def test_layers_weights_at_the_edge_of_float32(criterion):
    image, image_pred = images()
    lins = {"lin_weights": [torch.full((3,), 2.0), torch.full((3,), 0.5)]} if criterion == "lpips" else {}
    found = []
    for weights, small in (([3e38, 1e38], 2.0**-100), ([3.0, 1.0], 1.0)):
        loss = PerceptualLoss(twice_pooled, layer_weights=weights, criterion=criterion, **lins)
        value = loss(image, 0.5 * image + 0.5 * image_pred) * small
        found.append((value.detach() / small, torch.autograd.grad(value, image_pred)[0] / small))
    factor = 1.0 if criterion == "dists" else 1e38  # which divides by the sum of the weights
    for huge, plain in zip(*found, strict=True):
        assert plain.abs().max() > 0 and huge.isfinite().all()
        torch.testing.assert_close(huge / factor, plain, rtol=1e-5, atol=1e-6 * plain.abs().max().item())


@each_place
def test_dists_weights_whose_sum_float32_does_not_hold(place):
    features, targets = pair(device=place[0])
    found = []
    for weight in (3e38, 1.0):
        weights = [torch.full((f.shape[1],), weight, device=place[0]) for f in features]
        with core.use_backend(place[1]):
            found.append(run(lambda f, t, w=weights: dists_distance(f, t, w, w), features, targets, {}))
    for huge, plain in zip(*found, strict=True):
        torch.testing.assert_close(huge, plain, rtol=1e-5, atol=1e-6 * plain.abs().max().item())


@each_place
@pytest.mark.parametrize("eps", [1.2e-38, 1e-30, 1e30, 3e38])
def test_lpips_eps_at_the_edge_of_float32(place, eps):
    errors, found = Errors(torch.float32), []
    ours = None if place[1] != "reference" else "reference"  # kernels where they take the call
    for backend, dtype in ((ours, torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        with core.use_backend(backend):
            found.append(run(lambda f, t: lpips_distance(f, t, None, eps=eps), *pair(dtype, place[0]), {}))
    for i, (mine, same, exact) in enumerate(zip(*found, strict=True)):
        if eps < 1:
            errors.add("gradients" if i else "value", mine, same, exact)
        else:
            assert mine.abs().max() <= 1.2e-38
    errors.check()


@each_place
@pytest.mark.parametrize("criterion", ["l1", "l2", "charbonnier", "smooth_l1"])
def test_a_tap_whose_target_alone_learns(place, criterion):
    features, targets = pair(device=place[0])
    feature, target = features[0], targets[0].requires_grad_()
    with core.use_backend(place[1]):
        handed_on, loss = tap(feature, target, criterion=criterion)
        (got,) = torch.autograd.grad(loss, target)
        (expected,) = torch.autograd.grad(feature_distance([feature], [target], criterion=criterion), target)
    assert not handed_on.requires_grad and torch.equal(handed_on, feature) and torch.equal(got, expected)


@pytest.mark.parametrize("criterion", ["l1", "l2", "charbonnier", "smooth_l1", "lpips", "dists", "style"])
@pytest.mark.parametrize("backend", ["reference", None])
def test_targets_of_inference_mode(criterion, backend):
    """Encoded in it, or images made in it: what ordinary tensors give."""
    image, image_pred = images()
    lins = {"lin_weights": False} if criterion == "lpips" else {}
    with core.use_backend(backend) if backend else torch.enable_grad():
        for loss in (PerceptualLoss(Net(), criterion=criterion, **lins),
                     PerceptualLoss(lambda x: [x], criterion=criterion, normalize=False, **lins)):  # fmt: skip
            expected = torch.autograd.grad(loss(image, image_pred), image_pred)[0]
            with torch.inference_mode():
                copied = image.clone()
                encoded = loss.encode(copied)
            for target in (copied, encoded):
                got = torch.autograd.grad(loss(target, image_pred), image_pred)[0]
                assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_rounds_no_constant(dtype):
    image, image_pred = (t.detach() for t in images())
    expected = PerceptualLoss(twice_pooled)(image, image_pred)
    torch.set_default_dtype(dtype)
    try:
        loss = PerceptualLoss(twice_pooled)
        got = loss(image.float(), image_pred.float())
        moved = loss.to("cpu")(image.float(), image_pred.float())
        inception = FromImageNet((0.5,) * 3, (0.5,) * 3)
    finally:
        torch.set_default_dtype(torch.float32)
    for value, exact in ((loss.shift, MEAN), (loss.scale, STD), (inception.scale, STD / 0.5)):
        torch.testing.assert_close(value.float(), exact, rtol=1e-7, atol=0)
    torch.testing.assert_close(got.float(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(moved.float(), expected, rtol=1e-6, atol=0)
    x = torch.rand(1, 3, 2, 2, dtype=dtype)
    assert inception(x).dtype == dtype
