"""fused_ssim's function as eager torch defines it: the package is built for a GPU, and in no index."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

import fastloss
from fastloss.compat import fused_ssim as ours
from tests.compat.tools import Draws

FLOATS = (torch.float32, torch.float32, torch.float64)


def fused_ssim(img1, img2, padding="same", train=True):
    """The SSIM of the first trainer of Gaussian splatting, cut by five pixels for "valid"; the target is constant."""
    img2, channels = img2.detach(), img1.shape[1]
    taps = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = torch.outer(taps / taps.sum(), taps / taps.sum()).to(img1).expand(channels, 1, 11, 11)
    blur = functools.partial(F.conv2d, weight=window, padding=5, groups=channels)
    m1, m2 = blur(img1), blur(img2)
    v1, v2, cov = blur(img1 * img1) - m1 * m1, blur(img2 * img2) - m2 * m2, blur(img1 * img2) - m1 * m2
    ssim = (2 * m1 * m2 + 1e-4) * (2 * cov + 9e-4) / ((m1 * m1 + m2 * m2 + 1e-4) * (v1 + v2 + 9e-4))
    return (ssim if padding == "same" else ssim[:, :, 5:-5, 5:-5]).mean()


def images(draw):
    shape = draw.size(1, 2), draw.size(1, 3), draw.size(12, 24), draw.size(12, 24)
    target = draw.uniform(*shape)
    return [0.7 * target + 0.3 * draw.uniform(*shape), target]


def test_fused_ssim():
    for draw in Draws(32, FLOATS):
        draw.compare(ours.fused_ssim, fused_ssim, images(draw), padding=draw.one_of("same", "valid"))


def test_the_loss_of_gaussian_splatting_is_one_pass():
    """The reference trainer's two lines, for one image without a batch, and image_loss with the same weights."""

    def trainer(image, gt, lambda_dssim=0.2):
        ll1 = (image - gt.detach()).abs().mean()
        return (1.0 - lambda_dssim) * ll1 + lambda_dssim * (1.0 - fused_ssim(image, gt))

    def one_pass(image, gt):
        return fastloss.image_loss(gt.detach(), image, pixel=(1, 0.8), ssim=0.2)[0]

    for draw in Draws(16, FLOATS):
        draw.compare(one_pass, trainer, images(draw))


def test_without_training_there_is_no_gradient():
    image, target = torch.rand(1, 3, 16, 16, requires_grad=True), torch.rand(1, 3, 16, 16, requires_grad=True)
    assert not ours.fused_ssim(image, target, train=False).requires_grad
    ours.fused_ssim(image, target).backward()
    assert image.grad is not None and target.grad is None
    with pytest.raises(AssertionError):
        ours.fused_ssim(image, target, padding="reflect")
