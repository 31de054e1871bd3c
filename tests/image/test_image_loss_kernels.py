"""Kernels of image_loss: every mix of parts in one pass, what is kept, layouts, edges, offsets past 32 bits."""

from __future__ import annotations

import importlib

import pytest
import torch

from fastloss import core, image_loss
from fastloss.image.image_loss import SIGNS, Inputs, _image_loss, _keep
from tests.conformance.cases import CASES, Draw, image_pair
from tests.conformance.tools import INTERPRETING, Errors, places

pytestmark = pytest.mark.kernels

PLACES = places(next(case for case in CASES if case.name == "image_loss"))
TRITON = [p for p in PLACES if "triton" in str(p)]
SAME = {"window": 3, "sigma": 1.5, "same": True, "c1": 1e-4, "c2": 9e-4}
SSIM = {"off": {}, "same": SAME, "valid": SAME | {"window": 5, "sigma": 1.0, "same": False, "low": -0.1}}
# (kinds "pixel,smoothness", parameter of the pixel loss, order, SSIM, whether there are maps of weights and a guide)
MIXES = {
    "signs": ("l1,l1", 1.0, 1, "off", False),
    "signs, second order": ("l1,l1", 1.0, 2, "off", False),
    "streamed": ("huber,isotropic", 0.3, 1, "off", False),
    "streamed with maps": ("lp,l2", 1.5, 2, "off", True),
    "charbonnier and squares": ("charbonnier,l2", 0.1, 1, "off", False),
    "sweep": ("l1,l1", 1.0, 1, "same", False),
    "sweep with maps": ("charbonnier,l1", 0.1, 2, "same", True),
    "sweep, isotropic": ("huber,isotropic", 0.3, 1, "same", False),
    "sweep without pixels": (",l2", 0.0, 2, "valid", False),
    "sweep without smoothness": ("l2,", 2.0, 1, "valid", True),
}
each_place = pytest.mark.parametrize("place", PLACES)
each_mix = pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)


def steps(*shape, device="cpu", dtype=torch.float32, seed=0):
    """Values in steps of 1/8, so that neighbours and pairs are often equal."""
    return (torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(seed)) / 8).to(device, dtype)


def inputs(shape, mix, device, dtype=torch.float32):
    """The op's arguments: an image pair, and the fields of a mix."""
    kinds, parameter, order, ssim, with_maps = mix
    pixel, smoothness = kinds.split(",")
    fields = {"pixel_kind": pixel, "pixel_parameter": parameter, "smoothness_kind": smoothness, "order": order}
    fields |= SSIM[ssim]
    window = fields.get("window", 0)
    if with_maps:
        weight = (steps(shape[0], 1, *shape[2:], device=device, seed=2) + 0.5).expand(shape)
        cut = 0 if fields.get("same", True) else window // 2
        fields["pixel_weight"] = weight
        if smoothness:
            fields["guide"] = steps(shape[0], 3, *shape[2:], device=device, seed=3)
            fields["smoothness_weight"] = weight
        if window:
            fields["ssim_weight"] = weight[..., cut : shape[-2] - cut, cut : shape[-1] - cut]
    if window:  # flat patches would make the partials of SSIM large, and cancel
        pair = image_pair(Draw(dtype, device), shape)
    else:
        pair = tuple(steps(*shape, device=device, dtype=dtype, seed=s) for s in (0, 1))
    return Inputs(*pair, **fields)


def values(backend, x, needs=(True, True)):
    """The sums, and the gradients asked for under an upstream gradient that differs from sum to sum."""
    pair = [t.detach().requires_grad_(needed) for t, needed in zip((x.image, x.image_pred), needs, strict=True)]
    x = x._replace(image=pair[0], image_pred=pair[1])
    with core.use_backend(backend):
        sums = _image_loss(*x._replace(keep=_keep(x) if backend == "triton" else 0))
        upstream = torch.linspace(-0.7, 2, sums.numel(), device=sums.device).to(sums.dtype)
        wrt = [t for t in pair if t.requires_grad]
        return sums.detach(), *torch.autograd.grad(sums, wrt, upstream)


