"""piq's losses and their drop-ins."""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict

import pytest
import torch
from torch import nn

from tests.compat.tools import Draws, check_errors

theirs = pytest.importorskip("piq")
from fastloss.compat import piq as ours  # noqa: E402

FLOATS = (torch.float32, torch.float32, torch.float64)


def pictures(draw, shape, data_range):
    image = draw.uniform(*shape)
    return [data_range * (0.9 * image + 0.1 * draw.uniform(*shape)), data_range * image]


def test_ssim():
    for draw in Draws(120, FLOATS):
        options = {
            "kernel_size": draw.one_of(3, 7, 11),
            "kernel_sigma": draw.one_of(1.0, 1.5),
            "data_range": draw.one_of(1.0, 255),
            "reduction": draw.one_of("mean", "sum", "none"),
            "downsample": draw.one_of(True, False),
            "k1": draw.one_of(0.01, 0.02),
            "k2": draw.one_of(0.03, 0.4),
        }
        pair = [functools.partial(m.ssim, **options) for m in (ours, theirs)]
        if draw.one_of(True, False):
            pair = [m.SSIMLoss(**options) for m in (ours, theirs)]
        elif draw.one_of(True, False):
            pair = [functools.partial(m.ssim, full=True, **options) for m in (ours, theirs)]
        shape = draw.size(1, 2), draw.size(1, 3), draw.size(12, 24), draw.size(12, 24)
        draw.compare(*pair, pictures(draw, shape, options["data_range"]))


def test_large_images_are_averaged_down():
    for draw in Draws(2, FLOATS[:1]):
        draw.compare(ours.ssim, theirs.ssim, pictures(draw, (1, 1, 386, 390), 1.0))


def test_multi_scale_ssim():
    weights = [None, torch.tensor([0.3, 0.3, 0.4]), torch.tensor([0.2, 0.2, 0.2, 0.5])]
    for draw in Draws(24, FLOATS[:1]):  # five levels of float64 differ by more than the rule's 64 roundings
        given = draw.one_of(*weights)
        options = {
            "kernel_size": draw.one_of(3, 5),
            "data_range": draw.one_of(1.0, 255),
            "reduction": draw.one_of("mean", "sum", "none"),
            "scale_weights": given,
        }
        pair = [functools.partial(m.multi_scale_ssim, **options) for m in (ours, theirs)]
        if draw.one_of(True, False):
            pair = [m.MultiScaleSSIMLoss(**options) for m in (ours, theirs)]
        shape = draw.size(1, 2), draw.size(1, 3), draw.size(65, 80), draw.size(65, 80)
        draw.compare(*pair, pictures(draw, shape, options["data_range"]))


def test_total_variation():
    for draw in Draws(120):
        options = {"norm_type": draw.one_of("l1", "l2", "l2_squared"), "reduction": draw.one_of("mean", "sum", "none")}
        pair = [functools.partial(m.total_variation, **options) for m in (ours, theirs)]
        if draw.one_of(True, False):
            pair = [m.TVLoss(**options) for m in (ours, theirs)]
        draw.compare(*pair, [draw.uniform(draw.size(1, 3), draw.size(1, 3), draw.size(2, 20), draw.size(2, 20))])
    flat = torch.ones(1, 1, 4, 4, requires_grad=True)
    assert torch.equal(torch.autograd.grad(ours.total_variation(flat), flat)[0], torch.zeros_like(flat))


def network(double: bool = False) -> nn.Sequential:
    """Named layers as of torchvision's `features`, its ReLUs in place too."""
    torch.manual_seed(4)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3), nn.ReLU(True)]
    return nn.Sequential(*layers).double() if double else nn.Sequential(*layers)


@pytest.mark.parametrize("name", ["ContentLoss", "StyleLoss"])
def test_content_and_style(name):
    for draw in Draws(24, FLOATS):
        options = {
            "layers": draw.one_of(["1"], ["0", "4"], ["1", "3", "4"]),
            "replace_pooling": draw.one_of(True, False),
            "distance": draw.one_of("mse", "mae"),
            "reduction": draw.one_of("mean", "sum", "none"),
            "normalize_features": draw.one_of(True, False),
        }
        if options["normalize_features"]:  # of taps that a ReLU overwrites piq has no gradient
            options["layers"] = draw.one_of(["1"], ["1", "4"])
        options["weights"] = [draw.one_of(1.0, 0.3, torch.tensor(2.0)) for _ in options["layers"]]
        mine, other = (getattr(m, name)(network(), **options) for m in (ours, theirs))
        shape = draw.size(1, 3), 3, draw.size(8, 14), draw.size(8, 14)
        draw.compare(mine, other, [draw.uniform(*shape), draw.uniform(*shape)])


def test_weights_of_several_numbers_are_piqs():
    for draw in Draws(2, FLOATS):
        weights = [draw.uniform(1, 8, 1, 1)]
        pair = [m.ContentLoss(network(), layers=["1"], weights=weights) for m in (ours, theirs)]
        draw.compare(*pair, [draw.uniform(1, 3, 8, 8), draw.uniform(1, 3, 8, 8)], quiet=False)


