"""BasicSR's losses, which are not installed here, as its code defines them in eager torch."""

from __future__ import annotations

import copy
import functools
import sys
import types

import pytest
import torch

import fastloss
from fastloss.compat import basicsr as ours
from tests.compat.tools import Draws
from tests.perceptual.test_backbones import needs_torchvision

DISTANCES = {
    "L1Loss": lambda pred, target: (pred - target).abs(),
    "MSELoss": lambda pred, target: (pred - target) ** 2,
    "CharbonnierLoss": lambda pred, target: ((pred - target) ** 2 + 1e-4) ** 0.5,
}


def reduced(values, weight, reduction, loss_weight):
    if weight is not None:
        values = values * weight
    if reduction == "none":
        return loss_weight * values
    if reduction == "sum":
        return loss_weight * values.sum()
    if weight is None:
        return loss_weight * values.mean()
    return loss_weight * values.sum() / (weight.sum() * (values.shape[1] // weight.shape[1]))


def drawn_weight(draw, shape):
    """None, or weights of each pixel, of one channel or all, of one image or all."""
    shape = draw.one_of(None, shape, (shape[0], 1, *shape[2:]), (1, *shape[1:]))
    return None if shape is None else 0.1 + draw.uniform(*shape)


def weighted(loss, tensors, weight):
    return loss(*tensors) if weight is None else loss(*tensors, weight=weight.to(tensors[0].dtype))


@pytest.mark.parametrize("name", list(DISTANCES))
def test_pixel_losses(name):
    for draw in Draws(32):
        shape = draw.size(1, 3), draw.size(1, 3), draw.size(1, 12), draw.size(1, 12)
        weight, reduction = drawn_weight(draw, shape), draw.one_of("mean", "sum", "none")
        more = {"eps": 1e-4} if name == "CharbonnierLoss" else {}
        loss = getattr(ours, name)(loss_weight=0.5, reduction=reduction, **more)

        def eager(pred, target, weight=None, reduction=reduction):
            return reduced(DISTANCES[name](pred, target), weight, reduction, 0.5)

        pair = [lambda *t, f=f, w=weight: weighted(f, t, w) for f in (loss, eager)]
        draw.compare(*pair, [draw.normal(*shape), draw.normal(*shape)])


def test_weighted_tv_loss():
    def eager(pred, weight=None, reduction="mean"):
        rows = reduced((pred[:, :, 1:] - pred[:, :, :-1]).abs(), None if weight is None else weight[:, :, :-1],
                       reduction, 0.5)  # fmt: skip
        columns = reduced((pred[..., 1:] - pred[..., :-1]).abs(), None if weight is None else weight[..., :-1],
                          reduction, 0.5)  # fmt: skip
        return rows + columns

    for draw in Draws(32):
        shape = draw.size(1, 3), draw.size(1, 3), draw.size(2, 12), draw.size(2, 12)
        weight, reduction = drawn_weight(draw, shape), draw.one_of("mean", "sum")
        loss = ours.WeightedTVLoss(loss_weight=0.5, reduction=reduction)
        fns = loss, functools.partial(eager, reduction=reduction)
        draw.compare(*(lambda *t, f=f, w=weight: weighted(f, t, w) for f in fns), [draw.normal(*shape)])


@needs_torchvision
def test_perceptual_loss(monkeypatch):
    """Means of |d| or d^2, or norms, of features and of products over C H W; taps before a ReLU are before it."""
    monkeypatch.setattr(ours.backbones, "_load", lambda steps, name, pretrained: None)
    torch.manual_seed(0)
    layers = {"conv1_2": 0.1, "relu2_1": 1.0, "conv3_1": 0.5}

    def eager(loss, x, gt):
        def features(image):
            image, found = (image - loss.vgg.mean) / loss.vgg.std, {}
            for name, layer in loss.vgg.vgg_net.named_children():
                image = layer(image.clone())
                found |= {name: image} if name in layers else {}
            return found

        def distance(a, b):
            d = a - b
            return d.norm() if loss.criterion_type == "fro" else (d.abs() if kind == "l1" else d**2).mean()

        def gram(f):
            return f.flatten(2) @ f.flatten(2).mT / f[0].numel()

        kind, f, t = loss.criterion_type, features(x), features(gt)
        percep = sum(w * distance(f[k], t[k]) for k, w in layers.items())
        style = sum(w * distance(gram(f[k]), gram(t[k])) for k, w in layers.items())
        return 2.0 * percep, 3.0 * style

    made = ours.PerceptualLoss(layers, "vgg16", perceptual_weight=2.0, style_weight=3.0)
    for draw in Draws(9, (torch.float32, torch.float32, torch.float64)):
        loss = copy.deepcopy(made).to(draw.dtype)
        loss.criterion_type = draw.one_of("l1", "l2", "fro")
        exact = copy.deepcopy(loss).double()
        images = [draw.uniform(1, 3, 12, 14), draw.uniform(1, 3, 12, 14)]
        fns = [lambda x, y, f=f: f(x, y.detach()) for f in (loss, functools.partial(eager, loss))]
        draw.compare(*fns, images, functools.partial(eager, exact), frozen=1)
    names = list(loss.state_dict())
    assert (
        names[:3] == ["vgg.mean", "vgg.std", "vgg.vgg_net.conv1_1.weight"] and names[-1] == "vgg.vgg_net.conv3_1.bias"
    )
    made.perceptual_weight = made.style_weight = 0.0
    assert made(*(image.float() for image in images)) == (None, None)
    for wrong, error in (({"criterion": "huber"}, NotImplementedError), ({"vgg_type": "vgg11"}, ValueError)):
        with pytest.raises(error):
            ours.PerceptualLoss(layers, **({"vgg_type": "vgg16"} | wrong))


def test_attributes_and_errors():
    loss = ours.CharbonnierLoss(2.0, "sum")
    assert (loss.loss_weight, loss.reduction, loss.eps) == (2.0, "sum", 1e-12) and loss.state_dict() == {}
    assert isinstance(ours.WeightedTVLoss(), ours.L1Loss)
    image = torch.rand(1, 3, 4, 4)
    assert loss(image, image, name="ignored").item() == pytest.approx(2 * 48 * 1e-6)
    for wrong in (lambda: ours.L1Loss(reduction="median"), lambda: ours.WeightedTVLoss(reduction="none")):
        with pytest.raises(ValueError, match="reduction: expected one of"):
            wrong()
    with pytest.raises(AssertionError):
        loss(image, image, weight=torch.ones(1, 2, 4, 4))


def test_patched(monkeypatch):
    """In a stand-in of BasicSR, whose options files name losses by its registry."""
    for name in ("basicsr", "basicsr.losses", "basicsr.losses.basic_loss", "basicsr.utils", "basicsr.utils.registry"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["basicsr"].__spec__ = types.SimpleNamespace()
    home, registry = sys.modules["basicsr.losses.basic_loss"], sys.modules["basicsr.utils.registry"]
    classes = {name: type(name, (torch.nn.Module,), {}) for name in ("L1Loss", "MSELoss")}
    vars(home).update(classes)
    registry.LOSS_REGISTRY = types.SimpleNamespace(_obj_map=dict(classes))
    with fastloss.patch("basicsr") as swapped:
        assert home.L1Loss is registry.LOSS_REGISTRY._obj_map["L1Loss"] is ours.L1Loss
    assert home.L1Loss is registry.LOSS_REGISTRY._obj_map["L1Loss"] is classes["L1Loss"]
    assert swapped.left["basicsr.losses.basic_loss.CharbonnierLoss"] == "not in the installed version"
