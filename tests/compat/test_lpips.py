"""lpips' LPIPS and its drop-in, on random networks without the classifiers and the weights that lpips ships."""

from __future__ import annotations

import copy
import pickle
import types

import pytest
import torch

from fastloss.compat import _common
from tests.compat.tools import Draws, autoencoder_step
from tests.perceptual.test_backbones import needs_torchvision

theirs = pytest.importorskip("lpips")
from fastloss.compat import lpips as ours  # noqa: E402

pytestmark = needs_torchvision
FLOATS = (torch.float32, torch.float32, torch.float64)
NAMES = {"alex": "alexnet", "squeeze": "squeezenet1_1", "vgg": "vgg16"}


def features_of(net):
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(3)
    if net == "vgg":
        return models.vgg.make_layers(models.vgg.cfgs["D"])
    return getattr(models, NAMES[net])(weights=None).features


@pytest.fixture(scope="module")
def made():
    """(theirs, ours) of a network and version with the same weights, made once."""
    cache = {}

    def make(net, version="0.1"):
        if (net, version) not in cache:
            layers = types.SimpleNamespace(features=features_of(net))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(theirs.pretrained_networks.tv, NAMES[net], lambda *a, **k: layers)
                pair = [m.LPIPS(net=net, version=version, pnet_rand=True, verbose=False) for m in (theirs, ours)]
            assert list(pair[0].state_dict()) == list(pair[1].state_dict())
            pair[1].load_state_dict(pair[0].state_dict())
            cache[net, version] = pair
        return cache[net, version]

    return make


@pytest.mark.parametrize(("net", "count", "side"), [("alex", 16, 40), ("squeeze", 10, 40), ("vgg", 4, 20)])
def test_lpips(net, count, side, made):
    for draw in Draws(count, FLOATS[:1]):
        pair = [copy.deepcopy(m) for m in made(net, draw.one_of("0.0", "0.1"))]
        linear, spatial = draw.one_of(True, True, False), draw.one_of(True, False)
        for module in pair:
            module.lpips, module.spatial = linear, spatial
        options = {"retPerLayer": draw.one_of(True, False), "normalize": draw.one_of(True, False)}
        shape = draw.size(1, 2), 3, side + draw.size(0, 8), side + draw.size(0, 8)
        images = [2 * draw.uniform(*shape) - 1, 2 * draw.uniform(*shape) - 1]
        exact = copy.deepcopy(pair[0]).double()
        draw.compare(*reversed(pair), images, exact, **options)


def test_a_step_of_an_autoencoder_with_a_discriminator(made):
    other, mine = made("alex")
    torch.testing.assert_close(autoencoder_step(mine), autoencoder_step(other), rtol=1e-4, atol=1e-4)


def test_weights_of_the_heads(made):
    """Constants in evaluation mode; in training mode they learn as lpips' do, by its code where that draws dropout."""
    other, mine = (copy.deepcopy(m) for m in made("alex"))
    images = torch.rand(1, 3, 40, 40, requires_grad=True), torch.rand(1, 3, 40, 40)
    mine(*images).backward()
    assert all(p.grad is None for p in mine.parameters()) and images[0].grad is not None
    for module in (other, mine):
        module.train()
        for layer in module.lins.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.eval()
        module(*images).backward()
    for name, p in other.lins.named_parameters():
        torch.testing.assert_close(mine.lins.get_parameter(name).grad, p.grad, rtol=1e-4, atol=1e-8)
    mine.train(), other.train()
    _common._said.clear()
    with pytest.warns(UserWarning, match="lpips.LPIPS is computed by the library itself.*dropout"):
        torch.manual_seed(0)
        found = mine(*images)
    torch.manual_seed(0)
    assert torch.equal(found, other(*images))


def test_one_image_against_many_is_lpips(made):
    pair = made("alex")
    _common._said.clear()
    images = torch.rand(3, 3, 40, 40), torch.rand(1, 3, 40, 40)
    with pytest.warns(UserWarning, match="images of"):
        found = pair[1](*images)
    assert torch.equal(found, pair[0](*images))


def test_it_is_lpips_own_class(made):
    mine = made("alex")[1]
    assert isinstance(mine, theirs.LPIPS) and (mine.pnet_type, mine.version, mine.L) == ("alex", "0.1", 5)
    again = pickle.loads(pickle.dumps(mine))
    images = torch.rand(1, 3, 40, 40), torch.rand(1, 3, 40, 40)
    assert torch.equal(again(*images), mine(*images)) and mine(*images).shape == (1, 1, 1, 1)
