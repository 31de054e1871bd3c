"""SSIM kernels: sizes around a vector and a tile, windows, layouts, weights, infinities, what is kept, threads."""

from __future__ import annotations

import pytest
import torch

from fastloss import core, ms_ssim_loss, ssim_loss
from fastloss.image.ssim import _ssim, _sums
from tests.conformance.cases import CASES
from tests.conformance.tools import INTERPRETING, Errors, places

pytestmark = pytest.mark.kernels

PLACES = places(next(case for case in CASES if case.name == "ssim_loss"))
# The interpreter takes seconds for an image: what does not reach the Triton kernels is left to the C++ ones there.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)[: 1 if INTERPRETING else 3]
WINDOWS = (3, 11) if INTERPRETING else (1, 3, 5, 7, 9, 11)
BROADCASTS = [(2, 3, 8, 9), (2, 1, 8, 9), (3, 1, 1), (8, 9), (9,), (8, 1), (2, 1, 1, 1)][: 2 if INTERPRETING else 7]
SIDES = {"both": (True, True), "first": (True, False), "second": (False, True)}
LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda t: torch.stack((t, t), -1)[..., 1],
    "expanded": lambda t: t[:, :1].expand_as(t),
}
each_place = pytest.mark.parametrize("place", PLACES)
each_padding = pytest.mark.parametrize("same", [True, False], ids=["same", "valid"])
cpp_only = pytest.mark.skipif(core.backend_report()["cpp"] != "available", reason="the C++ kernels are not built")


def pair(*shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(*shape, generator=generator)
    y = (x + 0.2 * torch.randn(*shape, generator=generator)).clamp(0, 1)
    return x.to(device, dtype), y.to(device, dtype)


def values(backend, x, y, weight=None, window=11, same=True, structure=False, needs=(True, True)):
    """The sums, and the gradients asked for under an upstream gradient that differs from plane to plane."""
    x, y = x.detach(), y.detach()
    wrt = [t.requires_grad_() for t, needed in zip((x, y), needs, strict=True) if needed]
    with core.use_backend(backend):
        sums = _sums(x, y, weight, window, 1.5, same, 1e-4, 9e-4, 0.0, structure)
        upstream = torch.linspace(-1, 2, sums.numel(), device=x.device).reshape(sums.shape)
        return sums.detach(), *torch.autograd.grad(sums, wrt, upstream.to(sums.dtype))


def compare(errors, place, x, y, weight=None, where="", **options):
    """Adds to the conformance tests' rule: within 2x the error of the reference in that dtype, plus eps of the
    largest value."""
    double = None if weight is None else weight.double()
    got, same = (values(backend, x, y, weight, **options) for backend in (place[1], "reference"))
    exact = values("reference", x.double(), y.double(), double, **options)
    for i, each in enumerate(zip(got, same, exact, strict=True)):
        errors.add("sums" if i == 0 else f"gradient {i}", *each, where)
    return got


def check(place, x, y, weight=None, **options):
    errors = Errors(x.dtype)
    got = compare(errors, place, x, y, weight, **options)
    errors.check()
    return got


@each_place
@each_padding
@pytest.mark.parametrize("window", WINDOWS)
def test_windows_and_sizes_around_a_vector(place, same, window):
    widths = (window, window + 5) if INTERPRETING else (*range(window, window + 20), 31, 32, 33, 64, 65, 129)
    errors = Errors(torch.float32)
    for width in widths:
        for height in (window, window + 4)[: 1 if INTERPRETING else 2]:
            x, y = pair(1, 2, height, width, device=place[0])
            compare(errors, place, x, y, window=window, same=same, where=f"{height}x{width}")
    errors.check()


@each_place
@each_padding
@pytest.mark.parametrize("dtype", DTYPES)
def test_images_of_several_tiles(place, same, dtype):
    small = ((1, 2, 20, 70), (1, 1, 22, 12))
    for shape in small if INTERPRETING else ((1, 2, 300, 37), (2, 1, 20, 1100), (1, 1, 270, 530), (30, 3, 11, 12)):
        check(place, *pair(*shape, dtype=dtype, device=place[0]), same=same, where=str(shape))


@each_place
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", [SIDES["both"]] if INTERPRETING else SIDES.values())
def test_layouts(place, layout, which):
    x, y = pair(2, 3, 6, 9, device=place[0])
    changed = [LAYOUTS[layout](t) if change else t for t, change in zip((x, y), which, strict=True)]
    _, *gradients = check(place, *changed, window=5)
    if layout == "channels_last" and place[1] != "reference":
        for gradient, change in zip(gradients, which, strict=True):
            assert gradient.is_contiguous(memory_format=torch.channels_last) == change


@each_place
@each_padding
@pytest.mark.parametrize("structure", [False, True], ids=["ssim", "structure"])
@pytest.mark.parametrize("needs", SIDES.values(), ids=SIDES)
def test_what_is_asked_for(place, same, structure, needs):
    x, y = pair(2, 2, 7, 8, device=place[0])
    check(place, x, y, window=5, same=same, structure=structure, needs=needs)


@each_place
@each_padding
@pytest.mark.parametrize("shape", BROADCASTS, ids=str)
def test_weights_of_any_broadcast(place, same, shape):
    x, y = pair(2, 3, 8, 9, device=place[0])
    weight = torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(place[0]).expand(2, 3, 8, 9)
    for dtype in (torch.float32, torch.bfloat16):
        mine = weight if same else weight[:, :, 2:-2, 2:-2]
        check(place, x, y, mine.to(dtype) if dtype != torch.float32 else mine, window=5, same=same)


@each_place
def test_one_pixel_wide_and_empty_images(place):
    for shape in ((1, 1, 1, 1), (2, 2, 1, 9), (2, 2, 9, 1)):
        check(place, *pair(*shape, device=place[0]), where=str(shape))
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4)) if place[1] != "reference" else ():  # which ssim_loss never asks
        sums, *gradients = values(place[1], *pair(*shape, device=place[0]))
        assert sums.shape == shape[:2]
        assert [g.shape for g in gradients] == [shape, shape]


