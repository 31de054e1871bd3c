"""kornia's losses and their drop-ins."""

from __future__ import annotations

import functools

import pytest
import torch

from fastloss.compat import _common
from tests.compat.tools import Draws, check_errors

theirs = pytest.importorskip("kornia.losses")
from fastloss.compat import kornia as ours  # noqa: E402

FLOATS = (torch.float32, torch.float32, torch.float64)


def test_total_variation():
    for draw in Draws(120):
        shape = [draw.size(1, 20) for _ in range(draw.size(2, 5))]
        reduction = draw.one_of("mean", "sum")
        pair = [functools.partial(m.total_variation, reduction=reduction) for m in (ours, theirs)]
        if draw.one_of(True, False):
            pair = [m.TotalVariation() for m in (ours, theirs)]
        draw.compare(*pair, [draw.normal(*[min(n, 4) for n in shape[:-2]], *shape[-2:])])


def test_ssim_loss():
    for draw in Draws(120, FLOATS):
        shape = draw.size(1, 2), draw.size(1, 3), draw.size(12, 18), draw.size(12, 18)
        image, scale = draw.uniform(*shape), draw.one_of(1.0, 255.0)
        image_pred = 0.7 * image + 0.3 * draw.uniform(*shape)
        options = {
            "window_size": draw.one_of(3, 5, 11),
            "max_val": scale,
            "reduction": draw.one_of("mean", "sum", "none"),
            "padding": draw.one_of("same", "valid", "SAME"),
        }
        options["eps"] = 0.0 if draw.dtype == torch.float64 else 1e-12  # which float64 would show
        pair = [functools.partial(m.ssim_loss, **options) for m in (ours, theirs)]
        if draw.one_of(True, False):
            pair = [m.SSIMLoss(**options) for m in (ours, theirs)]
        draw.compare(*pair, [scale * image_pred, scale * image])


def test_ssim_maps_and_volumes():
    for draw in Draws(60, FLOATS[:1]):  # single pixels in float64 differ by more than the rule's 64 roundings
        volumes = draw.one_of(True, False)
        shape = draw.size(1, 2), draw.size(1, 2), *(draw.size(6, 8) for _ in range(2 + volumes))
        image = draw.uniform(*shape)
        options = {"window_size": draw.one_of(3, 5), "padding": draw.one_of("same", "valid")}
        kinds = {"metrics.ssim": "metrics.SSIM"}
        if volumes:
            kinds = {"metrics.ssim3d": "metrics.SSIM3D", "losses.ssim3d_loss": "losses.SSIM3DLoss"}
        function, module = draw.one_of(*kinds.items())
        if function.startswith("losses"):
            options["reduction"] = draw.one_of("mean", "sum", "none")
        homes = ours, theirs if function.startswith("losses") else ours._metrics
        pair = [functools.partial(getattr(m, function.split(".")[1]), **options) for m in homes]
        if draw.one_of(True, False):
            pair = [getattr(m, module.split(".")[1])(**options) for m in homes]
        draw.compare(*pair, [0.7 * image + 0.3 * draw.uniform(*shape), image])


def test_ms_ssim_loss():
    for draw in Draws(40, FLOATS):
        shape = draw.size(1, 2), draw.size(1, 3), draw.size(6, 14), draw.size(6, 14)
        image, scale = draw.uniform(*shape), draw.one_of(1.0, 255.0)
        options = {
            "sigmas": draw.one_of((0.5, 1.0, 2.0), [1.0, 3.0], (1.5,)),
            "data_range": scale,
            "K": draw.one_of((0.01, 0.03), (0.02, 0.4)),
            "alpha": draw.one_of(0.025, 0.84),
            "compensation": draw.one_of(200.0, 1.0),
            "reduction": draw.one_of("mean", "sum", "none"),
        }
        mine, other, exact = (m.MS_SSIMLoss(**options) for m in (ours, theirs, theirs))
        masks = [exact._fspecial_gauss_2d(2 * exact.pad + 1, s, dtype=torch.float64) for s in options["sigmas"]]
        exact._g_masks = torch.stack(masks).unsqueeze(1)
        if draw.dtype == torch.float64:
            mine, other = mine.double(), exact
        draw.compare(mine, other, [scale * (0.7 * image + 0.3 * draw.uniform(*shape)), scale * image], exact)


