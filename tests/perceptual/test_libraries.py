"""Perceptual losses beside the libraries that are used for them, on the same random networks: values and gradients."""

from __future__ import annotations

import os
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastloss import PerceptualLoss, dists_distance, feature_distance, lpips_distance, style_distance
from tests.perceptual.test_backbones import needs_torchvision
from tests.perceptual.test_perceptual_loss import images

NETWORKS = [("alex", "alexnet"), ("squeeze", "squeezenet1_1"), ("vgg", "vgg16")]
pytestmark = [needs_torchvision, pytest.mark.filterwarnings("ignore::UserWarning")]


def same(ours: Tensor, theirs: Tensor, wrt: Tensor, rtol: float = 1e-5) -> None:
    """Equal values; gradients equal where theirs is a number (lpips' is NaN where all channels of a pixel are 0)."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-7)
    mine, other = (torch.autograd.grad(v.sum(), wrt, retain_graph=True)[0] for v in (ours, theirs))
    finite = other.isfinite()
    assert mine.isfinite().all() and finite.float().mean() > 0.05
    torch.testing.assert_close(mine[finite], other[finite], rtol=1e-3, atol=1e-5 * other[finite].abs().max().item())


def lpips_module(net: str, monkeypatch: pytest.MonkeyPatch, **options) -> nn.Module:
    """lpips.LPIPS with a random network, without the classifiers, which are 100 M numbers, and the weights it ships."""
    lpips, models = pytest.importorskip("lpips"), pytest.importorskip("torchvision").models
    torch.manual_seed(3)
    layers = {
        "alex": lambda: models.alexnet(weights=None).features,
        "squeeze": lambda: models.squeezenet1_1(weights=None).features,
        "vgg": lambda: models.vgg.make_layers(models.vgg.cfgs["D"]),
    }[net]()
    name = {"alex": "alexnet", "squeeze": "squeezenet1_1", "vgg": "vgg16"}[net]
    with monkeypatch.context() as patch:
        patch.setattr(lpips.pretrained_networks.tv, name, lambda *a, **k: types.SimpleNamespace(features=layers))
        return lpips.LPIPS(net=net, pnet_rand=True, verbose=False, **options)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("version", ["0.0", "0.1"])
@pytest.mark.parametrize(("net", "name"), NETWORKS)
def test_lpips(net, name, version, linear, monkeypatch):
    theirs = lpips_module(net, monkeypatch, version=version, lpips=linear)
    folder = os.path.dirname(pytest.importorskip("lpips").__file__)
    lins = os.path.join(folder, "weights", f"v{version}", f"{net}.pth") if linear else False
    ours = PerceptualLoss(name, criterion="lpips", pretrained=False, input_range=(-1, 1), reduction="none",
                          normalize=version == "0.1", lin_weights=lins)  # fmt: skip
    values = theirs.net.state_dict().values()
    ours.backbones[0].load_state_dict(dict(zip(ours.backbones[0].state_dict(), values, strict=True)))
    image, image_pred = (2 * t.detach() - 1 for t in images(2, 64))
    image_pred.requires_grad_()
    same(ours(image, image_pred), theirs(image_pred, image).flatten(), image_pred)


@pytest.mark.parametrize(("net", "name"), NETWORKS)
def test_lpips_maps(net, name, monkeypatch):
    theirs = lpips_module(net, monkeypatch, spatial=True)
    image, image_pred = (2 * t.detach() - 1 for t in images(1, 64))
    image_pred.requires_grad_()
    with torch.no_grad():
        targets = theirs.net(theirs.scaling_layer(image))
    features, lins = (
        theirs.net(theirs.scaling_layer(image_pred)),
        [lin.model[-1].weight.detach() for lin in theirs.lins],
    )
    found = lpips_distance(list(features), list(targets), lins, spatial=True, size=(64, 64))
    same(found, theirs(image_pred, image), image_pred)


def small_network() -> nn.Sequential:
    torch.manual_seed(5)
    convolutions = (nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2), nn.Conv2d(32, 48, 3, stride=2))
    layers = [layer for c in convolutions for layer in (c, nn.ReLU())]
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    return nn.Sequential(*layers).requires_grad_(False)


def taps(network: nn.Sequential, x: Tensor) -> list[Tensor]:
    found = []
    for layer in network:
        x = layer(x)
        found += [x] if isinstance(layer, nn.ReLU) else []
    return found


@pytest.mark.parametrize("criterion", ["mse", "mae"])
def test_piqs_content_and_style_losses(criterion):
    """piq's content is a mean over pixels and a sum over channels; its Gram matrices are not divided by anything."""
    piq = pytest.importorskip("piq")
    network, (image, image_pred) = small_network(), images(2, 32)
    options = dict(feature_extractor=network, layers=["1", "3", "5"], distance=criterion, mean=[0.0] * 3, std=[1.0] * 3)
    features, targets = taps(network, image_pred), taps(network, image)
    kind = {"mse": "l2", "mae": "l1"}[criterion]
    content = piq.ContentLoss(**options, weights=[1.0, 0.5, 2.0])(image_pred, image)
    weights = [w * f.shape[1] for w, f in zip((1.0, 0.5, 2.0), features, strict=True)]
    same(feature_distance(features, targets, weights=weights, criterion=kind), content, image_pred)
    style = piq.StyleLoss(**options, weights=[1.0, 0.5, 2.0])(image_pred, image)
    ours = style_distance(features, targets, weights=[1.0, 0.5, 2.0], criterion=kind, normalization="none")
    same(ours, style, image_pred)


