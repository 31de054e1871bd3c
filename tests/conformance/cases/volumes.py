"""Rows of the losses of volumes, [N, C, D, H, W], with sides of 1 along each axis."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import fastloss
from tests.conformance.case import VOLUMES, Bench, Case, image_pair
from tests.conformance.cases.image import eager_ms_ssim, eager_ssim, rivals, unit_pair, weighted_ssim


def eager_volume(image_pred, p=1, order=1, reduction="mean"):
    """Total variation of [N, C, D, H, W]; an axis that has no differences adds nothing."""
    terms, padded, over = [], [], (0, 1, 2, 3, 4) if reduction == "mean" else (1, 2, 3, 4)
    for i, size in enumerate(image_pred.shape[2:]):
        d = image_pred.diff(n=order, dim=i + 2) if size > order else image_pred.narrow(i + 2, 0, 0)
        missing, lead = size - d.shape[i + 2], min(order, size) - 1
        padded.append(F.pad(d, [0, 0] * (2 - i) + [lead, missing - lead]))
        terms += [(d.abs() if p == 1 else d * d).mean(over)] if d.numel() else []
    if p == "isotropic":
        each = torch.linalg.vector_norm(torch.stack(padded), dim=0).mean(over)
    else:
        each = sum(terms, 0 * image_pred.sum(over))
    if p == "norm":
        each = torch.linalg.vector_norm(each.sqrt()[None], dim=0) if terms else each
    return each if reduction != "sum" else each.sum()


def eager_image_volume(image, image_pred, pixel, smoothness, smoothness_options=None):
    p, w = smoothness
    total = pixel[1] * (image_pred - image).abs().pow(pixel[0]).mean()
    return total + w * eager_volume(image_pred, p, **(smoothness_options or {}))


def ssim_map(image, image_pred, **options):
    """A map has no weight."""
    return fastloss.ssim_loss(image, image_pred, reduction="map", **options)


def eager_map(image, image_pred, **options):
    return eager_ssim(image, image_pred, reduction="map", **options)


def msssim_volume(image, image_pred, **_):
    from pytorch_msssim import ssim

    return 1 - ssim(image, image_pred, data_range=1.0)


VOLUME_CASES = [
    Case(
        "ssim_loss of volumes",
        fastloss.ssim_loss,
        image_pair,
        eager_ssim,
        shapes=((2, 3, 3, 4, 5), (1, 2, 13, 6, 17)),
        options=[
            {},
            {"window": (1, 3, 5), "sigma": (1.0, 0.7, 2.0), "padding": "valid"},
            {"window": (5, 3, 1), "padding": "reflect", "data_range": 2.0},
        ],
        bench=Bench(
            shapes=[(1, 1, 64, 128, 128)],
            cuda_shapes=[(1, 1, 128, 256, 256)],
            cost=lambda shape, size, mode: (
                {"forward": 2, "backward": 3, "both": 5}[mode] * size * torch.Size(shape).numel()
            ),
            options=[{"padding": "valid"}],
            make=unit_pair,
        ),
        extra={"rivals": rivals(pytorch_msssim=msssim_volume), "reach": 5},
    ),
    Case(
        "ssim_loss of volumes with weight",
        weighted_ssim,
        lambda draw, shape: (*image_pair(draw, shape), draw.uniform(shape[0], 1, *shape[2:])),
        eager_ssim,
        shapes=((2, 3, 4, 6, 5),),
        options=[{"window": (3, 5, 1)}, {"window": 3, "padding": "valid"}],
        extra={"reach": 2},
    ),
    Case(
        "ssim_loss as a map",
        ssim_map,
        image_pair,
        eager_map,
        shapes=((2, 3, 6, 5), (1, 2, 7, 13), (1, 2, 3, 5, 4)),
        options=[{}, {"window": 3, "padding": "valid"}],
        reductions=(),
        extra={"reach": 5},
    ),
    Case(
        "ssim_loss by axis",
        fastloss.ssim_loss,
        image_pair,
        eager_ssim,
        shapes=((2, 3, 6, 5), (1, 2, 7, 13)),
        options=[{"window": (3, 5), "sigma": (0.7, 2.0)}, {"window": (5, 1), "padding": "valid"}],
        extra={"reach": 2},
    ),
    Case(
        "ms_ssim_loss by axis",
        fastloss.ms_ssim_loss,
        image_pair,
        eager_ms_ssim,
        shapes=((2, 3, 9, 9),),
        options=[{"padding": "same", "level_weights": (0.2, 0.8), "window": (3, 5), "odd_sides": "repeat"}],
        extra={"reach": 3},
    ),
    Case(
        "ms_ssim_loss of volumes",
        fastloss.ms_ssim_loss,
        image_pair,
        eager_ms_ssim,
        shapes=((2, 2, 5, 6, 7),),
        options=[
            {"window": 3, "level_weights": (0.4, 0.6)},
            {"window": (1, 3, 5), "padding": "same", "level_weights": (0.4, 0.6), "odd_sides": "repeat"},
        ],
    ),
    Case(
        "smoothness_loss of volumes",
        fastloss.smoothness_loss,
        lambda draw, shape: (draw.uniform(*shape),),
        eager_volume,
        shapes=VOLUMES,
        options=[
            {},
            {"p": 2},
            {"p": "isotropic"},
            {"p": "norm"},
            {"order": 2},
            {"p": 2, "order": 2},
            {"p": "isotropic", "order": 2},
        ],
        grads=(0,),
        extra={"reach": 1},
    ),
    Case(
        "image_loss of volumes",
        fastloss.image_loss,
        image_pair,
        eager_image_volume,
        shapes=VOLUMES,
        options=[
            *(
                {"pixel": (pixel, 1.0), "smoothness": (p, 0.5)}
                for pixel, p in ((1, 1), (2, 2), (2, "norm"), (1, "isotropic"), (1.5, 1))
            ),
            *({"pixel": (1, 1.0), "smoothness": (p, 0.5), "smoothness_options": {"order": 2}} for p in (1, 2)),
        ],
        reductions=(),
    ),
]