def compare(errors, place, x, needs=(True, True), where=""):
    """Adds to the conformance tests' rule: within 2x the error of the reference in that dtype, plus eps of the
    largest value."""
    found = [values(b, x, needs) for b in (place[1], "reference")]
    exact = values("reference", Inputs(*(t.double() if isinstance(t, torch.Tensor) else t for t in x)), needs)
    for i, each in enumerate(zip(*found, exact, strict=True)):
        errors.add("sums" if i == 0 else f"gradient {i}", *each, where)
    return found[0]


def check(place, x, needs=(True, True), where=""):
    errors = Errors(x.image.dtype)
    compare(errors, place, x, needs, where)
    errors.check()


@each_place
@each_mix
def test_every_mix(place, mix):
    """Odd sizes and single rows; either memory format; both gradients or one."""
    shapes = ((1, 2, 5, 7),) if INTERPRETING else ((2, 3, 9, 21), (1, 2, 150, 40), (3, 1, 40, 5), (1, 2, 6, 530))
    errors = Errors(torch.float32)
    for shape in shapes:
        for last in (False, True):
            x = inputs(shape, mix, place[0])
            if last:
                x = x._replace(image_pred=x.image_pred.contiguous(memory_format=torch.channels_last))
            for needs in ((False, True), (True, True))[1 if INTERPRETING and last else 0 :]:
                _, *gradients = compare(errors, place, x, needs, f"{shape} {last} {needs}")
                needed = (x.image, x.image_pred) if all(needs) else (x.image_pred,)
                for gradient, image in zip(gradients, needed, strict=True):
                    assert place[1] == "reference" or gradient.stride() == image.stride()
    errors.check()


@each_place
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["signs", "streamed", "sweep", "charbonnier and squares"])
def test_half_precision(place, dtype, name):
    check(place, inputs((1, 2, 6, 19), MIXES[name], place[0], dtype))


@each_place
@pytest.mark.parametrize("name", ["signs", "streamed", "sweep"])
def test_one_pixel_wide_and_constant_images(place, name):
    errors = Errors(torch.float32)  # of one pixel the reference may be exact by luck
    for shape in ((1, 1, 1, 1), (1, 2, 1, 9), (1, 2, 9, 1)):
        compare(errors, place, inputs(shape, MIXES[name], place[0]), where=str(shape))
    errors.check()
    x = inputs((1, 2, 6, 5), MIXES[name], place[0])
    same = torch.full_like(x.image, 0.3)
    sums, *gradients = values(place[1], x._replace(image=same, image_pred=same.clone()))
    assert not sums.any() and not any(g.any() for g in gradients)


@each_place
@pytest.mark.parametrize("p", [1, 2])
def test_volumes(place, p):
    """Three axes do not fit the byte of signs: the images are read again."""
    x = inputs((1, 2, 3, 4, 5), (f"l{p},l{p}", float(p), 1, "off", False), place[0])
    x.image.requires_grad_(), x.image_pred.requires_grad_()
    assert _keep(x) == 0
    check(place, x)


@each_place
def test_nan_and_infinity_pass_as_in_the_reference(place):
    """NaN is in the sums; its sign, and so its gradient, is 0."""
    for bad in (float("nan"), float("inf")):
        x = inputs((1, 2, 4, 6), MIXES["signs"], place[0])
        x.image_pred[0, 0, 1, 2] = bad
        found = [values(b, x) for b in (place[1], "reference")]
        torch.testing.assert_close(*found, equal_nan=True)


