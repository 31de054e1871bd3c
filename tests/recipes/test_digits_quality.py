"""The digits' backbone, the judge, and the figures of quality on generators whose answers are known."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from fastloss.recipes.data.digits import load_digits
from fastloss.recipes.imagen.digits_backbone import WEIGHTS as WEIGHTS_FILE
from fastloss.recipes.imagen.digits_backbone import digits_backbone
from fastloss.recipes.imagen.digits_quality import judge, quality
from fastloss.recipes.imagen.train_digits_backbone import train


@pytest.fixture(scope="module")
def real():
    """A generator that draws among the real training images of each caption."""
    data = load_digits("train")
    own: dict[str, list[int]] = {}
    for i, caption in enumerate(data.captions):
        own.setdefault(caption, []).append(i)

    def generate(captions, seed):
        random = torch.Generator().manual_seed(seed)
        drawn = [own[c][int(torch.randint(len(own[c]), (), generator=random))] for c in captions]
        return data.images[drawn]

    return generate


# The backbone


def test_backbone_recognises_the_test_split():
    backbone = digits_backbone()
    for size in (32, 48, 64, 128):
        test = load_digits("test", size)
        right = (backbone.classify(test.images).argmax(1) == test.labels).float().mean().item()
        assert right >= 0.97, size
    assert WEIGHTS_FILE.stat().st_size < 300_000


def test_backbone_gives_maps_and_gradients_to_images_only():
    backbone = digits_backbone()
    holder = torch.nn.Sequential(backbone).train()
    assert holder.training and not any(module.training for module in backbone.modules())
    assert not any(p.requires_grad for p in backbone.parameters())
    images = load_digits("val", 64).images[:2].requires_grad_()
    maps = backbone(images)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8), (2, 64, 4, 4)]
    for m in maps:
        (grad,) = torch.autograd.grad(m.sum(), images, retain_graph=True)
        assert torch.isfinite(grad).all() and grad.abs().max() > 0
        assert (m > 0).float().mean() > 0.05  # no map is dead
    half = backbone(images.detach().bfloat16())
    assert all(torch.allclose(a, b, atol=0.05) for a, b in zip(half, maps, strict=True))
    with pytest.raises(ValueError, match="images"):
        backbone(torch.zeros(2, 3, 32, 32))


def test_backbone_weights_that_do_not_load_are_named(tmp_path):
    with pytest.raises(ValueError, match="train_digits_backbone"):
        digits_backbone(tmp_path / "none.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="junk.safetensors"):
        digits_backbone(tmp_path / "junk.safetensors")
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors"):
        digits_backbone(tmp_path / "other.safetensors")


def test_backbone_training_repeats_and_leaves_the_random_state_alone():
    before = torch.random.get_rng_state()
    first, second = train(epochs=1).state_dict(), train(epochs=1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(before, torch.random.get_rng_state())


# The judge


def test_judge_is_accurate_at_every_size():
    for size in (16, 32, 64):
        test = load_digits("test", size)
        assert judge().accuracy(test.images, test.labels) > 0.97
    test = load_digits("test")
    assert judge().accuracy(test.images, (test.labels + 1) % 10) < 0.02
    for images in (torch.zeros(2, 3, 32, 32), torch.full((2, 1, 32, 32), float("nan")), torch.zeros(0, 1, 32, 32)):
        with pytest.raises(ValueError, match="images"):
            judge().predict(images)
    with pytest.raises(ValueError, match="labels"):
        judge().accuracy(test.images, [1, 2])


# The figures


def test_quality_of_real_images_is_the_best_there_is(real):
    figures = quality(real)
    assert figures["accuracy"] == figures["grid_accuracy"] == figures["worst_digit_accuracy"] == 1
    assert figures["z_diversity"] == pytest.approx(figures["z_diversity_real"], rel=0.2)
    assert figures["weight_effect"] == pytest.approx(figures["weight_effect_real"], rel=0.2)
    assert figures["slant_effect"] == pytest.approx(figures["slant_effect_real"], rel=0.2)
    assert figures["weight_effect_real"] > 0.03 and figures["slant_effect_real"] > 0.15
    assert quality(real) == figures != quality(real, seed=1)
    assert quality(real, split="val")["accuracy"] == 1


def test_quality_tells_generators_that_ignore_their_input(real):
    def swapped(captions, seed):
        words = {"bold": "thin", "thin": "bold", "left": "right", "right": "left"}
        return real([" ".join(words.get(word, word) for word in caption.split()) for caption in captions], seed)

    figures = quality(swapped)
    assert figures["accuracy"] == 1 and figures["weight_effect"] < -0.03 and figures["slant_effect"] < -0.15

    figures = quality(lambda captions, seed: real(captions, 0))
    assert figures["accuracy"] == 1 and figures["z_diversity"] == 0

    figures = quality(lambda captions, seed: real(["a handwritten three upright"] * len(captions), seed))
    assert figures["grid_accuracy"] == pytest.approx(0.1) and figures["worst_digit_accuracy"] == 0
    assert figures["z_diversity"] > 0.05
    assert abs(figures["weight_effect"]) < 0.005 and abs(figures["slant_effect"]) < 0.03


def test_quality_checks_what_the_generator_returns():
    for images in (torch.zeros(3, 1, 32, 32), torch.zeros(200, 3, 32, 32), torch.zeros(200, 1, 32, 16)):
        with pytest.raises(ValueError, match=r"generate\(\.\.\.\)"):
            quality(lambda captions, seed, images=images: images)