def test_psnr_loss():
    for draw in Draws(120):
        shape = [draw.size(1, 12) for _ in range(draw.size(1, 4))]
        image = draw.uniform(*shape)
        max_val = draw.one_of(1.0, 255.0, 2)
        pair = [functools.partial(m.psnr_loss, max_val=max_val) for m in (ours, theirs)]
        if draw.one_of(True, False):
            pair = [m.PSNRLoss(max_val) for m in (ours, theirs)]
        elif draw.one_of(True, False):
            pair = [functools.partial(m.psnr, max_val=max_val) for m in (ours, ours._metrics)]
        draw.compare(*pair, [image, draw.uniform(*shape)])


def test_inverse_depth_smoothness_loss():
    for draw in Draws(120):
        height, width, count = draw.size(2, 20), draw.size(2, 20), draw.size(1, 3)
        tensors = [draw.normal(count, 1, height, width), draw.uniform(count, 3, height, width)]
        pair = [m.inverse_depth_smoothness_loss for m in (ours, theirs)]
        if draw.one_of(True, False):
            pair = [m.InverseDepthSmoothnessLoss() for m in (ours, theirs)]
        draw.compare(*pair, tensors, frozen=1)


def test_what_is_kornias():
    """A denominator's eps that shows, gradients to the guide, integers, and two dtypes."""
    for draw in Draws(2, FLOATS):
        images = [draw.uniform(1, 3, 12, 12), draw.uniform(1, 3, 12, 12)]
        for options in ({"max_val": 0.1}, {"eps": 1e-6}):
            pair = [functools.partial(m.ssim_loss, window_size=5, **options) for m in (ours, theirs)]
            draw.compare(*pair, images, quiet=False)
        pair = [m.inverse_depth_smoothness_loss for m in (ours, theirs)]
        draw.compare(*pair, [images[0][:, :1], images[1]], quiet=False)
    whole = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    _common._said.clear()
    with pytest.warns(UserWarning, match="floating-point tensors, got torch.uint8"):
        assert torch.equal(ours.total_variation(whole), theirs.total_variation(whole))
        assert torch.equal(ours.psnr_loss(whole, whole + 1, 255.0), theirs.psnr_loss(whole, whole + 1, 255.0))


def test_half_precision_gives_half_precision():
    image, other = torch.rand(1, 3, 12, 12).bfloat16(), torch.rand(1, 3, 12, 12).bfloat16()
    for module in (ours, theirs):
        assert module.ssim_loss(image, other, 5).dtype == torch.bfloat16


def test_attributes_and_errors():
    mine = ours.SSIMLoss(5, max_val=2.0, padding="valid")
    assert isinstance(mine, theirs.SSIMLoss) and (mine.window_size, mine.max_val, mine.padding) == (5, 2.0, "valid")
    image = torch.rand(1, 3, 8, 8)
    wrong = [
        lambda m: m.total_variation(image, "none"),
        lambda m: m.total_variation([1, 2]),
        lambda m: m.total_variation(image[0, 0, 0]),
        lambda m: m.ssim_loss(image, image, 5, reduction="median"),
        lambda m: m.ssim_loss(image, image, 5, max_val=1),
        lambda m: m.ssim_loss(image, image[:, :2], 5),
        lambda m: m.ssim_loss(image, image, 5, padding="reflect"),
        lambda m: m.ssim_loss(image[0], image[0], 5),
        lambda m: m.psnr_loss(image, image[0], 1.0),
        lambda m: m.psnr_loss(image, 1.0, 1.0),
        lambda m: m.inverse_depth_smoothness_loss(image[:, :1], image[..., :4]),
        lambda m: m.inverse_depth_smoothness_loss(image[:, :1], image.double()),
        lambda m: m.inverse_depth_smoothness_loss(image[0], image),
    ]
    check_errors(wrong, ours, theirs)
