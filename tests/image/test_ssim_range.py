"""SSIM far from 0 and at the ends of its options: offsets, (low, high), weights of 0, windows of one pixel."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from fastloss import SSIMLoss, core, image_loss, ms_ssim_loss, ssim_loss
from fastloss.image.ssim_checks import NegativeImages
from tests.conformance.cases import CASES
from tests.conformance.tools import INTERPRETING, places

PLACES = places(next(case for case in CASES if case.name == "ssim_loss"))
each_place = pytest.mark.parametrize("place", PLACES)
each_backend = pytest.mark.parametrize("backend", [place[1] for place in PLACES if not hasattr(place, "values")])
not_interpreted = pytest.mark.skipif(INTERPRETING, reason="nothing here depends on the backend")
SHAPE = (1, 2, 13, 14) if INTERPRETING else (2, 3, 24, 40)


def pair(*shape, dtype=torch.float32, device="cpu", noise=0.1):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(*shape, generator=generator)
    return x.to(device, dtype), (x + noise * torch.randn(*shape, generator=generator)).to(device, dtype)


def results(fn, backend, *images):
    """The value, and both gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in images]
    with core.use_backend(backend):
        value = fn(*leaves)
        return value.detach(), *torch.autograd.grad(value, leaves)


def relative_errors(fn, backend, *images):
    """Of value and gradients, against float64 of the same numbers, by the largest of each."""
    exact = results(fn, "reference", *(t.double() for t in images))
    got = results(fn, backend, *images)
    return [((g.double() - e).abs().max() / e.abs().max()).item() for g, e in zip(got, exact, strict=True)]


def each_its_own(shape):
    """An offset for every channel of every image."""
    offsets = torch.tensor([1e3, -1e4, 0.0, 3.0, -50.0, 1e4])[: shape[0] * shape[1]]
    return offsets.reshape(*shape[:2], 1, 1)


def ramp(shape, along):
    return torch.linspace(0, 1e4, shape[along]).reshape([-1 if d == along else 1 for d in range(4)])


OFFSETS = {
    "1e3": lambda x, y: (x + 1e3, y + 1e3),
    "-1e4": lambda x, y: (x - 1e4, y - 1e4),
    "each its own": lambda x, y: tuple(t + each_its_own(x.shape).to(t) for t in (x, y)),
    "almost the same": lambda x, y: (x + 1e3, y + 1001),
    "different": lambda x, y: (x + 500, y + 1e3),
    "ramp to the right": lambda x, y: tuple(t + ramp(x.shape, 3).to(t) for t in (x, y)),
    "ramp down": lambda x, y: tuple(t + ramp(x.shape, 2).to(t) for t in (x, y)),
    "one hot pixel": lambda x, y: (one_hot(x + 1e3), y + 1e3),
}


