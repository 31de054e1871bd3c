"""Rows of image_loss: several distances of two images in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import fastloss
from tests.conformance.case import NARROW, Bench, Case, image_pair, with_argument, with_options
from tests.conformance.cases.image import eager_smoothness, eager_ssim


def eager_image(image, image_pred, pixel=(2, 1.0), smoothness=None, ssim=None, ssim_options=None, **_):
    distance = {1: F.l1_loss, 2: F.mse_loss, "huber": F.huber_loss}
    total = 0.0 if pixel is None else pixel[1] * distance[pixel[0]](image_pred, image)
    if smoothness is not None:
        total = total + smoothness[1] * eager_smoothness(image_pred, p=smoothness[0])
    return total if ssim is None else total + ssim * eager_ssim(image, image_pred, **(ssim_options or {}))


def weighted_image(image, image_pred, weight, pixel=None, smoothness=None, ssim=None):
    """One map of weights for every part."""
    parts = (("pixel", pixel), ("smoothness", smoothness))
    more = {name: {"weight": weight} for name, part in parts if part is not None}
    if ssim is not None:
        more["ssim"] = {"weight": weight, "window": 3}
    options = {f"{name}_options": own for name, own in more.items()}
    return fastloss.image_loss(image, image_pred, pixel=pixel, smoothness=smoothness, ssim=ssim, **options)


def eager_weighted_image(image, image_pred, weight, pixel=None, smoothness=None, ssim=None):
    distance = {1: F.l1_loss, 2: F.mse_loss, "huber": F.huber_loss}[pixel[0]]
    w = weight.expand_as(image)
    total = pixel[1] * (distance(image_pred, image, reduction="none") * w).sum() / w.sum()
    if smoothness is not None:
        total = total + smoothness[1] * eager_smoothness(image_pred, weight=weight, p=smoothness[0])
    return total if ssim is None else total + ssim * eager_ssim(image, image_pred, weight=weight, window=3)


def image_cost(shape, size, mode, options):
    """All the parts in one pass: forward reads both images; backward reads both and writes one gradient. Where every
    gradient is a sign, those of d, d_y and d_x (two bits each) are written and read in place of the images."""
    forward, backward = 2 * size, 3 * size
    if options.get("ssim") is None and options["pixel"][0] == options["smoothness"][0] == 1:
        forward, backward = 2 * size + 0.75, 0.75 + size
    return int({"forward": forward, "backward": backward, "both": forward + backward}[mode] * torch.Size(shape).numel())


IMAGE_LOSS_CASES = [
    Case(
        "image_loss",
        fastloss.image_loss,
        image_pair,
        eager_image,
        shapes=((2, 3, 8, 8), (1, 1, 1, 1), (3, 2, 7, 13), *NARROW),
        options=[
            {},
            {"pixel": (1, 0.8), "ssim": 0.2},
            {"smoothness": (2, 0.5)},
            {"pixel": (1, 1.0), "smoothness": (1, 0.1)},
            {"pixel": None, "smoothness": (1, 0.3), "ssim": 0.2},
            {"pixel": ("huber", 2.0), "smoothness": ("isotropic", 0.1), "ssim": 0.3, "ssim_options": {"window": 5}},
            {"pixel": (1, 0.8), "ssim": 0.2, "ssim_options": {"window": 5, "data_range": (-1.0, 1.5)}},
        ],
        reductions=(),
        bad=[
            ("shape", with_argument(1, lambda t: t[..., :-1]), ValueError, "image_pred: expected the shape of image"),
            ("channels", with_argument(1, lambda t: t[:, :1]), ValueError, "image_pred: expected the shape of image"),
            (
                "rank",
                lambda args, options: ([t[0] for t in args], {"smoothness": (1, 1.0)}),
                ValueError,
                "image_pred: expected a 4-D or 5-D tensor",
            ),
            ("even", with_options(ssim=1.0, ssim_options={"window": 4}), ValueError, "window: expected an odd integer"),
            ("too large", with_options(ssim=1.0, ssim_options={"padding": "valid"}), ValueError, "got 11 for images"),
            ("integer", with_argument(0, lambda t: t.to(torch.uint8)), TypeError, "image: expected a float16"),
            ("all off", with_options(pixel=None), ValueError, "expected at least one part that is not None"),
            ("pair", with_options(pixel=1.0), TypeError, "pixel: expected (p, w)"),
            ("w", with_options(smoothness=(1, -1.0)), ValueError, "smoothness: w: expected a finite number >= 0"),
            ("ssim", with_options(ssim=float("nan")), ValueError, "ssim: expected a finite number"),
            ("option", with_options(pixel_options={"reduction": "sum"}), TypeError, "pixel_options: unknown option"),
            ("off", with_options(ssim_options={"window": 3}), ValueError, "ssim_options: the part it is for is off"),
        ],
        bench=Bench(
            shapes=[(4, 3, 512, 512)],
            cuda_shapes=[(8, 3, 512, 512)],
            cost=image_cost,
            headline=2,
            options=[
                {"pixel": (1, 1.0), "smoothness": (1, 0.1)},
                {"pixel": (1, 0.8), "smoothness": (1, 0.1), "ssim": 0.2},
            ],
        ),
        module=fastloss.ImageLoss,
    ),
    Case(
        "image_loss with weights",
        weighted_image,
        lambda draw, shape: (*image_pair(draw, shape), draw.uniform(shape[0], 1, *shape[2:])),
        eager_weighted_image,
        shapes=((2, 3, 8, 8), (3, 2, 7, 13), *NARROW),
        options=[
            {"pixel": (1, 1.0), "smoothness": (1, 0.1)},
            {"pixel": (2, 1.0), "ssim": 0.2},
            {"pixel": ("huber", 2.0), "smoothness": ("isotropic", 0.1), "ssim": 0.3},
        ],
        reductions=(),
        extra={"reach": 1},
    ),
]