@each_place
def test_weights_that_are_all_zero(place):
    x, y, *_ = inputs((1, 2, 7, 6), MIXES["signs"], place[0])
    off = {"weight": torch.zeros(6, device=place[0])}
    with core.use_backend(place[1]):
        total, parts = image_loss(
            x, y.requires_grad_(), pixel=(1, 1.0), smoothness=(1, 1.0), ssim=1.0, pixel_options=off,
            smoothness_options=off, ssim_options=off | {"window": 3},
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(total, y)
    assert not any(parts.values()) and not total and not gradient.any()


@each_place
def test_half_precision_whose_eager_sum_overflows(place):
    board = torch.arange(48, device=place[0])[:, None].add(torch.arange(48, device=place[0])).remainder(2)
    y = (60000.0 * board)[None, None].half()
    with core.use_backend(place[1]):
        _, parts = image_loss(torch.zeros_like(y), y, pixel=(1, 1.0), smoothness=(1, 1.0))
    assert y.sum().isinf()
    assert parts["pixel"].item() == 30000 and parts["smoothness"].item() == 2 * 60000


@pytest.mark.parametrize("place", TRITON)
def test_what_is_kept(place):
    """A byte per element where every gradient is a sign, SSIM's partials, or nothing; nothing without gradients."""

    def kept(mix, shape=(1, 2, 7, 6)):
        x = inputs(shape, mix, place[0])
        x.image_pred.requires_grad_()
        keep = _keep(x)
        return keep, _image_loss.fwd(*x._replace(keep=keep))[1]

    keep, signs = kept(MIXES["signs"])
    assert keep == SIGNS and (signs.dtype, signs.shape) == (torch.uint8, (84,))
    keep, partials = kept(MIXES["sweep"])
    assert keep == 2 and (partials.dtype, partials.shape) == (torch.float32, (3, 7, 12))
    assert kept(MIXES["streamed"])[1].numel() == 0
    with torch.no_grad():
        assert kept(MIXES["signs"])[1].numel() == kept(MIXES["sweep"])[1].numel() == 0


@pytest.mark.parametrize("place", TRITON)
@pytest.mark.parametrize("name", ["signs", "sweep"])
def test_a_backward_without_what_the_forward_kept(place, name):
    x = inputs((1, 2, 7, 6), MIXES[name], place[0])
    grad = torch.linspace(-1, 2, 4, device=place[0])
    sums, kept = _image_loss.fwd(*x)
    got = _image_loss.bwd(grad, kept, *x, True, True)
    wrt = [t.clone().requires_grad_() for t in (x.image, x.image_pred)]
    expected = _image_loss.reference(*x._replace(image=wrt[0], image_pred=wrt[1]))
    torch.testing.assert_close(sums, expected.detach())
    torch.testing.assert_close(got, torch.autograd.grad(expected, wrt, grad), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", TRITON)
def test_what_the_kernels_do_not_take_goes_to_the_parts(place, monkeypatch):
    """Larger windows, and an isotropic smoothness with a guide: the parts' own kernels then."""
    called, module = [], importlib.import_module("fastloss.image.image_loss")
    original = module._part_by_part
    monkeypatch.setattr(module, "_part_by_part", lambda *args: called.append(1) or original(*args))
    x, y, *_ = inputs((1, 1, 5, 6), MIXES["signs"], place[0])
    options = {"smoothness": ("isotropic", 1.0), "smoothness_options": {"guide": x}}
    with core.use_backend(None):  # a forced backend refuses such a window
        image_loss(x, y, pixel=(1, 1.0), smoothness=(1, 1.0))
        assert not called
        image_loss(x, y, pixel=(1, 1.0), **options)
        image_loss(x, y, pixel=(1, 1.0), ssim=1.0, ssim_options={"window": 13})
        both = {"order": 2, "weight": x}
        image_loss(x, y, pixel=(1, 1.0), smoothness=(1, 1.0), ssim=1.0, smoothness_options=both)
    assert len(called) == 3


@pytest.mark.parametrize("place", TRITON)
@pytest.mark.parametrize("name", ["signs", "streamed with maps", "sweep with maps"])
def test_wide_offsets(place, name, monkeypatch):
    """What only tensors of billions of elements reach, at a small size."""
    from fastloss.core.kernels import memory_order

    monkeypatch.setattr(memory_order, "_INT32_SPAN", 0)
    check(place, inputs((1, 2, 5, 7), MIXES[name], place[0]), (False, True))
