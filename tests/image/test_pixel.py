"""Pixel loss kernels: weights, memory layouts, upstream gradients and edges that a row of the cases cannot say."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastloss import core, pixel_loss
from tests.conformance.cases import CASES, Draw, image_pair
from tests.conformance.tools import Errors, places

pytestmark = pytest.mark.kernels

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
    from fastloss.core.kernels import launch, memory_order

    monkeypatch.setattr(launch, "REDUCE_PROGRAMS", 3)
    draw = Draw(device=place[0])
    image, image_pred = image_pair(draw, (2, 3, 59, 61))
    for span in (memory_order._INT32_SPAN, 0):
        monkeypatch.setattr(memory_order, "_INT32_SPAN", span)
        for weight, reduction in itertools.product((None, draw.uniform(2, 1, 59, 61)), ("sum", "none")):
            check(place, image, image_pred, weight, reduction=reduction)


@each_place
@pytest.mark.parametrize("eps", [1e-6, 1e-20, 1e-37, 1e15])
def test_charbonnier_of_any_eps(place, eps):
    """Its slope is d / sqrt(d^2 + eps^2) though the squares are beyond float32; 0 at 0, 1 far away."""
    steps = torch.tensor([0.0, 0.25, 1.0, -3.0, 1e3, -1e10, float("nan")], dtype=torch.float64)
    image_pred = (steps * eps).clamp(-1e18, 1e18).float().to(place[0])
    loss, _, slope = values(place[1], torch.zeros_like(image_pred), image_pred, reduction="none", p="charbonnier",
                            eps=eps)  # fmt: skip
    d = image_pred.double().cpu()
    scale = torch.hypot(d, torch.tensor(eps, dtype=torch.float64))
    torch.testing.assert_close(slope.double().cpu(), d / scale, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(loss.double().cpu(), scale, rtol=1e-6, atol=1e-19, equal_nan=True)


@each_place
def test_exponents_and_thresholds_of_any_size(place):
    """|d|^p and its slope to the largest p; a Huber threshold beyond all differences, or none."""
    image_pred = torch.tensor([0.0, 0.5, -0.999, 1.0, -1.0, 1.5], device=place[0])
    zero, inf = torch.zeros_like(image_pred), float("inf")
    loss, _, slope = values(place[1], zero, image_pred, reduction="none", p=1e30)
    assert loss.tolist() == [0, 0, 0, 1, 1, inf]
    torch.testing.assert_close(slope.cpu(), torch.tensor([0, 0, 0, 1e30, -1e30, inf]))
    for delta, expected, slopes in ((1e38, 0.5 * image_pred**2, image_pred), (1e-37, zero, 1e-37 * image_pred.sign())):
        loss, _, slope = values(place[1], zero, image_pred, reduction="none", p="huber", delta=delta)
        torch.testing.assert_close(loss, expected, atol=1e-30, rtol=1e-6)
        torch.testing.assert_close(slope, slopes, atol=0, rtol=1e-6)


@each_place
def test_sums_of_weights_beyond_float32_are_nan(place):
    """Not 0, as a number over infinity would be; a single large weight is a weight."""
    image, image_pred = torch.zeros(2, device=place[0]), torch.tensor([0.5, 1.0], device=place[0])
    loss, _, slope = values(place[1], image, image_pred, weight=torch.tensor([3e38, 0.0], device=place[0]))
    torch.testing.assert_close([loss.item(), *slope.tolist()], [0.25, 1.0, 0.0], rtol=1e-6, atol=0)
    loss, _, slope = values(place[1], image, 0.1 * image_pred, weight=torch.tensor([3e38, 3e38], device=place[0]))
    assert loss.isnan() and slope.isnan().all()


@each_place
@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("cpu", ["default", "avx2", "avx512"])
def test_weights_of_0_exclude_in_every_vector(monkeypatch, cpu, place, options):
    """Of all widths of a rest, with every instruction set: a row of NaN between others, with a mask of bytes."""
    if place[1] != "cpp" and cpu != "default":
        return
    monkeypatch.setenv("FASTLOSS_CPU", cpu)
    for size in (1, 5, 16, 21, 67):
        image, image_pred = image_pair(Draw(device=place[0]), (3, size))
        mask = torch.tensor([[True], [False], [True]], device=place[0])
        for bad in (float("nan"), float("inf")):
            image_pred[1] = bad
            for reduction in ("mean", "none"):
                loss, *grads = values(place[1], image, image_pred, weight=mask, reduction=reduction, **options)
                kept = values(place[1], image[::2], image_pred[::2], reduction=reduction, **options)
                loss = loss[::2] if reduction == "none" else loss
                assert all(not g[1].any() for g in grads), (size, bad)
                torch.testing.assert_close([loss, *(g[::2] for g in grads)], kept, rtol=1e-6, atol=0)


@each_place
def test_masks_of_any_layout_are_weights(place):
    draw = Draw(device=place[0])
    image, image_pred = image_pair(draw, SHAPE)
    for name, shape in itertools.product(LAYOUTS, (SHAPE, (2, 1, 5, 7), (1, 3, 1, 1))):
        mask = LAYOUTS[name](draw.uniform(*shape)) < 0.5
        for reduction in ("mean", "none"):
            got, expected = (values(place[1], image, image_pred, weight=w, reduction=reduction)
                             for w in (mask, mask.float()))  # fmt: skip
            # a GPU gives a thread other elements of bytes than of floats, and so adds them up in another order
            torch.testing.assert_close(got[0], expected[0], rtol=2**-22 if place[0] == "cuda" else 0, atol=0)
            assert all(map(torch.equal, got[1:], expected[1:])), (name, shape)
