"""siglip_kernel's function as its reference defines it: the package cannot be imported without a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastloss.compat import siglip_kernel as ours
from tests.compat.tools import Draws


def fused_siglip_loss(img_features, txt_features, log_temperature, bias, **options):
    logits = img_features @ txt_features.T * log_temperature.exp() + bias
    labels = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / len(logits)


def test_fused_siglip_loss():
    for draw in Draws(32):
        shape = draw.size(2, 32), draw.size(8, 40)
        embeddings = [F.normalize(draw.normal(*shape).float()).to(draw.dtype) for _ in range(2)]
        numbers = [draw.number(0.0, 1.0, 2.3), draw.number(-10.0, -1.0, 0.0)]
        options = {"use_fp8": draw.one_of(True, False), "backend": draw.one_of("auto", "chunked", "reference")}
        draw.compare(ours.fused_siglip_loss, fused_siglip_loss, [*embeddings, *numbers], **options)