def one_hot(x):
    """At one of the pixels that tell what the image is shifted by."""
    x[:, :, x.shape[2] // 4, x.shape[3] // 4] = 3e4
    return x


@each_place
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("offset", list(OFFSETS)[:3] if INTERPRETING else OFFSETS)
def test_images_far_from_zero_keep_their_digits(place, offset, padding):
    x, y = OFFSETS[offset](*pair(*SHAPE, device=place[0]))
    assert max(relative_errors(lambda a, b: ssim_loss(a, b, padding=padding, window=7), place[1], x, y)) < 1e-3


@not_interpreted
def test_the_loss_of_an_offset_that_was_reported():
    """b in [0, 1] and b + .1 noise, at 1000: .0548 of these numbers, where float32 sums of squares gave .299."""
    b, p = pair(1, 3, 64, 64)
    expected = ssim_loss(b.double() + 1000, p.double() + 1000, padding="valid").item()
    assert ssim_loss(b + 1000, p + 1000, padding="valid").item() == pytest.approx(expected, rel=1e-3)
    assert 0.04 < expected < 0.07


@not_interpreted
@each_backend
def test_ms_ssim_and_image_loss_keep_their_digits_too(backend):
    x, y = pair(1, 2, 33, 38)

    def several(a, b, data_range=1.0):
        return ms_ssim_loss(a, b, window=3, level_weights=(0.3, 0.3, 0.4), padding="same", data_range=data_range)

    def parts(a, b):
        return image_loss(a, b, pixel=(1, 0.1), smoothness=(1, 0.1), ssim=0.5).total

    assert max(relative_errors(several, backend, x + 100, y + 100)) < 1e-3
    far = [t + 1e4 for t in (x, y)]
    assert max(relative_errors(lambda a, b: several(a, b, (1e4, 10001)), backend, *far)) < 1e-3
    x, y = x + 1e3, y + 1e3
    assert max(relative_errors(parts, backend, x, y)) < 1e-3


@each_place
def test_a_hot_pixel_does_not_cost_the_others_their_digits(place):
    """A fill value, at one of the pixels that could tell what the image is shifted by: it stays with its windows."""
    x, y = pair(*SHAPE, device=place[0])
    for fill in (-9999.0, 1e20, float("nan"), float("inf")):
        hot = x.clone()
        hot[:, :, SHAPE[2] // 4, SHAPE[3] // 4] = fill
        weight = torch.ones_like(x)
        weight[:, :, : SHAPE[2] // 4 + 4, : SHAPE[3] // 4 + 4] = 0
        got = results(lambda a, b, w=weight: ssim_loss(a, b, window=7, weight=w), place[1], hot, y)
        expected = results(
            lambda a, b, w=weight: ssim_loss(a, b, window=7, weight=w), "reference", x.double(), y.double()
        )
        for mine, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-6)


@each_place
def test_equal_places_have_a_gradient_of_exactly_zero(place):
    """Where the images are equal, and differ by less than the range elsewhere."""
    x, y = pair(1, 1, 14, 26, device=place[0])
    y[..., :13] = x[..., :13]
    _, *gradients = results(lambda a, b: ssim_loss(a, b, window=3), place[1], x, y)
    assert not any(g[..., :11].any() for g in gradients) and all(g[..., 14:].any() for g in gradients)


def blocks():
    """Blocks of +-.6 plus .2 noise, clamped to [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (1, 3, 8, 8), generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return (1.2 * signs - 0.6 + 0.2 * torch.randn(1, 3, 64, 64, generator=generator)).clamp(-1, 1)


@not_interpreted
@each_backend
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_the_negative_of_an_image_is_far_from_it(backend, padding):
    """Images in [-1, 1]: the loss is that of images in [0, 2], 1.5 and not .06."""
    x = blocks()
    with core.use_backend(backend):
        moved = ssim_loss(x + 1, 1 - x, data_range=2.0, padding=padding).item()
        for data_range in ((-1, 1), [-1.0, 1.0], torch.tensor([-1.0, 1.0])):
            assert ssim_loss(x, -x, data_range=data_range, padding=padding).item() == pytest.approx(moved, rel=1e-5)
    assert 1.4 < moved < 1.7
    assert ssim_loss(x, -x, data_range=2.0, padding=padding).item() < 0.1  # a number: from 0 on
    assert SSIMLoss(data_range=(-1, 1), padding=padding)(x, -x).item() == pytest.approx(moved, rel=1e-5)


RANGES = [(-1.0, 1.0), (0.25, 1.0), (-0.1, 1.2)]


@each_place
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16][: 1 if INTERPRETING else 2])
def test_a_range_is_that_of_images_shifted_by_its_low_end(place, padding, dtype):
    """Value and gradient, against float64 of the shifted images; a bfloat16 image is not rounded again."""
    x, y = pair(*SHAPE, device=place[0], dtype=dtype)
    for low, high in RANGES[-1 if INTERPRETING else 0 :]:
        options = {"window": 5, "padding": padding}
        got = results(lambda a, b: ssim_loss(a, b, data_range=(low, high), **options), place[1], x, y)  # noqa: B023
        expected = results(
            lambda a, b: ssim_loss(a - low, b - low, data_range=high - low, **options), "reference",  # noqa: B023
            x.double(), y.double(),
        )  # fmt: skip
        for i, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
            rtol = 1e-5 if i == 0 else 1e-2 if dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(mine.double(), theirs, rtol=rtol, atol=rtol * theirs.abs().max().item() / 10)


@not_interpreted
@each_backend
def test_ranges_of_ms_ssim_and_image_loss(backend):
    """Odd sides: what the pooling pads with zeros are images that begin at 0."""
    x, y = pair(2, 2, 21, 18)
    x, y = 2 * x - 1, 2 * y - 1
    several = {"window": 3, "level_weights": (0.3, 0.3, 0.4), "padding": "same"}
    got = results(lambda a, b: ms_ssim_loss(a, b, data_range=(-1, 1), **several), backend, x, y)
    moved = results(
        lambda a, b: ms_ssim_loss(a + 1, b + 1, data_range=2, **several), "reference", x.double(), y.double()
    )
    torch.testing.assert_close([t.double() for t in got], list(moved), rtol=1e-4, atol=1e-6)
    parts = {"pixel": (1, 0.5), "smoothness": (1, 0.1), "ssim": 0.7}
    got = results(lambda a, b: image_loss(a, b, **parts, ssim_options={"data_range": (-1, 1)}).total, backend, x, y)
    moved = results(
        lambda a, b: image_loss(a + 1, b + 1, **parts, ssim_options={"data_range": 2}).total, "reference",
        x.double(), y.double(),
    )  # fmt: skip
    torch.testing.assert_close([t.double() for t in got], list(moved), rtol=1e-4, atol=1e-6)


@each_place
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_a_weight_of_zero_excludes(place, padding):
    """NaN or infinity that only windows of weight 0 see: value and gradients are those of any other number there."""
    x, y = pair(1, 2, 12, 20, device=place[0])
    weight = torch.ones(12, 20, device=place[0])
    weight[:, :9] = 0  # the windows that see the columns up to 5
    for value in (float("nan"), float("inf"), 1e30):
        bad = y.clone()
        bad[..., 3:5, 2:5] = value
        for mask in (weight, weight.bool()):
            fn = lambda a, b, m=mask: ssim_loss(a, b, window=7, padding=padding, weight=m)  # noqa: E731
            got, expected = results(fn, place[1], x, bad), results(fn, place[1], x, y)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
            assert all(not g[..., :6].any() for g in got[1:])
    seen = y.clone()
    seen[..., 5, 6] = float("nan")  # a window of weight 1 sees it
    value, *gradients = results(fn, place[1], x, seen)
    assert value.isnan() and all(g[..., 5, 6].isnan().all() for g in gradients)


@not_interpreted
@each_backend
def test_weights_of_zero_and_masks_in_image_loss(backend):
    x, y = pair(1, 2, 12, 20)
    bad = y.clone()
    bad[..., 2:5] = float("nan")
    mask = torch.ones(12, 20, dtype=torch.bool)
    mask[:, :9] = False
    options = {"ssim": 1.0, "pixel": (2, 0.0), "pixel_options": {"weight": mask.float()}}
    for weight in (mask, mask.float()):
        parts = [
            image_loss(x, t, **options, ssim_options={"weight": weight, "window": 7}).parts["ssim"] for t in (bad, y)
        ]
        torch.testing.assert_close(*parts)
        with core.use_backend(backend):
            torch.testing.assert_close(ssim_loss(x, bad, window=7, weight=weight), parts[1])


@each_place
@pytest.mark.parametrize("options", [{"window": 1}, {"sigma": 0.05, "window": 5}, {"sigma": 1e-200}], ids=str)
def test_a_window_of_one_pixel_is_luminance_alone(place, options):
    """Its variance is 0, so structure is 1: the loss is (x - y)^2 / (x^2 + y^2 + C1), and so are the gradients."""
    x, y = pair(*SHAPE, device=place[0])

    def luminance(a, b):
        return ((a - b) ** 2 / (a * a + b * b + 1e-4)).mean()

    got = results(lambda a, b: ssim_loss(a, b, **options), place[1], x, y)
    expected = results(luminance, "reference", x.double(), y.double())
    for mine, theirs in zip(got, expected, strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=2e-6 * scale)


@each_place
def test_weights_whose_sum_is_beyond_float32(place):
    x, y = pair(*SHAPE, device=place[0])
    weight = torch.rand(SHAPE[2:], generator=torch.Generator().manual_seed(1)).to(place[0]) + 0.5
    expected = results(lambda a, b: ssim_loss(a, b, window=5, weight=weight), place[1], x, y)
    got = results(lambda a, b: ssim_loss(a, b, window=5, weight=weight * 2e38), place[1], x, y)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)
    each = ssim_loss(x, y, window=5, weight=weight * 2e38, reduction="none")
    torch.testing.assert_close(each, ssim_loss(x, y, window=5, weight=weight, reduction="none"))


@not_interpreted
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"data_range": (1, -1)}, ValueError, "data_range: expected low < high, got"),
        ({"data_range": (1, 1)}, ValueError, "data_range: expected low < high, got"),
        ({"data_range": (0, 1, 2)}, ValueError, "data_range: expected a number > 0 or a pair .* got 3 entries"),
        ({"data_range": (0, math.nan)}, ValueError, r"data_range\[1\]: expected a finite number"),
        ({"data_range": (-math.inf, 0)}, ValueError, r"data_range\[0\]: expected a finite number"),
        ({"data_range": "01"}, TypeError, r"data_range: expected a number > 0 or a pair \(low, high\), got str '01'"),
        ({"data_range": None}, TypeError, r"data_range: expected a number > 0 or a pair \(low, high\), got NoneType"),
        ({"data_range": -1.0}, ValueError, "data_range: expected a finite number > 0"),
        ({"data_range": 1e200}, ValueError, r"k1, data_range: expected \(k1 \* range\) \*\* 2 from"),
        ({"data_range": 1e19}, ValueError, "data_range: expected a range of at most"),
        ({"k1": 1e-200}, ValueError, "k1, data_range: expected .* got 0 of k1=1e-200"),
        ({"k2": 1e-200}, ValueError, "k2, data_range: expected"),
        ({"k2": 1e30}, ValueError, "k2, data_range: expected"),
        ({"window": 2**40 + 1}, ValueError, "window: expected an odd integer from 1 to 65535, got 1099511627777"),
    ],
    ids=str,
)
def test_options_that_float32_cannot_hold_raise(options, error, message):
    x, y = pair(1, 1, 12, 12)
    with pytest.raises(error, match=message):
        ssim_loss(x, y, **options)
    with pytest.raises(error, match=message):
        ms_ssim_loss(x, y, padding="same", level_weights=(0.5, 0.5), **options)
    with pytest.raises(error, match=message):
        image_loss(x, y, ssim=1.0, ssim_options=options)


@not_interpreted
def test_what_float64_holds_is_no_error_there():
    x, y = pair(1, 1, 12, 12, dtype=torch.float64)
    assert ssim_loss(x * 1e30, y * 1e30, data_range=1e30).item() == pytest.approx(ssim_loss(x, y).item(), rel=1e-9)


@not_interpreted
@pytest.mark.parametrize("shape", [(0, 3, 12, 12), (2, 0, 12, 12), (2, 3, 0, 12), (2, 3, 12, 0)], ids=str)
def test_empty_axes(shape):
    x = torch.zeros(shape, requires_grad=True)
    for fn in (ssim_loss, ms_ssim_loss):
        for options in ({}, {"weight": torch.ones(shape, dtype=torch.bool)} if fn is ssim_loss else {}):
            each = fn(x, x.detach(), padding="same", reduction="none", **options)
            assert each.shape == shape[:1] and not each.any()
            total = fn(x, x.detach(), padding="same", reduction="sum", **options)
            assert total.item() == 0.0 and torch.autograd.grad(total, x)[0].shape == shape
            with pytest.raises(ValueError, match="the mean of an empty batch"):
                fn(x, x.detach(), padding="same", **options)


@each_place
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 1, 9), (2, 3, 9, 1)], ids=str)
def test_sides_of_one_pixel(place, shape):
    x, y = pair(*shape, device=place[0])
    for options in ({}, {"data_range": (-1, 1)}, {"weight": torch.ones(shape[2:], device=place[0]).bool()}):
        assert max(relative_errors(lambda a, b, o=options: ssim_loss(a, b, window=5, **o), place[1], x, y)) < 1e-5


@not_interpreted
def test_values_below_zero_are_warned_of_once(monkeypatch):
    x = blocks()
    monkeypatch.setattr(NegativeImages, "looked", False)
    with pytest.warns(UserWarning, match=r"data_range=2.0 is that of images from 0 on.*data_range=\(-1, 1\)"):
        ssim_loss(x, x, data_range=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ssim_loss(x, x, data_range=2.0)
        monkeypatch.setattr(NegativeImages, "looked", False)
        ssim_loss(x, x, data_range=(-1, 1))
        ssim_loss(x + 1, x + 1, data_range=2.0)
