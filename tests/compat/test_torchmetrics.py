"""torchmetrics' functional SSIM and total variation and their drop-ins."""

from __future__ import annotations

import pytest
import torch

from fastloss.compat import _common
from tests.compat.tools import Draws

theirs = pytest.importorskip("torchmetrics.functional.image")
from fastloss.compat import torchmetrics as ours  # noqa: E402

FLOATS = (torch.float32, torch.float32, torch.float64)


def test_total_variation():
    for draw in Draws(32):
        images = draw.normal(*(draw.size(1, n) for n in (3, 3, 20, 20)))
        options = {"reduction": draw.one_of("sum", "mean", "none", None)}
        draw.compare(ours.total_variation, theirs.total_variation, [images], **options)


def test_ssim():
    pair = [module.structural_similarity_index_measure for module in (ours, theirs)]
    for draw in Draws(48, FLOATS):
        shape = draw.size(1, 2), draw.size(1, 3), draw.size(12, 24), draw.size(12, 24)
        target, scale = draw.uniform(*shape), draw.one_of(1.0, 255.0)
        preds = 0.7 * target + 0.3 * draw.uniform(*shape)
        options = {
            "sigma": draw.one_of(0.8, 1.5, (1.5, 1.5), [2.0, 2.0]),
            "kernel_size": draw.one_of(11, 3, (5, 7)),
            "reduction": draw.one_of("elementwise_mean", "sum", "none", None),
            "data_range": draw.one_of(scale, (0.0, scale), (0.1 * scale, 0.9 * scale)),
            "k1": draw.one_of(0.01, 0.02),
            "k2": draw.one_of(0.03, 0.4),
        }
        draw.compare(*pair, [scale * preds, scale * target], **options)


def test_the_images_own_range():
    pair = [module.structural_similarity_index_measure for module in (ours, theirs)]
    for draw in Draws(6, FLOATS):
        draw.compare(*pair, [draw.uniform(2, 3, 16, 16), draw.uniform(2, 3, 16, 16)], frozen=2)
        draw.compare(*pair, [draw.uniform(2, 3, 16, 16), draw.uniform(2, 3, 16, 16)], quiet=False)


def test_what_is_torchmetrics():
    pair = [module.structural_similarity_index_measure for module in (ours, theirs)]
    cases = [
        ((1, 1, 9, 9, 9), {"data_range": 1.0, "sigma": 0.5}),
        ((1, 2, 16, 16), {"data_range": 1.0, "gaussian_kernel": False}),
        ((1, 2, 16, 16), {"data_range": 1.0, "return_full_image": True}),
        ((1, 2, 16, 16), {"data_range": 1.0, "return_contrast_sensitivity": True}),
        ((1, 2, 16, 16), {"data_range": 1.0, "sigma": (1.0, 1.5)}),
    ]
    for draw in Draws(len(cases), FLOATS):
        shape, options = cases.pop()
        draw.compare(*pair, [draw.uniform(*shape), draw.uniform(*shape)], quiet=False, **options)


def test_errors():
    image = torch.rand(1, 3, 16, 16)
    wrong = [
        (ValueError, lambda m: m.structural_similarity_index_measure(image, image, kernel_size=4)),
        (ValueError, lambda m: m.structural_similarity_index_measure(image, image, sigma=(1.0, 1.0, 1.0))),
        (ValueError, lambda m: m.structural_similarity_index_measure(image, image, sigma=-1.0, data_range=1.0)),
        (ValueError, lambda m: m.structural_similarity_index_measure(image[0], image[0])),
        (ValueError, lambda m: m.structural_similarity_index_measure(image, image, reduction="median")),
        (RuntimeError, lambda m: m.structural_similarity_index_measure(image, image[:, :2])),
        (RuntimeError, lambda m: m.total_variation(image[0])),
        (ValueError, lambda m: m.total_variation(image, "median")),
    ]
    _common._said.clear()
    for error, call in wrong:
        for module in (ours, theirs):
            with pytest.raises(error):
                call(module)
