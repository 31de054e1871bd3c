"""Smoothness kernels that march down the rows: stretches, blocks of columns, guides and weights of any layout.

The sizes here are small; the constants by which images are cut are made small too.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from fastloss import core, smoothness_loss
from fastloss.core import plans
from fastloss.image.smoothness import Inputs
from tests.conformance.tools import INTERPRETING, Errors
from tests.image.test_smoothness_kernels import KINDS, PLACES, last, random, values

pytestmark = pytest.mark.kernels

each_place = pytest.mark.parametrize("place", [p for p in PLACES if "triton" in str(p)])
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def march(monkeypatch):
    """The kernels' module, with images of any width cut into stretches of 3 rows."""
    module = importlib.import_module("fastloss.image.kernels.smoothness_march")
    monkeypatch.setattr(module, "LEAST_WIDTH", 1)
    monkeypatch.setattr(module, "LEAST_ROWS", 3)
    monkeypatch.setattr(plans, "ENABLED", False)
    assert module.marches(Inputs(random(1, 1, 2, 2), None, None, "l1", 1))
    return module


def _cropped(t):
    """A view whose rows do not begin where vectors do."""
    return torch.nn.functional.pad(t, (3, 2))[..., 3:-2]


OPTIONS = {
    "plain": lambda guide, weight: (None, None),
    "guide": lambda guide, weight: (guide, None),
    "guide and weight": lambda guide, weight: (guide, weight[:, :1].expand_as(weight)),
    "of each channel": lambda guide, weight: (guide[:, :1], weight[:1, :, :1, :1].expand_as(weight)),
    "channels_last and cropped": lambda guide, weight: (last(guide), _cropped(weight)),
    "mask": lambda guide, weight: (None, (weight > 0.6).transpose(2, 3).contiguous().transpose(2, 3)),
}


@each_place
@each_kind
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(march, place, kind, options):
    """Widths of whole vectors and others, in one block of columns and in two."""
    shapes = {torch.float32: ((1, 2, 4, 132),), torch.bfloat16: ((1, 2, 2, 24), (1, 2, 2, 19))}
    if not INTERPRETING:
        shapes = {torch.float32: ((2, 3, 70, 515), (1, 3, 4, 132), (2, 2, 1, 7)), torch.bfloat16: ((1, 3, 69, 520),)}
    for dtype, each in shapes.items():
        errors = Errors(dtype)
        for shape in each:
            image = random(*shape, dtype=dtype, device=place[0])
            guide = random(shape[0], 3, *shape[2:], dtype=dtype, device=place[0])
            guide, weight = options(guide, random(*shape, device=place[0]) + 0.5)
            runs = [values(b, image, kind, 1, guide, weight) for b in (place[1], "reference")]
            double = (t if t is None else t.double() for t in (guide, weight))
            exact = values("reference", image.double(), kind, 1, *double)
            for name, *same in zip(("sums", "gradient"), *runs, exact, strict=True):
                errors.add(name, *same, str(shape))
        errors.check()


@each_place
@each_kind
def test_weights_of_0_exclude_even_nan(march, place, kind):
    image, guide = random(1, 2, 5, 12, device=place[0]), random(1, 3, 5, 12, device=place[0])
    weight = torch.ones(1, 1, 5, 12, device=place[0])
    weight[..., 2, 7] = weight[..., 1, 7] = weight[..., 2, 6] = 0
    results = []
    for fill in (float("nan"), float("inf"), 0.0):
        image[..., 2, 7] = guide[..., 2, 7] = fill
        results.append(values(place[1], image, kind, 1, guide, weight.expand_as(image)))
    for sums, gradient in results:
        torch.testing.assert_close([sums, gradient], results[-1], rtol=0, atol=0)
        assert not gradient[..., 2, 7].any() and gradient.count_nonzero() > 0


