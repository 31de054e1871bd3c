"""siglip_kernel's functions as its reference defines them: the package cannot be imported without a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastloss.compat import siglip_kernel as ours
from tests.compat.tools import Draws

FLOATS = (torch.float32, torch.float32, torch.float64)


def fused_siglip_loss(img_features, txt_features, log_temperature, bias, **options):
    logits = img_features @ txt_features.T * log_temperature.exp() + bias
    labels = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / len(logits)


def fused_siglip_plus_loss(img_features, txt_features, log_temperature, bias, *groups, symmetric=True, **options):
    """Cross entropy with logits of each pair, over all; labels and weights as its file says."""
    logits = img_features @ txt_features.T * log_temperature.exp() + bias
    of_images, of_texts = (torch.arange(n) if g is None else g for g, n in zip(groups, logits.shape, strict=True))
    positive = of_images[:, None] == of_texts
    in_row, in_column = (1 / positive.sum(dim, keepdim=True).clamp_min(1).to(logits.dtype) for dim in (1, 0))
    share = (in_row + in_column) / 2 if symmetric else in_row.expand_as(logits)
    if options.get("soft_label"):
        labels, weights = positive * share, torch.ones_like(share)
    else:
        labels, weights = positive.to(logits.dtype), torch.where(positive, share, 1.0)
    return F.binary_cross_entropy_with_logits(logits, labels, weights)


def numbers(draw):
    return draw.number(0.0, 1.0, 2.3), draw.number(-10.0, -1.0, 0.0)


def unit(draw, *shape):
    return F.normalize(draw.normal(*shape).float()).to(draw.dtype)


def test_fused_siglip_loss():
    for draw in Draws(32):
        shape = draw.size(2, 32), draw.size(8, 40)
        options = {"use_fp8": draw.one_of(True, False), "backend": draw.one_of("auto", "chunked", "reference")}
        tensors = [unit(draw, *shape), unit(draw, *shape), *numbers(draw)]
        draw.compare(ours.fused_siglip_loss, fused_siglip_loss, tensors, **options)


def test_fused_siglip_plus_loss():
    for draw in Draws(64, FLOATS):
        rows, texts, dim = draw.size(2, 32), draw.size(2, 48), draw.size(8, 40)
        groups = [draw.integers(draw.size(1, 12), n) if draw.one_of(True, True, False) else None for n in (rows, texts)]
        options = {"symmetric": draw.one_of(True, False), "soft_label": draw.one_of(True, False)}
        pair = [
            lambda i, t, s, b, f=f, groups=groups, options=options: f(i, t, s, b, *groups, **options)
            for f in (ours.fused_siglip_plus_loss, fused_siglip_plus_loss)
        ]
        draw.compare(*pair, [unit(draw, rows, dim), unit(draw, texts, dim), *numbers(draw)])


def test_its_module():
    """Factor and bias of its own, dict output, and unit embeddings made there."""
    torch.manual_seed(0)
    loss = ours.SigLIPPlusLoss(temperature=0.1, bias_init=-2.0, soft_label=True)
    assert list(loss.state_dict()) == ["logit_scale", "logit_bias"]
    images, texts = torch.randn(6, 8), torch.randn(9, 8)
    groups = torch.tensor([0, 0, 1, 2, 3, 4]), torch.tensor([0, 1, 1, 2, 2, 2, 5, 0, 3])
    found = loss((images, texts), *groups)
    wanted = fused_siglip_plus_loss(
        F.normalize(images), F.normalize(texts), loss.logit_scale, loss.logit_bias, *groups, soft_label=True
    )
    torch.testing.assert_close(found["total_loss"], wanted)
    assert found["n_positives"] == 2 * 2 + 2 + 3 + 1 and found["logit_scale"].item() == pytest.approx(10.0)
    found["total_loss"].backward()
    assert all(p.grad is not None for p in loss.parameters())
    assert loss((images, images))["n_positives"] == 6
    assert not list(ours.SigLIPPlusLoss(use_bias=False).logit_bias.shape)
    with pytest.raises(NotImplementedError):
        ours.SigLIPPlusLoss(soft_weighting=False)
    with pytest.raises(AssertionError, match="img_gid must be"):
        ours.fused_siglip_plus_loss(images, texts, torch.tensor(1.0), torch.tensor(0.0), groups[1])