@pytest.fixture(scope="module")
def made():
    """The modules of (ours, theirs) with the same weights, drawn in place of those that piq downloads.

    The network has the taps of VGG16, by name and width, and one small convolution before each.
    """
    torch.manual_seed(3)
    channels = 64, 128, 256, 512, 512
    layers, width = OrderedDict(), 3
    for tap, wider in zip((3, 8, 15, 22, 29), channels, strict=True):
        layers |= {str(tap - 1): nn.Conv2d(width, wider, 1, groups=1 if width == 3 else 64), str(tap): nn.ReLU(True)}
        layers[str(tap + 1)] = nn.MaxPool2d(2)
        width = wider
    layers = nn.Sequential(layers)
    lins = [torch.rand(1, c, 1, 1) for c in channels]
    sums = {name: torch.rand(1, 3 + sum(channels), 1, 1) / 1475 for name in ("alpha", "beta")}

    def make(name, **options):
        with pytest.MonkeyPatch.context() as patch:
            vgg = types.SimpleNamespace(features=copy.deepcopy(layers))
            patch.setattr(theirs.perceptual, "vgg16", lambda **k: vgg)
            patch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: lins if name == "LPIPS" else sums)
            return tuple(getattr(m, name)(**options) for m in (ours, theirs))

    return make


def anew(module):
    """Calls of a copy each: piq's pooling keeps the dtype of its first images, and the network that of the last."""
    return lambda *images: copy.deepcopy(module)(*images)


@pytest.mark.parametrize("name", ["LPIPS", "DISTS"])
def test_lpips_and_dists(name, made):
    # theirs is the float64 truth, whose covariances of DISTS are differences: by more than the rule's 64 roundings off
    for draw in Draws(6, FLOATS if name == "LPIPS" else FLOATS[:1]):
        options = {"reduction": draw.one_of("mean", "sum", "none")}
        if draw.one_of(True, False):
            options |= {"mean": [0.0] * 3, "std": [1.0] * 3}
        if name == "LPIPS":
            options["replace_pooling"] = draw.one_of(True, False)
        shape = draw.size(1, 2), 3, draw.size(32, 40), draw.size(32, 40)
        draw.compare(*map(anew, made(name, **options)), pictures(draw, shape, 1.0))


def test_lpips_of_absolute_differences_is_piqs_and_large_images_shrink(made):
    for draw in Draws(1, FLOATS[:1]):
        images = pictures(draw, (1, 3, 32, 32), 1.0)
        draw.compare(*map(anew, made("LPIPS", distance="mae")), images, quiet=False)
        mine, other = made("DISTS")
        draw.compare(anew(mine), anew(other), pictures(draw, (1, 3, 258, 262), 1.0), frozen=2)
    assert isinstance(mine, ours.ContentLoss) and list(mine.state_dict()) == list(other.state_dict())


def test_what_is_piqs():
    """Complex images."""
    for draw in Draws(2, FLOATS):
        complex_images = [draw.uniform(1, 2, 16, 16, 2), draw.uniform(1, 2, 16, 16, 2)]
        draw.compare(*(m.ssim for m in (ours, theirs)), complex_images, quiet=False)


def test_attributes_and_state():
    mine, other = (m.MultiScaleSSIMLoss(scale_weights=torch.tensor([0.5, 0.5])) for m in (ours, theirs))
    assert list(mine.state_dict()) == list(other.state_dict()) == ["scale_weights"]
    mine.load_state_dict(other.state_dict())
    assert isinstance(ours.StyleLoss(network(), ["1"]), ours.ContentLoss) and copy.deepcopy(mine).kernel_size == 11
    content = ours.ContentLoss(network(), ["1"])
    assert list(content.state_dict()) == list(theirs.ContentLoss(network(), ["1"]).state_dict())


def test_errors():
    image = torch.rand(1, 3, 16, 16)
    wrong = [
        lambda m: m.ssim(image, 2 * image),
        lambda m: m.ssim(image - 1, image),
        lambda m: m.ssim(image, image[:, :2]),
        lambda m: m.ssim(image[0], image[0]),
        lambda m: m.ssim(image, image, kernel_size=4),
        lambda m: m.ssim(image, image, kernel_size=17),
        lambda m: m.ssim(image, image, reduction="median"),
        lambda m: m.SSIMLoss(kernel_size=2),
        lambda m: m.multi_scale_ssim(image, image),
        lambda m: m.multi_scale_ssim(image, image, scale_weights=torch.ones(2, 2)),
        lambda m: m.total_variation(image, norm_type="l3"),
        lambda m: m.total_variation(image[0]),
        lambda m: m.total_variation(image, reduction="median"),
        lambda m: m.ContentLoss(network(), layers=["0"], weights=[1.0, 2.0]),
        lambda m: m.ContentLoss(network(), ["1"])(image, image[0]),
    ]
    check_errors(wrong, ours, theirs)
