"""taming's LPIPS, which is not installed here, by its published formula, on a random network."""

from __future__ import annotations

import copy

import pytest
import torch

from fastloss.compat import taming as ours
from tests.compat.tools import Draws, autoencoder_step
from tests.perceptual.test_backbones import needs_torchvision

pytest.importorskip("lpips")  # whose weights of the linear layers are taming's
pytestmark = needs_torchvision


@pytest.fixture(scope="module")
def loss():
    models = pytest.importorskip("torchvision").models
    with pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(3)
        patch.setattr(ours, "_pretrained_layers", lambda: models.vgg.make_layers(models.vgg.cfgs["D"]))
        return ours.LPIPS().eval()


def published(loss, input, target):
    """Unit features by layer, squared differences, a 1 x 1 convolution without dropout, the mean over pixels."""
    total = 0
    for i, (f, t) in enumerate(zip(*(loss.net(loss.scaling_layer(x)) for x in (input, target)), strict=True)):
        f, t = (x / ((x**2).sum(1, keepdim=True).sqrt() + 1e-10) for x in (f, t))
        lin = getattr(loss, f"lin{i}").model[-1]
        total = total + lin((f - t) ** 2).mean((2, 3), keepdim=True)
    return total


def test_lpips(loss):
    exact = copy.deepcopy(loss).double()
    for draw in Draws(4, (torch.float32,)):
        shape = draw.size(1, 2), 3, draw.size(16, 20), draw.size(16, 20)
        images = [2 * draw.uniform(*shape) - 1, 2 * draw.uniform(*shape) - 1]
        draw.compare(loss, lambda x, y: published(loss, x, y), images, lambda x, y: published(exact, x, y))


def test_a_step_with_a_discriminator(loss):
    found = autoencoder_step(loss)
    torch.testing.assert_close(found, autoencoder_step(lambda x, y: published(loss, x, y)), rtol=1e-4, atol=1e-4)


def test_names_weights_and_training(loss):
    """Those of the published checkpoint; frozen; in training mode the dropout of the linear layers drops."""
    names = list(loss.state_dict())
    assert names[:3] == ["scaling_layer.shift", "scaling_layer.scale", "net.slice1.0.weight"]
    assert "net.slice5.28.bias" in names and names[-1] == "lin4.model.1.weight" and len(names) == 2 + 26 + 5
    assert not any(p.requires_grad for p in loss.parameters()) and loss.lin0.model[-1].weight.min() >= 0
    images = torch.rand(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    dropping = copy.deepcopy(loss).train()
    torch.manual_seed(0)
    assert dropping(*images).shape == (1, 1, 1, 1) and dropping(*images) != loss(*images)
    for module in dropping.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(dropping(*images), loss(*images))
