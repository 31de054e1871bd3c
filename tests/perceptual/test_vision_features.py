"""Vision models of timm and transformers as backbones: taps, tokens, sizes, normalisation, and the loss on them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastloss import PerceptualLoss, VisionFeatures

timm = pytest.importorskip("timm")
MEAN, STD = (torch.tensor(x).view(1, 3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "size", "taps"), [
    ("vit_tiny_patch16_224", (32, 48), (2, 5, 8, 11)), ("resnet10t", (40, 33), (0, 1, 2, 4)),
])  # fmt: skip
def test_features_are_timms_of_an_image_normalised_as_the_model_wants(name, size, taps):
    features = VisionFeatures(f"timm:{name}", pretrained=False).eval()
    assert features.taps == taps
    model, raw = features.model, image(*size)
    own = [torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std")]
    wanted = model.forward_intermediates((raw - own[0]) / own[1], indices=list(taps), intermediates_only=True)
    for got, theirs in zip(features((raw - MEAN) / STD), wanted, strict=True):
        torch.testing.assert_close(got, theirs, rtol=1e-4, atol=1e-4)


def test_tokens_and_sizes():
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True).eval()
    x = image(32, 48)
    (maps,), (every,), (first,) = (VisionFeatures(model, [7], tokens=t)(x) for t in ("patch", "all", "class"))
    assert maps.shape == (2, 192, 2, 3) and every.shape == (2, 192, 7) and first.shape == (2, 192, 1)
    assert torch.equal(every[:, :, 1:], maps.flatten(2)) and torch.equal(every[:, :, :1], first)
    for resize, wanted in (("multiple", (3, 2)), (64, (4, 4)), ((16, 32), (1, 2))):
        assert VisionFeatures(model, [-1], resize=resize)(image(45, 30))[0].shape == (2, 192, *wanted)
    with pytest.raises(ValueError, match=r"multiples of VisionTransformer's patches, \(16, 16\), got \(45, 30\)"):
        VisionFeatures(model)(image(45, 30))


def test_the_loss_by_name_and_its_gradients():
    loss = PerceptualLoss("timm:vit_tiny_patch16_224", [0, 3], [1.0, 0.5], pretrained=False, criterion="l2")
    a, b = image(32, 32).requires_grad_(), image(32, 32, 1).requires_grad_()
    (backbone,) = loss.backbones
    assert not any(p.requires_grad for p in backbone.parameters()) and not list(loss.parameters())
    here, there = (backbone((x - MEAN) / STD) for x in (a, b))
    wanted = sum(w * (x - y).square().mean() for w, x, y in zip((1.0, 0.5), here, there, strict=True))
    torch.testing.assert_close(loss(a, b), wanted)
    both = torch.autograd.grad(wanted, (a, b))
    torch.testing.assert_close(torch.autograd.grad(loss(a, b), b)[0], both[1], rtol=1e-4, atol=1e-7)
    found = torch.autograd.grad(loss(loss.encode(a, graph=True), b), (a, b))
    for got, theirs in zip(found, both, strict=True):
        torch.testing.assert_close(got, theirs, rtol=1e-4, atol=1e-7)
    assert not loss.encode(a)[0][0].requires_grad
    half = PerceptualLoss(lambda x: [x.half()], normalize=False, execution=None)
    assert half.encode(a, graph=True)[0][0].requires_grad  # no network of its own to lose a gradient in


def test_transformers_hidden_states():
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = transformers.AutoModel.from_config(config).eval()
    x = image(28, 42)
    wanted = model(pixel_values=x, output_hidden_states=True).hidden_states
    features = VisionFeatures(model, [1, 3])
    for got, theirs in zip(features(x), (wanted[2], wanted[4]), strict=True):
        torch.testing.assert_close(got, theirs[:, 1:].transpose(1, 2).unflatten(2, (2, 3)))
    (first,) = VisionFeatures(model, [3], tokens="class")(x)
    torch.testing.assert_close(first, wanted[4][:, :1].transpose(1, 2))


@pytest.mark.parametrize(("arguments", "options", "error", "message"), [
    (("timm:no_such_model",), {}, ValueError, "model: timm has no 'no_such_model'"),
    (("dino:vit",), {}, ValueError, "model: expected 'timm:NAME' or 'transformers:NAME', got 'dino:vit'"),
    ((nn.Linear(1, 1),), {}, TypeError, "model: expected 'timm:NAME', 'transformers:NAME', or a model of theirs"),
    (("timm:resnet10t", [5]), {}, ValueError, "layers: timm:resnet10t has the blocks 0 to 4, got 5"),
    (("timm:resnet10t", [2, 1]), {}, ValueError, "layers: expected different blocks in ascending order"),
    (("timm:resnet10t",), {"tokens": "cls"}, ValueError, "tokens: expected one of"),
    (("timm:resnet10t",), {"resize": 0}, ValueError, "resize: expected None, 'multiple', a side or"),
])  # fmt: skip
def test_mistakes(arguments, options, error, message):
    with pytest.raises(error) as caught:
        VisionFeatures(*arguments, pretrained=False, **options)
    assert message in str(caught.value)


def test_maps_have_no_tokens():
    with pytest.raises(ValueError, match="tokens: timm:resnet10t has maps and no tokens; expected 'patch', got 'all'"):
        VisionFeatures("timm:resnet10t", pretrained=False, tokens="all")(image(32, 32))
