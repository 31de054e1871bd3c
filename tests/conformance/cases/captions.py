"""Rows of the losses whose images have several captions: SigLIP and CLIP with groups of images and texts."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import fastloss
from tests.conformance.case import Bench, Case
from tests.conformance.eager_contrastive import eager_grouped_clip, eager_siglip


def grouped_siglip(image, text, image_groups, text_groups, **options):
    return fastloss.siglip_loss(image, text, image_groups=image_groups, text_groups=text_groups, **options)


def eager_grouped_siglip(image, text, image_groups, text_groups, **options):
    return eager_siglip(image, text, image_groups=image_groups, text_groups=text_groups, **options)


def grouped_clip(image, text, image_groups, text_groups, **options):
    return fastloss.clip_loss(image, text, image_groups=image_groups, text_groups=text_groups, **options)


def groups_of(draw, shape):
    """(images, texts, width): two images a group, of which one has no text; some texts of a group without an image."""
    images, texts, width = shape
    of_images, of_texts = torch.arange(images) // 2, 1 + torch.arange(texts) % (images // 2 + 1)
    return draw.normal(images, width), draw.normal(texts, width), of_images.to(draw.device), of_texts.to(draw.device)


def captioned(draw, shape):
    """Images each of which has as many captions near it."""
    images, texts, width = shape
    of_images, of_texts = torch.arange(images), torch.arange(texts) % images
    image = draw.normal(images, width)
    text = image[of_texts.to(draw.device)] + draw.normal(texts, width)
    unit = (F.normalize(t, dim=1) for t in (image, text))
    return *unit, of_images.to(draw.device), of_texts.to(draw.device)


def flops(times):
    """`times` 2 M N D."""
    return lambda shape, size, mode: times(shape, mode) * 2 * shape[0] * shape[1] * shape[2]


def of_siglip(shape, mode):
    """The forward makes all: the similarities and two products for the gradients."""
    return 0 if mode == "backward" else 3


def of_clip(shape, mode):
    """One for both directions; two for the gradients, one more where more than 256 MiB of logits are made again."""
    again = 4 * shape[0] * shape[1] > 2**28
    return {"forward": 1, "backward": 2 + again, "both": 3 + again}[mode]


SHAPES, CUDA_SHAPES = [(2048, 8192, 512)], [(8192, 8192, 768), (8192, 32768, 768), (65536, 262144, 768)]
CAPTIONS = [
    Case(
        "siglip_loss with groups",
        grouped_siglip,
        groups_of,
        eager_grouped_siglip,
        shapes=((6, 12, 7), (7, 5, 3)),
        options=[
            {"logit_scale": 1.0, "logit_bias": 0.5},
            {"logit_scale": 2.0, "logit_bias": -1.0, "symmetric": False, "soft_labels": True},
        ],
        bench=Bench(
            shapes=SHAPES,
            unit="flops",
            all_grads=True,
            cost=flops(of_siglip),
            options=[{"logit_scale": 10.0, "logit_bias": -10.0}],
            cuda_shapes=CUDA_SHAPES,
            make=captioned,
        ),
    ),
    Case(
        "clip_loss with groups",
        grouped_clip,
        groups_of,
        eager_grouped_clip,
        shapes=((6, 12, 7), (7, 5, 3)),
        reductions=("mean", "sum"),
        options=[{"logit_scale": 2.0, "normalize": True, "label_smoothing": 0.1}],
        bench=Bench(
            shapes=SHAPES,
            unit="flops",
            all_grads=True,
            cost=flops(of_clip),
            options=[{"logit_scale": 14.3}],
            cuda_shapes=CUDA_SHAPES,
            make=captioned,
        ),
    ),
]
