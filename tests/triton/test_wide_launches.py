"""Launches for images and batches past 2**31 elements, which no test machine holds: what the kernels are told.

The launchers run on tensors of the meta device, with the kernels replaced by what writes their arguments down.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SMALL, IMAGE, BATCH, LAST = (2, 3, 8, 8), (1, 1, 65536, 32768), (65536, 1, 16, 32768), (4, 3, 16384, 16384)
SIDE_8K = (11, 3, 8192, 8192)


class Recorded:
    """In a kernel's place: keeps (grid, arguments by name) of every launch."""

    def __init__(self, kernel, calls):
        self.names, self.calls = kernel.arg_names, calls

    def __getitem__(self, grid):
        def launch(*args, **options):
            assert len(args) == len(self.names)
            self.calls.append((grid, dict(zip(self.names, args, strict=True))))

        return launch


def launches(monkeypatch, stem, run, shape):
    module, calls = importlib.import_module(f"fastloss.image.kernels.{stem}"), []
    target = SimpleNamespace(backend="cuda", warp_size=32)  # in place of a device's
    active = SimpleNamespace(get_current_target=lambda: target)
    monkeypatch.setattr("fastloss.core.kernels.launch.driver", SimpleNamespace(active=active))
    march = [importlib.import_module("fastloss.image.kernels.smoothness_march")] if stem == "smoothness" else []
    for launcher in (module, *march):
        for name in [n for n in vars(launcher) if n.endswith("_kernel")]:
            monkeypatch.setattr(launcher, name, Recorded(getattr(launcher, name), calls))
    image = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    run(module, image.contiguous(memory_format=torch.channels_last) if shape == LAST else image)
    return calls


def pixel(module, image):
    x = module.Inputs(image, image, image[:, :1].expand_as(image), "l1", 1.0, True)
    module.pixel_fwd(x)
    grad = image.new_empty((), dtype=torch.float32)
    module.pixel_bwd(grad, x._replace(weight=None), module.Needs(True, True))


def smoothness(module, image):
    grad = image.new_empty((*image.shape[:2], 2), dtype=torch.float32)
    module.smoothness_fwd(module.Inputs(image, None, image[:, :1].expand_as(image), "l1", 1))
    module.smoothness_bwd(grad, module.Inputs(image, image, None, "l2", 2))


def ssim(module, image):
    x = module.Inputs(image, image, None, 11, 1.5, True, 1e-4, 9e-4, 0.0, False, 3)
    grad = image.new_empty(image.shape[:2], dtype=torch.float32)
    _, saved = module.ssim_fwd(x)
    module.ssim_bwd(grad, saved, x, module.Needs(True, True))


def image_without_ssim(module, image):
    grad = image.new_empty(4, dtype=torch.float32)
    for kind, keep in (("l1", 4), ("l2", 0)):
        x = module.Inputs(image, image, pixel_kind=kind, smoothness_kind="l1", keep=keep)
        _, saved = module.image_loss_fwd(x)
        assert not keep or (saved.kept.dtype, saved.kept.numel()) == (torch.uint8, image.numel())
        module.image_loss_bwd(grad, saved, x, module.Needs(True, True))


def image_with_ssim(module, image):
    ssim = {"window": 11, "sigma": 1.5, "same": True, "c1": 1e-4, "c2": 9e-4}
    x = module.Inputs(image, image, guide=image, pixel_kind="l1", smoothness_kind="l1", keep=2, **ssim)
    _, saved = module.image_loss_fwd(x)
    module.image_loss_bwd(image.new_empty(4, dtype=torch.float32), saved, x, module.Needs(False, True))


LAUNCHERS = {"pixel": pixel, "smoothness": smoothness, "image_loss": image_without_ssim,
             "image_loss, ssim": image_with_ssim}  # fmt: skip


@pytest.mark.parametrize("shape", [SMALL, IMAGE, BATCH, LAST, SIDE_8K], ids=str)
@pytest.mark.parametrize("name", LAUNCHERS)
def test_offsets_are_64_bit_where_they_must_be(monkeypatch, name, shape):
    calls = launches(monkeypatch, name.split(",")[0], LAUNCHERS[name], shape)
    assert len(calls) >= 2
    for grid, told in calls:
        assert told["WIDE"] == (shape != SMALL)
        assert all(0 < n < limit for n, limit in zip(grid, (2**31, 65536), strict=False))


def guided(module, image):
    guide = image.new_empty(1, 3, *image.shape[2:]).expand(image.shape[0], -1, -1, -1)
    module.smoothness_fwd(module.Inputs(image, guide, None, "l1", 1))
    grad = image.new_empty((*image.shape[:2], 2), dtype=torch.float32)
    module.smoothness_bwd(grad, module.Inputs(image, guide, None, "l1", 2))  # the kernels in tiles


def guided_image(module, image):
    guide = image.new_empty(1, 3, *image.shape[2:]).expand(image.shape[0], -1, -1, -1)
    module.image_loss_fwd(module.Inputs(image, image, guide=guide, pixel_kind="l1", smoothness_kind="l1"))


@pytest.mark.parametrize("stem", ["smoothness", "image_loss"])
def test_a_guide_of_one_image_is_copied_for_all(monkeypatch, stem):
    """The copy may pass 2**31 elements where neither the image nor what was given does."""
    calls = launches(monkeypatch, stem, guided if stem == "smoothness" else guided_image, (48, 1, 4096, 4096))
    assert calls and all(told["WIDE"] for _, told in calls)


@pytest.mark.parametrize("shape", [SMALL, IMAGE, (65536, 1, 1, 32768)], ids=str)
def test_lanes_of_ssim_are_64_bit_where_they_must_be(monkeypatch, shape):
    """Its rows always are; the lanes, a column of each plane, seldom need to be."""
    calls = launches(monkeypatch, "ssim", ssim, shape)
    assert [told["WIDE"] for _, told in calls] == [shape[2] == 1] * 2
    assert all(0 < n < limit for grid, _ in calls for n, limit in zip(grid, (2**31, 65536), strict=True))