@each_place
def test_equal_and_flat_images(place):
    for fill in (0.0, 0.3, 1e4):
        x = torch.full((1, 2, 9, 14), fill, device=place[0])
        sums, *gradients = values(place[1], x, x.clone())
        assert not sums.any() and not any(g.any() for g in gradients)
        assert all(t.isfinite().all() for t in values(place[1], x, torch.zeros_like(x)))
    x, _ = pair(1, 2, 12, 14, device=place[0])
    sums, *gradients = values(place[1], x, x.clone())
    assert not sums.any() and not any(g.any() for g in gradients)


@each_place
@each_padding
def test_infinities_reach_what_sees_them(place, same):
    """The loss and the gradients are finite just where the reference's are; the other channel is untouched."""
    for y0, x0 in ((0, 0), (8, 20), (4, 15)):
        x, y = pair(1, 2, 9, 21, device=place[0])
        y[0, 0, y0, x0] = float("inf")
        got, expected = (values(backend, x, y, window=3, same=same) for backend in (place[1], "reference"))
        for mine, theirs in zip(got, expected, strict=True):
            assert torch.equal(mine.isfinite(), theirs.isfinite())
            torch.testing.assert_close(mine[:, 1], theirs[:, 1], rtol=1e-3, atol=1e-5)


@each_place
def test_weights_that_are_all_zero(place):
    x, y = (t.requires_grad_() for t in pair(2, 2, 7, 8, device=place[0]))
    with core.use_backend(place[1]):
        loss = ssim_loss(x, y, weight=torch.zeros(8, device=place[0]))
        gradients = torch.autograd.grad(loss, (x, y))
    assert loss.item() == 0 and not any(g.any() for g in gradients)


@each_place
def test_half_precision_whose_eager_sum_overflows(place):
    """The squares of 8-bit values do not fit float16, nor does their sum; ours are sums in float32."""
    x, y = (250 * t for t in pair(1, 2, 12, 12, dtype=torch.float16, device=place[0]))
    with core.use_backend(place[1]):
        loss = ssim_loss(x, y, data_range=255.0)
    exact = ssim_loss(x.double(), y.double(), data_range=255.0)
    assert (x * x).sum().isinf() and loss.item() == pytest.approx(exact.item(), rel=1e-5)


@each_place
def test_a_backward_without_what_the_forward_kept(place):
    """The op may be called without `keep`: the backward then makes the partial derivatives itself."""
    if place[1] == "reference":
        return
    x, y = pair(1, 2, 7, 9, device=place[0])
    options = (None, 5, 1.5, False, 1e-4, 9e-4, 0.0, False)
    grad = torch.tensor([[0.5, -2.0]], device=place[0])
    sums, partials = _ssim.fwd(x, y, *options, 0)
    assert partials.numel() == 0
    got = _ssim.bwd(grad, partials, x, y, *options, 0, True, True)
    wrt = [t.clone().requires_grad_() for t in (x, y)]
    expected = _ssim.reference(*wrt, *options)
    torch.testing.assert_close(sums, expected.detach())
    torch.testing.assert_close(got, torch.autograd.grad(expected, wrt, grad), rtol=1e-4, atol=1e-5)


