"""What a row cannot say of image_loss: its parts, where the gradients go, options of the parts."""

from __future__ import annotations

import pytest
import torch

from fastloss import ImageLoss, core, image_loss, pixel_loss, smoothness_loss, ssim_loss
from fastloss.image.image_loss import Inputs, _image_loss


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(2, 3, 14, 12, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)]


def test_total_is_the_weighted_sum_of_the_parts(images):
    total, parts = image_loss(*images, pixel=(1, 0.8), smoothness=("isotropic", 0.05), ssim=0.2)
    assert list(parts) == ["pixel", "smoothness", "ssim"]
    torch.testing.assert_close(parts["pixel"], pixel_loss(*images, p=1).detach())
    torch.testing.assert_close(parts["smoothness"], smoothness_loss(images[1], p="isotropic").detach())
    torch.testing.assert_close(parts["ssim"], ssim_loss(*images).detach())
    torch.testing.assert_close(total.detach(), 0.8 * parts["pixel"] + 0.05 * parts["smoothness"] + 0.2 * parts["ssim"])


def test_gradients_are_those_of_the_parts(images):
    total = image_loss(*images, pixel=("huber", 0.8), smoothness=(2, 0.05), ssim=0.2).total
    alone = 0.8 * pixel_loss(*images, p="huber") + 0.05 * smoothness_loss(images[1], p=2) + 0.2 * ssim_loss(*images)
    torch.testing.assert_close(torch.autograd.grad(total, images), torch.autograd.grad(alone, images))


def test_parts_are_detached_and_only_those_that_are_on(images):
    result = image_loss(*images, pixel=None, smoothness=(1, 2.0))
    assert result.total.requires_grad
    assert list(result.parts) == ["smoothness"]
    assert not result.parts["smoothness"].requires_grad
    torch.testing.assert_close(result.total.detach(), 2 * result.parts["smoothness"])


def test_default_is_the_pixel_loss(images):
    torch.testing.assert_close(image_loss(*images).total, pixel_loss(*images))
    flat = [t.flatten(1) for t in images]  # the pixel part alone takes any shape
    torch.testing.assert_close(image_loss(*flat, pixel=(1, 1.0)).total, pixel_loss(*images, p=1))
    with pytest.raises(ValueError, match="image: expected a 4-D tensor"):
        image_loss(*flat, ssim=1.0)


def test_a_part_of_weight_zero_is_reported_but_not_trained_on(images):
    total, parts = image_loss(*images, pixel=(2, 1.0), ssim=0.0)
    assert parts["ssim"] > 0
    expected = torch.autograd.grad(pixel_loss(*images), images)
    torch.testing.assert_close(torch.autograd.grad(total, images), expected)


def test_each_part_has_its_own_options(images):
    mask, guide = torch.rand(2, 1, 14, 12), images[0].detach()
    _, parts = image_loss(
        *images,
        pixel=("charbonnier", 1.0),
        smoothness=(1, 0.1),
        ssim=0.2,
        pixel_options={"eps": 0.1, "weight": mask},
        smoothness_options={"guide": guide, "order": 2},
        ssim_options={"window": 5, "padding": "valid", "weight": 1 - mask},
    )
    expected = {
        "pixel": pixel_loss(*images, p="charbonnier", eps=0.1, weight=mask),
        "smoothness": smoothness_loss(images[1], guide=guide, order=2),
        "ssim": ssim_loss(*images, window=5, padding="valid", weight=1 - mask),
    }
    torch.testing.assert_close(parts, {name: value.detach() for name, value in expected.items()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32(images, dtype):
    x, y = (t.detach().to(dtype) for t in images)
    total, parts = image_loss(x, y, pixel=(1, 1.0), smoothness=(1, 0.1), ssim=0.1)
    assert {t.dtype for t in (total, *parts.values())} == {torch.float32}


MIXES = {
    "pixel, smoothness": {"pixel": (1, 1.0), "smoothness": (1, 0.1)},
    "pixel, ssim": {"pixel": (3, 0.5), "ssim": 0.3},
    "smoothness, ssim": {"pixel": None, "smoothness": ("norm", 0.1), "ssim": 0.3},
    "all": {"pixel": ("charbonnier", 0.7), "smoothness": ("isotropic", 0.1), "ssim": 0.3},
    "options": {"pixel": (1.5, 0.5), "smoothness": (2, 0.2), "ssim": 0.2},
    "in one sweep": {"pixel": (2, 1.0), "smoothness": (2, 0.1)},
    "in one sweep, weight": {"pixel": ("charbonnier", 0.7), "smoothness": (1, 0.1)},
    "in one sweep, all": {"pixel": (1, 0.7), "smoothness": (2, 0.1), "ssim": 0.3},
    "in one sweep, all, weight": {"pixel": ("charbonnier", 0.7), "smoothness": (1, 0.1), "ssim": 0.3},
}


@pytest.mark.skipif(core.backend_report()["cpp"] != "available", reason="the C++ kernels are not built")
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("cpu", ["default", "avx2", "avx512"])
def test_one_pass_agrees_with_the_reference(monkeypatch, cpu, mix):
    """Several bands, tiles across, one pixel; images of different memory formats; one gradient or both."""
    monkeypatch.setenv("FASTLOSS_CPU", cpu)
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 3, 9, 21), (1, 2, 150, 40), (1, 1, 3, 530), (1, 20, 4, 5), (1, 1, 1, 1)):
        x = torch.rand(shape, generator=generator)
        y = (x + 0.2 * torch.randn(shape, generator=generator)).contiguous(memory_format=torch.channels_last)
        options = dict(MIXES[mix])
        weight = torch.rand(shape[0], 1, *shape[2:], generator=generator)
        if mix == "options" or "weight" in mix:
            options["pixel_options"] = {"weight": weight}
        if mix == "options":
            options["smoothness_options"] = {"weight": weight, "guide": x, "order": 2}
            options["ssim_options"] = {"weight": weight, "window": 5}
        for needs_image in (False, True):
            found = []
            for backend in ("cpp", "reference"):
                leaves = [x.clone().requires_grad_(needs_image), y.clone().requires_grad_()]
                with core.use_backend(backend):
                    total, parts = image_loss(*leaves, **options)
                    wrt = leaves if needs_image else leaves[1:]
                    found.append([total.detach(), *parts.values(), *torch.autograd.grad(total, wrt)])
            torch.testing.assert_close(*found, rtol=2e-5, atol=2e-7)


