"""Smoothness kernels: sizes around a vector and a band, layouts, upstream gradients, infinities, threads."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastloss import core
from fastloss.image.smoothness import _smoothness
from tests.conformance.cases import CASES
from tests.conformance.tools import INTERPRETING, Errors, places

pytestmark = pytest.mark.kernels

PLACES = places(next(case for case in CASES if case.name == "smoothness_loss"))
KINDS = ("l1", "l2", "isotropic")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda t: torch.stack((t, t), -1)[..., 1],
    "expanded": lambda t: t[:, :1].expand_as(t),
}
each_place = pytest.mark.parametrize("place", PLACES)
each_kind = pytest.mark.parametrize("kind", KINDS)
cpp_only = pytest.mark.skipif(core.backend_report()["cpp"] != "available", reason="the C++ kernels are not built")


def random(*shape, dtype=torch.float32, device="cpu"):
    """Values in steps of 1/8, so that neighbours are often equal."""
    values = torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(0)) / 8
    return values.to(device, dtype)


def values(backend, image, kind, order=1, guide=None, weight=None):
    """The sums, and the gradient for an upstream gradient that differs from plane to plane and by direction."""
    image = image.detach().requires_grad_()
    with core.use_backend(backend):
        sums = _smoothness(image, guide, weight, kind, order)
        upstream = torch.linspace(-1, 2, sums.numel(), device=image.device).reshape(sums.shape)
        return sums.detach(), *torch.autograd.grad(sums, image, upstream.to(sums.dtype))


def check(place, image, kind, where=""):
    """The conformance tests' rule: within 2x the error of the reference in that dtype, plus eps of the largest
    value."""
    errors = Errors(image.dtype)
    got, same, exact = (
        values(b, i, kind) for b, i in ((place[1], image), ("reference", image), ("reference", image.double()))
    )
    for name, *each in zip(("sums", "gradient"), got, same, exact, strict=True):
        errors.add(name, *each, where)
    errors.check()
    return got


@each_place
@each_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_around_a_vector(place, kind, dtype):
    widths = (1, 2, 3, 17, 64) if INTERPRETING else (*range(1, 20), 31, 32, 33, 34, 48, 63, 64, 65, 66, 129)
    for width in widths:
        for height in (1, 2, 5):
            check(place, random(2, 2, height, width, dtype=dtype, device=place[0]), kind, f"{height}x{width}")


@each_place
@each_kind
def test_planes_of_several_bands(place, kind):
    large = ((1, 2, 30, 333), (2, 1, 3, 1001)) if INTERPRETING else ((1, 2, 130, 333), (2, 1, 3, 9001))
    for shape in (*large, (1, 1, 5000, 2), (20, 3, 2, 3)):
        check(place, random(*shape, device=place[0]), kind, str(shape))


@each_place
@each_kind
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(place, kind, layout):
    image = LAYOUTS[layout](random(2, 3, 9, 21, device=place[0]))
    _, gradient = check(place, image, kind)
    if layout == "channels_last" and place[1] != "reference":
        assert gradient.is_contiguous(memory_format=torch.channels_last)


@each_place
@each_kind
def test_flat_images_and_empty_ones(place, kind):
    for fill in (0.0, 0.3, -1e30):
        sums, gradient = values(place[1], torch.full((2, 1, 9, 40), fill, device=place[0]), kind)
        assert not sums.any() and not gradient.any()
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)):
        sums, gradient = values(place[1], torch.zeros(shape, device=place[0]), kind)
        assert sums.shape == (*shape[:2], 1 if kind == "isotropic" else 2) and not sums.any()
        assert gradient.shape == shape


@each_place
@each_kind
def test_infinities_reach_only_their_neighbours(place, kind):
    """An infinity at any place, corners included, gives the reference's sums; far pixels keep their gradients."""
    for y, x in ((0, 0), (0, 36), (6, 0), (6, 36), (3, 15), (3, 16), (6, 20)):
        image = random(1, 2, 7, 37, device=place[0])
        image[0, 0, y, x] = float("inf")
        sums, gradient = values(place[1], image, kind)
        expected = values("reference", image, kind)
        torch.testing.assert_close(sums, expected[0], equal_nan=True)
        near = torch.zeros(7, 37, dtype=torch.bool)
        near[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2] = True
        torch.testing.assert_close(gradient[0, 0][~near], expected[1][0, 0][~near])
        torch.testing.assert_close(gradient[0, 1], expected[1][0, 1])


