"""pytorch_msssim's functions and modules and their drop-ins."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

import fastloss
from fastloss.compat import _common
from tests.compat.tools import Draws

theirs = pytest.importorskip("pytorch_msssim")
from fastloss.compat import pytorch_msssim as ours  # noqa: E402

FLOATS = (torch.float32,)  # its window has the digits of float32 in float64 too


def exact(fn, shape, win_size=11, win_sigma=1.5, **options):
    """The function with a window that has the digits of float64."""
    offsets = torch.arange(win_size, dtype=torch.float64) - win_size // 2
    win = torch.softmax(-(offsets**2) / (2 * win_sigma**2), 0).repeat(shape[1], *(1 for _ in shape[1:]))
    return lambda *images: fn(*images, win=win, **options)


def pictures(draw, low, high, data_range, depth=()):
    """An image and it with noise, as similar as a prediction is; with `depth`, its bounds, some are volumes."""
    shape = [draw.size(1, 2), draw.size(1, 3), draw.size(low, high), draw.size(low, high)]
    if depth and draw.one_of(True, False, False):
        shape = [1, shape[1], draw.size(*depth), *shape[2:]]
    image = draw.uniform(*shape)
    return [data_range * image, data_range * (0.7 * image + 0.3 * draw.uniform(*shape))]


def test_ssim():
    for draw in Draws(120, FLOATS):
        window = {"win_size": draw.one_of(3, 5, 7), "win_sigma": draw.one_of(1.0, 1.5)}
        options = window | {"data_range": draw.one_of(1.0, 255), "size_average": draw.one_of(True, False)}
        options |= {"K": draw.one_of((0.01, 0.03), [0.02, 0.4]), "nonnegative_ssim": draw.one_of(True, False)}
        tensors = pictures(draw, 8, 16, options["data_range"], depth=(7, 9))
        _, channels, *sides = tensors[0].shape
        pair = [functools.partial(module.ssim, **options) for module in (ours, theirs)]
        if draw.one_of(True, False):
            pair = [module.SSIM(channel=channels, spatial_dims=len(sides), **options) for module in (ours, theirs)]
        draw.compare(*pair, tensors, exact(theirs.ssim, tensors[0].shape, **options))


def test_negative_channels_count_0():
    for draw in Draws(8, FLOATS):
        image = draw.uniform(*draw.one_of((2, 3, 16, 16), (1, 2, 11, 12, 13)))
        options = {"data_range": 1.0, "nonnegative_ssim": True, "size_average": draw.one_of(True, False)}
        pair = [functools.partial(module.ssim, **options) for module in (ours, theirs)]
        draw.compare(*pair, [image, 1 - image], exact(theirs.ssim, image.shape, **options))


def test_ms_ssim():
    for draw in Draws(16, FLOATS):
        window = {"win_size": draw.one_of(3, 5), "win_sigma": draw.one_of(1.0, 1.5)}
        options = window | {"data_range": draw.one_of(1.0, 255), "size_average": draw.one_of(True, False)}
        options["weights"] = draw.one_of(None, [0.3, 0.3, 0.4], [0.1, 0.2, 0.3, 0.3, 0.1])
        tensors = pictures(draw, 65, 90, options["data_range"])
        pair = [functools.partial(module.ms_ssim, **options) for module in (ours, theirs)]
        if draw.one_of(True, False):
            pair = [module.MS_SSIM(channel=tensors[0].shape[1], **options) for module in (ours, theirs)]
        draw.compare(*pair, tensors, exact(theirs.ms_ssim, tensors[0].shape, **options))


def test_ms_ssim_of_volumes():
    for draw in Draws(6, FLOATS[:1]):
        options = {"win_size": 3, "data_range": 1.0, "weights": draw.one_of([0.3, 0.7], [0.2, 0.3, 0.5])}
        image = draw.uniform(1, draw.size(1, 2), draw.size(9, 12), draw.size(33, 36), draw.size(33, 36))
        tensors = [image, 0.7 * image + 0.3 * draw.uniform(*image.shape)]
        pair = [module.MS_SSIM(channel=image.shape[1], spatial_dims=3, **options) for module in (ours, theirs)]
        draw.compare(*pair, tensors, exact(theirs.ms_ssim, image.shape, **options))


@pytest.mark.parametrize("shape", [(2, 1, 4, 7, 8), (2, 3, 16, 4)])
def test_what_the_window_does_not_fit_into_is_theirs(shape):
    for draw in Draws(3, FLOATS):
        pair = [
            module.SSIM(1.0, win_size=5, channel=shape[1], spatial_dims=len(shape) - 2) for module in (ours, theirs)
        ]
        draw.compare(*pair, [draw.uniform(*shape), draw.uniform(*shape)], quiet=False)


def test_half_precision_gives_half_precision():
    image = torch.rand(1, 1, 16, 16, dtype=torch.bfloat16)
    assert ours.ssim(image, image, data_range=1).dtype == theirs.ssim(image, image, data_range=1).dtype


def test_attributes_and_errors():
    for name in ("SSIM", "MS_SSIM"):
        mine, other = getattr(ours, name)(win_sigma=2.0, channel=2), getattr(theirs, name)(win_sigma=2.0, channel=2)
        assert isinstance(mine, getattr(theirs, name)) and mine.state_dict() == other.state_dict()
        for key, value in vars(other).items():
            if key[0] != "_" and key != "win":
                assert getattr(mine, key) == value
        torch.testing.assert_close(mine.win, other.win)
        assert copy.deepcopy(mine).win_sigma == 2.0
    image = torch.rand(1, 3, 100, 100)
    _common._said.clear()
    for call in (lambda m: m.ssim(image, image[:, :2]), lambda m: m.ssim(image, image, win_size=4)):
        for module in (ours, theirs):
            with pytest.raises(ValueError):
                call(module)
    for module in (ours, theirs):
        with pytest.raises(AssertionError, match="larger than 160"):
            module.ms_ssim(image, image)


def test_patched_it_still_makes_its_own_modules():
    """SSIM's constructor calls `super(SSIM, self)`; what it does not fit into goes through the patched function."""
    with fastloss.patch("pytorch_msssim") as swapped:
        module = theirs.SSIM(data_range=1.0, win_size=3, channel=1, spatial_dims=3)
        assert type(module) is ours.SSIM and theirs.ssim is ours.ssim
        _common._said.clear()
        with pytest.warns(UserWarning, match="pytorch_msssim.ssim is computed by the library itself") as said:
            module(torch.rand(1, 1, 2, 5, 5), torch.rand(1, 1, 2, 5, 5))
        assert ["library itself" in str(one.message) for one in said].count(True) == 1
    assert swapped.swapped == {} and theirs.SSIM is not ours.SSIM
