"""Pixel loss kernels: weights, memory layouts, upstream gradients and edges that a row of cases.py cannot say."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastloss import core, pixel_loss
from tests.battery import Errors, places
from tests.cases import CASES, Draw, image_pair

PLACES = places(next(case for case in CASES if case.name == "pixel_loss"))
SHAPE = (2, 3, 5, 7)
KINDS = [{"p": 1}, {"p": 2}, {"p": 1.5}, {"p": "charbonnier", "eps": 0.1}, {"p": "huber", "delta": 0.1}]
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "reversed": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "sliced": lambda t: torch.stack((t, t), -1)[..., 1],
    "expanded": lambda t: t[:, :1].expand_as(t),
}
each_place = pytest.mark.parametrize("place", PLACES)


def values(backend, image, image_pred, upstream=None, needs=(True, True), **options):
    """[loss, gradient of image, gradient of image_pred] on a backend."""
    image, image_pred = image.detach(), image_pred.detach()
    wrt = [t.requires_grad_() for t, needed in zip((image, image_pred), needs, strict=True) if needed]
    with core.use_backend(backend):
        loss = pixel_loss(image, image_pred, **options)
        return [loss, *torch.autograd.grad(loss, wrt, torch.ones_like(loss) if upstream is None else upstream)]


def check(place, image, image_pred, weight=None, upstream=None, pooled=None, **options):
    """The one rule; over all of `pooled` where the caller checks that, since the loss is a single number."""
    errors = pooled or Errors(image.dtype)
    got = values(place[1], image, image_pred, upstream, weight=weight, **options)
    same = values("reference", image, image_pred, upstream, weight=weight, **options)
    exact = values("reference", image.double(), image_pred.double(), None if upstream is None else upstream.double(),
                   weight=None if weight is None else weight.double(), **options)  # fmt: skip
    for what, g, s, e in zip(("loss", "image", "image_pred"), got, same, exact, strict=True):
        errors.add(what, g, s, e)
        assert g.dtype == s.dtype
    if pooled is None:
        errors.check()
    return got


@each_place
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("weight_shape", [
    (2, 1, 5, 7), (1, 3, 1, 1), (2, 1, 1, 1), (1, 1, 5, 7), (1, 1, 1, 1), (7,), (), SHAPE, (2, 1, 5, 1), (1, 3, 1, 7),
], ids=str)  # fmt: skip
def test_weights_of_any_broadcast(place, layout, weight_shape):
    for dtype, reduction in itertools.product((torch.float32, torch.bfloat16), ("mean", "none")):
        errors = Errors(torch.float32)
        for seed in range(4):
            draw = Draw(device=place[0], seed=seed)
            image, image_pred = (LAYOUTS[layout](t) for t in image_pair(draw, SHAPE))
            weight = draw.uniform(1, *weight_shape)[0].to(dtype)
            check(place, image, image_pred, weight, pooled=errors, reduction=reduction)
        errors.check()


@each_place
def test_weights_in_another_layout_and_dtype(place):
    draw = Draw(device=place[0])
    for name, kind in itertools.product(LAYOUTS, KINDS):
        image, image_pred = image_pair(draw, SHAPE)
        weight = LAYOUTS[name](draw.uniform(*SHAPE)).half()
        check(place, image.half(), image_pred.half(), weight, reduction="sum", **kind)


@each_place
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_are_kept(place, dtype):
    """Maps and gradients come in the layout that torch gives them, whatever the pair of inputs."""
    for first, second in itertools.product(LAYOUTS, LAYOUTS):
        image, image_pred = image_pair(Draw(dtype, place[0]), SHAPE)
        image, image_pred = LAYOUTS[first](image), LAYOUTS[second](image_pred)
        loss, *grads = check(place, image, image_pred, reduction="none")
        if place[1] == "triton":
            assert loss.stride() == torch.empty_like(image).stride(), (first, second)
            assert grads[0].stride() == torch.empty_like(image).stride(), (first, second)
            assert grads[1].stride() == torch.empty_like(image_pred).stride(), (first, second)


@each_place
def test_upstream_gradients_of_any_layout(place):
    draw = Draw(device=place[0])
    image, image_pred = image_pair(draw, SHAPE)
    for name, form in LAYOUTS.items():
        for upstream in (form(draw.normal(*SHAPE)), draw.normal(1).expand(SHAPE)):
            check(place, image, LAYOUTS["channels_last"](image_pred), upstream=upstream, reduction="none")
            check(place, LAYOUTS[name](image), image_pred, upstream=upstream, reduction="none", p=1)


@each_place
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_one_gradient_is_that_of_both(place, options):
    image, image_pred = image_pair(Draw(device=place[0]), SHAPE)
    for reduction in ("mean", "none"):
        _, of_image, of_pred = values(place[1], image, image_pred, reduction=reduction, **options)
        assert torch.equal(values(place[1], image, image_pred, needs=(True, False), reduction=reduction, **options)[1],
                           of_image)  # fmt: skip
        assert torch.equal(values(place[1], image, image_pred, needs=(False, True), reduction=reduction, **options)[1],
                           of_pred)  # fmt: skip


@each_place
@pytest.mark.parametrize("options", [*KINDS, {"p": "charbonnier"}], ids=str)
def test_edges_are_the_references(place, options):
    """NaN, infinities, zeros of both signs and ties, element by element."""
    special = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, 1e-8, 3e4]
    pairs = torch.tensor(list(itertools.product(special, special)), device=place[0])
    image, image_pred = pairs[:, 0].clone(), pairs[:, 1].clone()
    got = values(place[1], image, image_pred, reduction="none", **options)
    expected = values("reference", image, image_pred, reduction="none", **options)
    d = image_pred - image
    if options["p"] == "huber":  # the reference has NaN where d is infinite, +-delta is right
        assert torch.equal(got[2][d.isinf()], 0.1 * d[d.isinf()].sign())
        got, expected = ([t[~d.isinf()] for t in results] for results in (got, expected))
        d = d[~d.isinf()]
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-6, atol=1e-9)
    for gradient in got[1:]:
        assert (gradient[d == 0] == 0).all()


@each_place
def test_nothing_in_nothing_out(place):
    for shape in ((0,), (2, 0, 4, 4)):
        image = torch.zeros(shape, device=place[0])
        loss, *grads = values(place[1], image, image.clone(), reduction="sum")
        assert loss.item() == 0 and all(g.shape == shape for g in grads)
        assert values(place[1], image, image.clone(), reduction="none")[0].shape == shape


@pytest.mark.parametrize("place", [p for p in PLACES if "triton" in str(p)])
def test_many_blocks_per_program_and_wide_offsets(place, monkeypatch):
    """What only tensors of millions or billions of elements reach, at a small size."""
    from fastloss.kernels import common

    monkeypatch.setattr(common, "REDUCE_PROGRAMS", 3)
    draw = Draw(device=place[0])
    image, image_pred = image_pair(draw, (2, 3, 59, 61))
    for span in (common._INT32_SPAN, 0):
        monkeypatch.setattr(common, "_INT32_SPAN", span)
        for weight, reduction in itertools.product((None, draw.uniform(2, 1, 59, 61)), ("sum", "none")):
            check(place, image, image_pred, weight, reduction=reduction)
