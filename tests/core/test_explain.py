"""explain(): which backend computes a call, and why."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastloss
from fastloss import core, explain
from fastloss.core import explanation

IMAGES = (torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16))
OWN = "triton" if core.is_interpreting() else "cpp"
needs_kernels = pytest.mark.skipif(core.backend_report()[OWN] != "available", reason=f"no {OWN} kernels here")


def only(explanation):
    assert len(explanation) == 1, str(explanation)
    return explanation[0]


@needs_kernels
def test_kernels():
    found = only(explain(fastloss.pixel_loss, *IMAGES))
    assert (found.op, found.backend) == ("pixel", OWN)
    assert str(found) == f"pixel: {OWN} (the fastest there is for cpu tensors)"
    assert [c.backend for c in explain(fastloss.clip_loss, torch.eye(4), torch.eye(4), logit_scale=2)] == [OWN]
    assert only(explain(fastloss.PixelLoss(), *IMAGES)).backend == OWN


@pytest.mark.parametrize(
    ("fn", "args", "options", "why"),
    [
        (fastloss.pixel_loss, [x.double() for x in IMAGES], {}, "float64 is computed by PyTorch operators"),
        (fastloss.ssim_loss, IMAGES, {"window": 13}, "the kernels take windows of up to 11 pixels, not 13"),
        (fastloss.ssim_loss, (IMAGES[0], IMAGES[1].half()), {}, "the kernels take images of one dtype, not"),
        (fastloss.dists_distance, [[IMAGES[0]], [IMAGES[1].half()]], {}, "the kernels take features of one dtype"),
        (fastloss.feature_distance, [[IMAGES[0]], [IMAGES[1]]], {"criterion": "charbonnier", "eps": 1e-30},
         "the square of 1e-30, eps or beta, is no normal float32 number"),
        (fastloss.lpips_distance, [[IMAGES[0]], [IMAGES[1]], [torch.ones(3, requires_grad=True)]], {},
         "lin_weights require gradients, which the kernels do not make"),
        (fastloss.lpips_distance, [[IMAGES[0]], [IMAGES[1]], None], {"eps": 1e30}, "the kernels divide eps by norms"),
    ],
)  # fmt: skip
def test_why_not(fn, args, options, why):
    with core.use_backend(None):
        found = explain(fn, *args, **options)[0]
    assert found.backend == "reference"
    assert found.why.startswith(why), found.why


@needs_kernels
def test_a_forced_backend_that_declines_a_call_says_why():
    wide = (fastloss.ssim_loss, IMAGES, {"window": 13})
    with fastloss.use_backend(OWN), pytest.raises(RuntimeError, match="cannot serve ssim: the kernels take windows of"):
        wide[0](*wide[1], **wide[2])
    with fastloss.use_backend("reference"):
        wide[0](*wide[1], **wide[2])
    with fastloss.use_backend(OWN):  # float64 has no kernels anywhere
        wide[0](*(x.double() for x in wide[1]), **wide[2])


def test_forced_and_missing():
    with fastloss.use_backend("reference"):
        assert only(explain(fastloss.pixel_loss, *IMAGES)).why == "forced by use_backend or FASTLOSS_BACKEND"
    other = "cpp" if OWN == "triton" else "triton"
    with fastloss.use_backend(other), pytest.raises(RuntimeError, match=f"backend '{other}' is forced"):
        explain(fastloss.pixel_loss, *IMAGES)


def test_transforms_and_losses_without_ops():
    def gradient(pred):
        return torch.func.grad(lambda p: fastloss.pixel_loss(IMAGES[0], p))(pred)

    assert only(explain(gradient, IMAGES[1])).why.startswith("torch.func transforms")
    empty = explain(fastloss.diversity_loss, *IMAGES, mode="mean", metric="l2")
    assert empty == () and str(empty) == "no op of fastloss: PyTorch operators alone"


def test_nothing_is_collected_outside():
    with pytest.raises(ValueError, match="image_pred"):
        explain(fastloss.pixel_loss, IMAGES[0], torch.ones(2))
    fastloss.pixel_loss(*IMAGES)
    outer = explain(lambda: (explain(fastloss.pixel_loss, *IMAGES), fastloss.smoothness_loss(IMAGES[0])))
    assert [choice.op for choice in outer] == ["smoothness"]


def test_threads_explain_at_once():
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: explain(fastloss.pixel_loss, *IMAGES), range(40)))
    assert all(len(one) == 1 for one in found)
    assert explanation.depth == 0