def test_piqs_lpips_and_dists(monkeypatch):
    """Their networks and weights are downloads: the heads as they are, on random features and weights."""
    piq = pytest.importorskip("piq")
    network, (image, image_pred) = small_network(), images(2, 32)
    features, targets = taps(network, image_pred), taps(network, image)
    lins = [torch.rand(f.shape[1]) for f in features]
    lpips = piq.LPIPS.__new__(piq.LPIPS)  # without __init__, which downloads
    normalised = [[piq.ContentLoss.normalize(f) for f in side] for side in (features, targets)]
    parts = piq.ContentLoss.compute_distance(types.SimpleNamespace(distance=nn.MSELoss(reduction="none")), *normalised)
    theirs = sum((d * w.view(1, -1, 1, 1)).sum(1).mean((1, 2)) for d, w in zip(parts, lins, strict=True))
    assert isinstance(lpips, piq.ContentLoss)
    same(lpips_distance(features, targets, lins), theirs, image_pred)
    alphas, betas = ([torch.rand(f.shape[1]) for f in features] for _ in range(2))
    similar = piq.DISTS.compute_distance(None, features, targets)
    weights = [w.view(1, -1, 1, 1) for w in (*alphas, *betas)]
    total = sum(w.sum() for w in weights)
    theirs = 1 - sum((w / total * s).sum((1, 2, 3)) for w, s in zip(weights, similar, strict=True))
    same(dists_distance(features, targets, alphas, betas), theirs, image_pred)


def test_basicsrs_perceptual_and_style_losses():
    """BasicSR's formula as printed: weights times l1_loss of the features and of Gram matrices over C H W."""
    network, (image, image_pred) = small_network(), images(2, 32)
    features, targets, weights = taps(network, image_pred), taps(network, image), (0.1, 0.1, 1.0)

    def gram(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        flat = x.view(n, c, h * w)
        return flat.bmm(flat.transpose(1, 2)) / (c * h * w)

    content = sum(w * F.l1_loss(f, t) for w, f, t in zip(weights, features, targets, strict=True))
    style = sum(w * F.l1_loss(gram(f), gram(t)) for w, f, t in zip(weights, features, targets, strict=True))
    same(feature_distance(features, targets, weights=weights), content, image_pred)
    same(style_distance(features, targets, weights=weights), style, image_pred)


def test_two_gradients_for_vqgans_weight_before_the_backward():
    """taming's adaptive weight: norms of two losses' gradients at the last layer, both graphs kept, then backward."""
    network, (image, _) = small_network(), images(2, 32)
    loss = PerceptualLoss(lambda x: taps(network, x))
    torch.manual_seed(6)
    decoder, critic = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 1, 4, stride=4)
    pred = decoder(image)
    perceptual, adversarial = loss(image, pred), -critic(pred).mean()
    (own,) = torch.autograd.grad(perceptual, decoder.weight, retain_graph=True)
    (other,) = torch.autograd.grad(adversarial, decoder.weight, retain_graph=True)
    weight = (own.norm() / (other.norm() + 1e-4)).clamp(0, 1e4).detach()
    (perceptual + weight * adversarial).backward()
    assert torch.isfinite(weight) and weight > 0
    torch.testing.assert_close(decoder.weight.grad, own + weight * other)
