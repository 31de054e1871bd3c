"""piq's losses and their drop-ins."""

from __future__ import annotations

import copy
import functools

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
    for draw in Draws(40, FLOATS):
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
        shape = draw.size(1, 2), draw.size(1, 3), 16 * draw.size(5, 6), 16 * draw.size(5, 6)
        draw.compare(*pair, pictures(draw, shape, options["data_range"]))


def test_total_variation():
    for draw in Draws(32):
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


def test_what_is_piqs():
    """Contrasts beside SSIM, complex images, sides that are odd at some level."""
    for draw in Draws(2, FLOATS):
        images = [draw.uniform(1, 2, 20, 20), draw.uniform(1, 2, 20, 20)]
        for options in ({"full": True}, {"kernel_size": 5, "full": True}):
            draw.compare(*(functools.partial(m.ssim, **options) for m in (ours, theirs)), images, quiet=False)
        complex_images = [draw.uniform(1, 2, 16, 16, 2), draw.uniform(1, 2, 16, 16, 2)]
        draw.compare(*(m.ssim for m in (ours, theirs)), complex_images, quiet=False)
        odd = pictures(draw, (1, 1, 90, 81), 1.0)
        draw.compare(*(functools.partial(m.multi_scale_ssim, kernel_size=5) for m in (ours, theirs)), odd, quiet=False)


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