@each_place
def test_ms_ssim_of_odd_sizes_and_half_precision(place):
    options = {"window": 3, "level_weights": (0.3, 0.3, 0.4), "padding": "same"}
    for dtype in DTYPES:
        x, y = (t.requires_grad_() for t in pair(1, 2, 7, 9, dtype=dtype, device=place[0]))
        results = []
        for backend in (place[1], "reference"):
            with core.use_backend(backend):
                loss = ms_ssim_loss(x, y, **options)
                results.append((loss.detach(), *torch.autograd.grad(loss, (x, y))))
        torch.testing.assert_close(*results, rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=1e-5)


@each_place
def test_what_the_kernels_lack_goes_to_the_reference(place):
    """Larger windows and images of two dtypes; where a backend is forced they are refused with the reason."""
    x, y = pair(1, 2, 14, 14, device=place[0])
    for other, options in ((y, {"window": 13}), (y.bfloat16(), {})):
        with core.use_backend(None):
            got = ssim_loss(x, other, **options)
        with core.use_backend("reference"):
            assert torch.equal(got, ssim_loss(x, other, **options))
        if place[1] != "reference":
            with core.use_backend(place[1]), pytest.raises(RuntimeError, match="cannot serve ssim: the kernels take"):
                ssim_loss(x, other, **options)
    with core.use_backend(place[1]):
        assert _ssim.backend(x, y, None, 11, 1.5, True, 1e-4, 9e-4, 0.0, False) == place[1]


@cpp_only
@each_padding
@pytest.mark.parametrize("cpu", ["default", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(monkeypatch, cpu, dtype, same):
    monkeypatch.setenv("FASTLOSS_CPU", cpu)
    for shape in ((2, 3, 17, 19), (1, 2, 11, 11), (1, 1, 70, 512)):
        x, y = pair(*shape, dtype=dtype)
        check(("cpu", "cpp"), x, y, same=same, where=str(shape))
        check(("cpu", "cpp"), *map(LAYOUTS["channels_last"], (x, y)), window=5, same=same, where=str(shape))


@cpp_only
@pytest.mark.parametrize("cpu", ["default", "avx2", "avx512"])
def test_large_gradients_are_streamed_whole(monkeypatch, cpu):
    """Two planes that are written past the caches get what each gets alone, which is small enough to stay."""
    monkeypatch.setenv("FASTLOSS_CPU", cpu)
    for dtype, width in ((torch.float32, 1040), (torch.bfloat16, 2080)):
        x, y = pair(1, 2, 1050, width, dtype=dtype)
        with core.use_backend("cpp"):
            whole, *parts = (
                torch.autograd.grad(_sums(a, b, None, 3, 1.5, True, 1e-4, 9e-4, 0.0, False).sum(), (a, b))
                for a, b in ((t[:, c].clone().requires_grad_() for t in (x, y)) for c in ([0, 1], [0], [1]))
            )
        for i in range(2):
            assert torch.equal(whole[i], torch.cat([part[i] for part in parts], 1))


@cpp_only
def test_thread_counts_give_the_same_bits():
    x, y = pair(2, 3, 333, 217)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(values("cpp", x, y))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@cpp_only
@each_padding
def test_the_kept_gradient_serves_every_upstream_gradient(same):
    """Each plane has its own; two calls of one graph, the first of which must not scale what the second finds."""
    for layout in LAYOUTS.values():
        x, y = (layout(t).requires_grad_() for t in pair(2, 3, 13, 15))
        wide = [t.detach().double().requires_grad_() for t in (x, y)]
        options = (None, 5, 1.5, same, 1e-4, 9e-4, 0.0, False)
        with core.use_backend("cpp"):
            sums = _sums(x, y, *options)
        expected = _ssim.reference(*wide, *options)
        for seed in (0, 1):
            upstream = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
            found = torch.autograd.grad(sums, (x, y), upstream, retain_graph=True)
            exact = torch.autograd.grad(expected, wide, upstream.double(), retain_graph=True)
            torch.testing.assert_close([g.double() for g in found], list(exact), rtol=1e-4, atol=1e-5)