@cpp_only
@pytest.mark.parametrize("cpu", ["default", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES)
@each_kind
def test_every_instruction_set(monkeypatch, cpu, dtype, kind):
    monkeypatch.setenv("FASTLOSS_CPU", cpu)
    for shape in ((2, 3, 37, 41), (1, 2, 4, 4), (1, 1, 70, 512)):
        check(("cpu", "cpp"), random(*shape, dtype=dtype), kind, str(shape))


@cpp_only
@pytest.mark.parametrize("cpu", ["default", "avx2", "avx512"])
@each_kind
def test_large_gradients_are_streamed_whole(monkeypatch, cpu, kind):
    monkeypatch.setenv("FASTLOSS_CPU", cpu)
    for dtype, width in ((torch.float32, 1040), (torch.bfloat16, 2064)):
        check(("cpu", "cpp"), random(1, 3, 700, width, dtype=dtype), kind)


@cpp_only
@each_kind
def test_thread_counts_give_the_same_bits(kind):
    image = torch.rand(2, 3, 333, 217, generator=torch.Generator().manual_seed(0))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(values("cpp", image, kind))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def last(t):
    return t.contiguous(memory_format=torch.channels_last if t.ndim == 4 else torch.channels_last_3d)


OPTIONS = {
    "second order": {"order": 2},
    "guide": {"guide": True},
    "weight per pixel": {"weight": 0},
    "weight per channel": {"weight": 1},
    "all": {"order": 2, "guide": True, "weight": 0},
}


@each_place
@each_kind
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(place, kind, options):
    """Guides, weights and second differences; images and volumes, of one pixel too; either memory format."""
    shapes = ((2, 3, 5, 7), (1, 2, 2, 3, 4), (1, 2, 1, 6), (1, 1, 1, 1))
    more = () if INTERPRETING else ((1, 3, 40, 61), (2, 2, 5, 6, 35), (1, 20, 6, 7), (1, 2, 6, 1, 3))
    for shape in (*shapes, *more):
        pixels = (shape[0], 1, *shape[2:])
        guide = random(shape[0], 3, *shape[2:], device=place[0]) if "guide" in options else None
        weight = None
        if "weight" in options:
            small = (shape[1], *[1] * (len(shape) - 2)) if options["weight"] else pixels
            weight = (random(*small, device=place[0]) + 0.5).expand(shape)
        for form in (lambda t: t, last):
            image = form(random(*shape, device=place[0]))
            edges = guide if guide is None else form(guide)
            args = (kind, options.get("order", 1))
            errors = Errors(torch.float32)
            runs = [values(b, image, *args, edges, weight) for b in (place[1], "reference")]
            double = (t if t is None else t.double() for t in (edges, weight))
            exact = values("reference", image.double(), *args, *double)
            for name, *each in zip(("sums", "gradient"), *runs, exact, strict=True):
                errors.add(name, *each, str(shape))
            errors.check()
            assert place[1] == "reference" or runs[0][1].stride() == torch.empty_like(image).stride()


@each_place
@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_guides_and_weights(place, dtype):
    """Guide and weight may have another dtype than the image."""
    image, guide = random(2, 2, 6, 19, device=place[0]), random(2, 3, 6, 19, dtype=dtype, device=place[0])
    weight = random(2, 1, 6, 19, dtype=dtype, device=place[0]).expand(2, 2, 6, 19)
    got, expected = (values(b, image, "l1", 1, guide, weight) for b in (place[1], "reference"))
    torch.testing.assert_close(got, expected)


@cpp_only
@pytest.mark.parametrize("cpu", ["default", "avx2", "avx512"])
def test_every_instruction_set_with_a_guide(monkeypatch, cpu):
    monkeypatch.setenv("FASTLOSS_CPU", cpu)
    image, guide = random(1, 2, 9, 53), random(1, 3, 9, 53)
    weight = random(1, 1, 9, 53).expand(1, 2, 9, 53)
    for order in (1, 2):
        for form in (lambda t: t, last):
            inputs = (form(image), "isotropic", order, form(guide), weight)
            got, expected = (values(b, *inputs) for b in ("cpp", "reference"))
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@each_place
@each_kind
@pytest.mark.parametrize("order", [1, 2])
def test_weights_of_0_exclude_their_differences(place, kind, order):
    """A pixel of NaN counts for none of its differences; its neighbours' others stay, in either memory format."""
    shapes, forms = ((1, 2, 6, 19), (1, 2, 4, 5, 18)), (last, lambda t: t)
    for shape, form in (zip if INTERPRETING else itertools.product)(shapes, forms):
        image, weight = random(*shape, device=place[0]), torch.ones((1, 1, *shape[2:]), device=place[0])
        guide = random(1, 3, *shape[2:], device=place[0])
        at = (0, slice(None), *(2,) * (len(shape) - 3), 16)
        weight[at] = 0  # and of the differences that belong to neighbours
        for axis in range(len(shape) - 2):
            for step in (-1, 1) if order == 2 else (-1,):
                weight[(*at[:2], *(i + step * (k == axis) for k, i in enumerate(at[2:])))] = 0
        results = []
        for fill, mask in ((float("nan"), weight), (float("inf"), weight.bool()), (0.0, weight)):
            image[at] = guide[at] = fill
            results.append(values(place[1], form(image), kind, order, form(guide), mask.expand(shape)))
        for sums, gradient in results:
            torch.testing.assert_close([sums, gradient], results[-1], rtol=0, atol=0)
            assert not gradient[at].any() and gradient.count_nonzero() > 0


@each_place
def test_nan_in_a_guide_counts_where_its_difference_does(place):
    """The difference that begins left of a NaN of the guide has a weight; without one the NaN has no effect."""
    image, guide = torch.arange(4.0, device=place[0]).reshape(1, 1, 1, 4), torch.zeros(1, 1, 1, 4, device=place[0])
    guide[..., 2] = float("nan")
    for weight, expected in (([1.0, 1, 0, 1], float("nan")), ([1.0, 0, 0, 1], 1.0)):
        by_pixel = torch.tensor(weight, device=place[0]).reshape(1, 1, 1, 4)
        sums, gradient = values(place[1], image, "l1", 1, guide, by_pixel)
        torch.testing.assert_close(sums[0, 0, 1].item(), expected, equal_nan=True)
        assert gradient.isnan().any() == (expected != expected)


@pytest.mark.parametrize("place", [p for p in PLACES if "triton" in str(p)])
def test_elements_of_a_plane_are_counted_in_64_bits(place):
    """Where the plane alone has more than 2**31, no product on the way is one of 32 bits."""
    from fastloss.core.kernels.launch import odd_number
    from fastloss.image.kernels.smoothness_arguments import Size
    from tests.triton.element_count_kernel import counts_kernel

    out = torch.zeros(2, dtype=torch.int64, device=place[0])
    counts_kernel[(1,)](out, Size(odd_number(32768), odd_number(65536), 1, 1, 3))
    assert out.tolist() == [3 * 2**31, 9 * 2**31]