@pytest.mark.skipif(core.backend_report()["cpp"] != "available", reason="the C++ kernels are not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_upstream_gradient_of_the_sums(dtype):
    """A multiple of the weights takes the gradient that was kept, all else makes it again; any number of times."""
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.rand(2, 3, 20, 23, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    weights = torch.tensor([0.5, 0.0, 0.25, 0.125])
    inputs = Inputs(
        x, y, pixel_kind="l1", smoothness_kind="l2", window=11, sigma=1.5, same=True, c1=1e-4, c2=9e-4, keep=11,
        sum_weights=weights,
    )  # fmt: skip
    with core.use_backend("cpp"):
        sums = _image_loss(*inputs)
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    expected = _image_loss.reference(*inputs._replace(image=wide[0], image_pred=wide[1]))
    for upstream in (4 * weights, torch.tensor([1.0, -2.0, 0.5, 3.0]), weights, 0 * weights):
        found = torch.autograd.grad(sums, (x, y), upstream, retain_graph=True)
        exact = torch.autograd.grad(expected, wide, upstream.double(), retain_graph=True)
        rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (1e-2, 1e-3)
        torch.testing.assert_close([g.double() for g in found], list(exact), rtol=rtol, atol=atol)


@pytest.mark.skipif(core.backend_report()["cpp"] != "available", reason="the C++ kernels are not built")
def test_thread_counts_give_the_same_bits():
    generator = torch.Generator().manual_seed(6)
    x, y = (torch.rand(2, 3, 300, 70, generator=generator).requires_grad_() for _ in range(2))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            total, parts = image_loss(x, y, pixel=(1, 0.8), smoothness=(1, 0.1), ssim=0.2)
            found.append([total.detach(), *parts.values(), *torch.autograd.grad(total, (x, y))])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("backend", [b for b in ("cpp", "reference") if core.backend_report()[b] == "available"])
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (13, 14)])
def test_constant_and_narrow_images(backend, size):
    """Equal constant images: every part and every gradient is 0."""
    x, y = (torch.full((2, 3, *size), 0.5).requires_grad_() for _ in range(2))
    with core.use_backend(backend):
        total, parts = image_loss(x, y, pixel=(1, 1.0), smoothness=("isotropic", 0.1), ssim=0.2)
    assert total.item() == 0 and not any(part.any() for part in parts.values())
    assert not any(g.any() for g in torch.autograd.grad(total, (x, y)))


def test_module_form(images):
    module = ImageLoss(pixel=(1, 0.8), ssim=0.2)
    torch.testing.assert_close(module(*images).total, image_loss(*images, pixel=(1, 0.8), ssim=0.2).total)
    total, parts = module(*images, smoothness=(1, 0.1), smoothness_options={"guide": images[0].detach()})
    assert "smoothness" in parts and total.requires_grad


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"pixel": (3.0,)}, TypeError, r"pixel: expected \(p, w\)"),
        ({"smoothness": (3, 1.0)}, ValueError, "p: expected one of"),
        ({"smoothness": (1, "1")}, TypeError, "smoothness: w: expected a number, got str"),
        ({"ssim": True}, TypeError, "ssim: expected a number, got bool"),
        ({"ssim": 1.0, "ssim_options": [3]}, TypeError, "ssim_options: expected a dict of options, got list"),
        ({"smoothness_options": {"order": 2}}, ValueError, "smoothness_options: the part it is for is off"),
        ({"smoothness": (1, 1.0), "smoothness_options": {"convention": "kornia"}}, TypeError, "unknown option 'conven"),
    ],
)
def test_bad_options(images, options, error, text):
    with pytest.raises(error, match=text):
        image_loss(*images, **options)