@each_place
@each_kind
def test_infinities_reach_only_their_neighbours(march, place, kind):
    for y, x in ((0, 0), (3, 10), (2, 7)):
        image = random(1, 1, 4, 11, device=place[0])
        image[..., y, x] = float("inf")
        got, expected = (values(backend, image, kind) for backend in (place[1], "reference"))
        torch.testing.assert_close(got[0], expected[0], equal_nan=True)
        near = torch.zeros(4, 11, dtype=torch.bool)
        near[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2] = True
        torch.testing.assert_close(got[1][0, 0][~near], expected[1][0, 0][~near])


@each_place
def test_what_is_tuned_changes_no_gradient(march, place, monkeypatch):
    image, guide = random(1, 2, 7, 20, device=place[0]), random(1, 1, 7, 20, device=place[0])
    inputs = (image, "isotropic", 1, guide, image[:, :1].expand_as(image))
    expected = values(place[1], *inputs)
    for name, value in {"READ_AHEAD": True, "ROWS_AT_ONCE": 1, "LEAST_ROWS": 5, "WARPS": 2}.items():
        with monkeypatch.context() as changed:
            changed.setattr(march, name, value)
            torch.testing.assert_close(values(place[1], *inputs), expected)


def mean(backend, image, **options):
    image = image.detach().requires_grad_()
    with core.use_backend(backend):
        loss = smoothness_loss(image, **options)
        return loss, torch.autograd.grad(3 * loss, image)[0]


@each_place
@pytest.mark.parametrize("p", [1, 2, "isotropic"])
def test_weighted_means(march, place, p):
    """In one op with the sums, of images by rows and of what goes in tiles; weights that are all 0 give 0."""
    image, guide = random(2, 2, 3, 12, device=place[0]), random(2, 1, 3, 12, device=place[0])
    weight = random(2, 1, 3, 12, device=place[0]) + 0.25
    calls = [(image, {"guide": guide, "weight": weight}), (image, {"weight": image + 0.5})]
    if p == 1 or not INTERPRETING:
        calls += [
            (image, {"guide": guide, "weight": torch.zeros_like(weight)}),
            (last(image), {"guide": guide, "weight": weight}),
            (image[:, :, None], {"order": 2, "weight": weight[:, :, None]}),
        ]
    for pred, options in calls:
        got, expected = (mean(backend, pred, p=p, **options) for backend in (place[1], "reference"))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    infinite = torch.full_like(weight, 3e38)
    assert mean(place[1], image, p=p, weight=infinite)[0].isnan()


@each_place
def test_weighted_means_are_differentiable_twice(march, place):
    image, weight, second = random(1, 2, 4, 12, device=place[0]), random(1, 1, 4, 12, device=place[0]), []
    for backend in (place[1], "reference"):
        pred = image.clone().requires_grad_()
        with core.use_backend(backend):
            loss = smoothness_loss(pred, p=2, weight=weight)
            first = torch.autograd.grad(loss, pred, create_graph=True)[0]
            second.append(torch.autograd.grad((first * first).sum(), pred)[0])
    torch.testing.assert_close(*second)


@each_place
def test_means_by_the_smallest_weights(march, place):
    """Their sum is a number, one over it is none."""
    image, weight = random(1, 1, 3, 5).to(place[0]), torch.full((1, 1, 3, 5), 1e-41, device=place[0])
    got, expected = (mean(backend, image, weight=weight)[0] for backend in (place[1], "reference"))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=0)  # such weights have some 13 bits


@each_place
def test_flat_pixels_have_no_isotropic_gradient_whatever_comes(march, place):
    image = torch.zeros(1, 1, 3, 5, device=place[0])
    image[..., 1, 2] = 1.0
    weight = torch.full_like(image, float("inf"))
    got, expected = (values(backend, image, "isotropic", weight=weight)[1] for backend in (place[1], "reference"))
    assert torch.equal(got == 0, expected == 0) and (got == 0).sum() == 8
