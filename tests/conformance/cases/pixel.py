"""The row of the pixel loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import fastloss
from tests.conformance.case import IMAGES, Bench, Case, image_pair, with_argument, with_options


def eager_pixel(image, image_pred, p=2, weight=None, eps=1e-6, delta=1.0, reduction="mean"):
    if weight is None and p in (1, 2):
        return (F.l1_loss if p == 1 else F.mse_loss)(image_pred, image, reduction=reduction)
    d = image_pred - image
    if p == "charbonnier":
        loss = (d * d + eps**2).sqrt()
    elif p == "huber":
        loss = F.huber_loss(image_pred, image, delta=delta, reduction="none")
    else:
        loss = d.abs() if p == 1 else d**2 if p == 2 else d.abs() ** p
    if weight is None:
        return loss if reduction == "none" else getattr(loss, reduction)()
    weighted = loss * weight
    total = weight.expand_as(loss).sum()
    return {"none": weighted, "sum": weighted.sum(), "mean": weighted.sum() / total}[reduction]


PIXEL_CASES = [
    Case(
        "pixel_loss",
        fastloss.pixel_loss,
        image_pair,
        eager_pixel,
        shapes=(*IMAGES, (5,), (2, 2, 1, 4, 5)),
        options=[
            {"p": 1},
            {"p": 2},
            {"p": 1.5},
            {"p": 3},
            {"p": "charbonnier"},
            {"p": "charbonnier", "eps": 0.1},
            {"p": "huber"},
            {"p": "huber", "delta": 0.1},
        ],
        bad=[
            ("shape", with_argument(1, lambda t: t[..., :-1]), ValueError, "image_pred: expected the shape of image"),
            ("integer", with_argument(0, lambda t: t.to(torch.uint8)), TypeError, "image: expected a float16"),
            ("list", with_argument(0, lambda t: [1.0]), TypeError, "image: expected a tensor, got list"),
            ("p", with_options(p=0.5), ValueError, "p: expected a finite number >= 1, got 0.5"),
            ("p name", with_options(p="l3"), ValueError, "p: expected a number >= 1, 'l1', 'mae', 'l2', 'mse', 'charb"),
            ("eps", with_options(p="charbonnier", eps=0.0), ValueError, "eps: expected a finite number > 0"),
            ("reduction", with_options(reduction="avg"), ValueError, "reduction: expected one of"),
        ],
        bench=Bench(
            shapes=[(8, 3, 512, 512)],
            # forward reads both images; backward reads both (sign and value are recomputed) and writes one gradient
            cost=lambda shape, size, mode: (
                {"forward": 2, "backward": 3, "both": 5}[mode] * size * torch.Size(shape).numel()
            ),
            options=[{"p": 1}, {"p": 2}, {"p": "charbonnier"}],
            headline=3,  # the second, which eager has in one call, shows what is left to win there
        ),
        module=fastloss.PixelLoss,
    ),
]
