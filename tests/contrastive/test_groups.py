"""Several positives a row and a column: siglip_loss (SigLIP+) and clip_loss (UniCL) with groups of images and texts."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss import clip_loss, core, siglip_loss
from tests.conformance.cases import CASES
from tests.conformance.tools import Errors, places

IMAGES, TEXTS, WIDTH = 37, 71, 13
PLACES = places(next(case for case in CASES if case.name == "siglip_loss"))
each_place = pytest.mark.parametrize("place", PLACES)


def inputs(dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, ...]:
    """Groups of none to several images and texts, some of one side alone."""
    g = torch.Generator().manual_seed(0)
    image, text = (torch.randn(n, WIDTH, generator=g, dtype=torch.float64) for n in (IMAGES, TEXTS))
    groups = (torch.randint(low, 20 + low, (n,), generator=g) for low, n in ((-3, IMAGES), (0, TEXTS)))
    return image.to(device, dtype), text.to(device, dtype), *(t.to(device) for t in groups)


def written_siglip(image, text, of_images, of_texts, scale, bias, symmetric=True, soft_labels=False, weights=None):
    """The definition, pair by pair, with binary cross entropies of weights and labels."""
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T + bias
    positive = of_images[:, None] == of_texts
    there = positive if weights is None else positive & (weights[:, None] != 0)
    share = 1 / positive.sum(1, keepdim=True).clamp_min(1).expand_as(logits)
    if symmetric:
        share = share / 2 + 1 / there.sum(0).clamp_min(1) / 2
    share = share.to(logits.dtype)
    weight = torch.where(positive & (not soft_labels), share, torch.ones_like(share))
    label = torch.where(positive, share if soft_labels else torch.ones_like(share), torch.zeros_like(share))
    rows = F.binary_cross_entropy_with_logits(logits, label, weight, reduction="none").sum(1)
    return rows.mean() if weights is None else (rows * weights).sum() / weights.sum()


def written_clip(image, text, of_images, of_texts, scale, smoothing=0.0):
    """Soft cross entropies with uniform labels over the positives; 0 without any."""
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    positive = of_images[:, None] == of_texts

    def direction(logits: Tensor, positive: Tensor) -> Tensor:
        share = positive / positive.sum(1, keepdim=True).clamp_min(1)
        labels = (1 - smoothing) * share + smoothing / logits.shape[1]
        return torch.where(positive.any(1), -(labels * F.log_softmax(logits, 1)).sum(1), 0.0).mean()

    return (direction(logits, positive) + direction(logits.T, positive.T)) / 2


def with_grads(loss, backend: str, *tensors: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    with core.use_backend(backend):
        value = loss(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]


def numbers(like: Tensor, *values: float) -> list[Tensor]:
    dtype = torch.promote_types(like.dtype, torch.float32)
    return [torch.tensor(v, dtype=dtype, device=like.device) for v in values]


@each_place
@pytest.mark.parametrize(("symmetric", "soft_labels"), itertools.product((True, False), repeat=2))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_siglip_is_its_definition(place, dtype, symmetric, soft_labels):
    device, backend = place
    weights = (torch.arange(IMAGES, device=device) % 5).float()
    options = {"symmetric": symmetric, "soft_labels": soft_labels}
    errors = Errors(dtype)
    for factor in (1.0, 0.9):
        image, text, *groups = inputs(dtype, device)
        given = image, factor * text, *numbers(image, 6.0, -2.0)

        def ours(image, text, scale, bias, groups=groups):
            return siglip_loss(
                image, text, logit_scale=scale, logit_bias=bias, normalize=True, image_groups=groups[0],
                text_groups=groups[1], weights=weights, workspace_mib=0.01, **options,
            )  # fmt: skip

        def theirs(image, text, scale, bias, groups=groups):
            image, text = (x if x.dtype == torch.float64 else x.float() for x in (image, text))
            return written_siglip(image, text, *groups, scale, bias, **options, weights=weights)

        exact = with_grads(theirs, "reference", *(x.double() for x in given))
        one, two = with_grads(ours, backend, *given), with_grads(theirs, "reference", *given)
        for name, *each in zip(("value", "image", "text", "scale", "bias"), one, two, exact, strict=True):
            errors.add(name, *each, f"{factor}")
    errors.check()


@each_place
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clip_is_its_definition(place, dtype):
    """Of 37 by 71: squares of 37 and 34, and a strip of 3, whose directions are made by themselves."""
    device, backend = place
    errors = Errors(dtype)
    for factor in (1.0, 0.9):
        image, text, *groups = inputs(dtype, device)
        given = image, factor * text, *numbers(image, 6.0)

        def ours(image, text, scale, groups=groups):
            return clip_loss(
                image, text, logit_scale=scale, normalize=True, image_groups=groups[0], text_groups=groups[1],
                label_smoothing=0.1,
            )  # fmt: skip

        def theirs(image, text, scale, groups=groups):
            image, text = (x if x.dtype == torch.float64 else x.float() for x in (image, text))
            return written_clip(image, text, *groups, scale, 0.1)

        exact = with_grads(theirs, "reference", *(x.double() for x in given))
        one, two = with_grads(ours, backend, *given), with_grads(theirs, "reference", *given)
        for name, *each in zip(("value", "image", "text", "scale"), one, two, exact, strict=True):
            errors.add(name, *each, f"{factor}")
    errors.check()


@pytest.mark.parametrize("soft_labels", [False, True])
def test_gradients_in_float64(soft_labels):
    image, text, *groups = (t[:5] for t in inputs())
    image, text = image[:, :3], text[:, :3]
    given = [t.requires_grad_() for t in (image, text, *numbers(image, 2.0, -1.0))]
    of = {"image_groups": groups[0] % 3, "text_groups": groups[1] % 3}

    def siglip(image, text, scale, bias):
        return siglip_loss(image, text, logit_scale=scale, logit_bias=bias, soft_labels=soft_labels, **of)

    def clip(image, text, scale, bias):
        return clip_loss(image, text, logit_scale=scale, logit_bias=bias, **of)

    assert all(torch.autograd.gradcheck(loss, given, fast_mode=True) for loss in (siglip, clip))


@each_place
def test_groups_of_one_pair_each_are_the_plain_losses(place):
    """In any order of the texts."""
    device, backend = place
    image, text, *_ = inputs(torch.float32, device)
    text = text[:IMAGES]
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(1)).to(device)
    groups = {"image_groups": 1000 - torch.arange(IMAGES, device=device), "text_groups": 1000 - order}
    numbers = {"logit_scale": 5.0, "logit_bias": -3.0}
    with core.use_backend(backend):
        for options in ({}, {"symmetric": False}, {"soft_labels": True}):
            ours = siglip_loss(image, text[order], **numbers, **groups, **options)
            torch.testing.assert_close(ours, siglip_loss(image, text, **numbers), rtol=2e-6, atol=0)
        ours = clip_loss(image, text[order], **numbers, **groups)
        torch.testing.assert_close(ours, clip_loss(image, text, **numbers), rtol=2e-6, atol=0)


def test_an_image_of_weight_0_is_as_one_that_is_not_there():
    image, text, of_images, of_texts = inputs()
    mask = torch.arange(IMAGES) % 3 > 0
    image = image.masked_fill(~mask[:, None], torch.nan)
    options = {"logit_scale": 5.0, "logit_bias": -3.0, "text_groups": of_texts}
    ours = siglip_loss(image, text, image_groups=of_images, weights=mask, **options)
    torch.testing.assert_close(ours, siglip_loss(image[mask], text, image_groups=of_images[mask], **options))


def test_no_positives():
    image, text, of_images, of_texts = inputs()
    options = {"logit_scale": 2.0, "image_groups": of_images, "text_groups": of_texts + 1000}
    ours = siglip_loss(image, text, logit_bias=-1.0, reduction="sum", **options)
    torch.testing.assert_close(
        ours, siglip_loss(image, text, logit_scale=2.0, logit_bias=-1.0, reduction="sum", negative_only=True)
    )
    image.requires_grad_()
    loss = clip_loss(image, text, **options)
    assert loss == 0 and not torch.autograd.grad(loss, image)[0].any()
    for a, b in ((image[:0], text), (image, text[:0])):
        of = {"image_groups": of_images[: len(a)], "text_groups": of_texts[: len(b)]}
        assert siglip_loss(a, b, logit_scale=2.0, logit_bias=-1.0, reduction="sum", **of) == 0
        assert clip_loss(a, b, logit_scale=2.0, label_smoothing=0.1, reduction="sum", **of) == 0


def test_wrong_calls():
    image, text, of_images, of_texts = inputs()
    groups, numbers = {"image_groups": of_images, "text_groups": of_texts}, {"logit_scale": 1.0, "logit_bias": None}
    for loss in (siglip_loss, clip_loss):
        with pytest.raises(ValueError, match="text_groups: expected it beside image_groups, as there are 37 images"):
            loss(image, text, image_groups=of_images, **numbers)
        with pytest.raises(ValueError, match="image_ids: expected it without image_groups"):
            loss(image, text, image_ids=of_images, **groups, **numbers)
        with pytest.raises(ValueError, match=r"text_groups: expected shape \[71\], got \(37,\)"):
            loss(image, text, image_groups=of_images, text_groups=of_images, **numbers)
    with pytest.raises(ValueError, match="negative_only: expected it without image_groups"):
        siglip_loss(image, text, negative_only=True, **groups, **numbers)
    with pytest.raises(ValueError, match="return_lse: expected it without image_groups"):
        clip_loss(image, text, return_lse=True, **groups, **numbers)
    with pytest.raises(ValueError, match="weights: expected as many texts as images, got 37 images, 71 texts"):
        clip_loss(image, text, weights=torch.ones(IMAGES), **groups, **numbers)
