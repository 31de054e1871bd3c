"""PerceptualLoss with any callable: values, gradients, freezing, targets kept, bad input, no torchvision."""

from __future__ import annotations

import copy
import functools
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastloss
from fastloss import PerceptualLoss, feature_distance

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


class Net(nn.Module):
    """A small network with batch norm and dropout, which eval mode must hold still."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(0.5))
        self.b = nn.Conv2d(5, 4, 3, stride=2)

    def forward(self, image):
        a = self.a(image)
        return [a, self.b(a)]


def twice_pooled(image):
    return [F.avg_pool2d(image, 2), F.avg_pool2d(image, 4)]


def images(n: int = 2, size: int = 16, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(n, 3, size, size, generator=generator)
    return image, torch.rand(n, 3, size, size, generator=generator).requires_grad_()


def test_a_callable_gives_the_weighted_sum_of_means():
    image, image_pred = images()
    loss = PerceptualLoss(twice_pooled, layer_weights=[1.0, 0.5])
    expected = sum(
        w * (f - t).abs().mean()
        for w, f, t in zip(
            (1.0, 0.5), twice_pooled((image_pred - MEAN) / STD), twice_pooled((image - MEAN) / STD), strict=True
        )
    )
    torch.testing.assert_close(loss(image, image_pred), expected)
    (ours,), (eager,) = (torch.autograd.grad(v, image_pred) for v in (loss(image, image_pred), expected))
    torch.testing.assert_close(ours, eager)


def test_only_the_prediction_gets_a_gradient():
    image, image_pred = images()
    image.requires_grad_()
    net = Net()
    loss = PerceptualLoss(net)
    loss(image, image_pred).backward()
    assert image.grad is None and image_pred.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in loss.backbones.parameters())
    assert all(not f.requires_grad for f in loss.encode(image)[0])


def test_encoded_targets_stand_for_the_image():
    image, image_pred = images()
    loss = PerceptualLoss([Net(), twice_pooled])
    calls = []
    loss.backbones[0].a.register_forward_hook(lambda *_: calls.append(1))
    direct = loss(image, image_pred)
    assert len(calls) == 2
    targets = loss.encode(image)
    kept = pickle.loads(pickle.dumps(targets))
    for use in (targets, targets, kept):
        torch.testing.assert_close(loss(use, image_pred), direct)
    assert len(calls) == 6
    with pytest.raises(ValueError, match="image: expected the features of 2 backbones, .* got 1"):
        loss(targets[:1], image_pred)
    with pytest.raises(TypeError, match="image: expected a tensor or what encode"):
        loss("targets", image_pred)
    with pytest.raises(ValueError, match=r"targets\[0\]: expected the shape of features\[0\]"):
        loss(loss.encode(image[:1]), image_pred)


def test_a_network_behind_a_callable_is_left_as_it_is():
    net = Net()
    loss = PerceptualLoss(lambda image: net(image))
    assert net.training and all(p.requires_grad for p in net.parameters())
    assert list(loss.backbones.parameters()) == []


def test_several_backbones_with_their_weights():
    image, image_pred = images()
    net = Net()
    both = PerceptualLoss([net, twice_pooled], layer_weights=[None, [2.0, 0.0]], backbone_weights=[0.5, 3.0])
    one, two = PerceptualLoss(net), PerceptualLoss(twice_pooled, layer_weights=[2.0, 0.0])
    expected = 0.5 * one(image, image_pred) + 3.0 * two(image, image_pred)
    torch.testing.assert_close(both(image, image_pred), expected)
    each = PerceptualLoss([net, twice_pooled], reduction="none")(image, image_pred)
    torch.testing.assert_close(each.mean(), PerceptualLoss([net, twice_pooled])(image, image_pred))


@pytest.mark.parametrize("criterion", ["l1", "l2", "charbonnier", "smooth_l1"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_criterion_and_reduction_are_those_of_feature_distance(criterion, reduction):
    image, image_pred = images()
    loss = PerceptualLoss(twice_pooled, normalize=False, criterion=criterion, reduction=reduction)
    expected = feature_distance(twice_pooled(image_pred), twice_pooled(image), criterion=criterion, reduction=reduction)
    assert torch.equal(loss(image, image_pred), expected)


def test_input_range_and_normalisation():
    image, image_pred = images()
    expected = PerceptualLoss(twice_pooled)(image, image_pred)
    for low, high in ((-1.0, 1.0), (0, 255)):
        scaled = [low + (high - low) * i for i in (image, image_pred)]
        torch.testing.assert_close(PerceptualLoss(twice_pooled, input_range=(low, high))(*scaled), expected)
    seen = []
    half = PerceptualLoss(lambda x: seen.append(x) or [x], normalize=([0.5], [0.25]))
    half.encode(torch.full((1, 1, 2, 2), 0.75))
    assert torch.equal(seen[0], torch.ones(1, 1, 2, 2))
    plain = PerceptualLoss(lambda x: [x], normalize=False)
    assert plain(torch.zeros(1, 7, 2, 2), torch.ones(1, 7, 2, 2)).item() == 1.0


def test_casting_the_module_does_not_round_the_normalisation():
    exact = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)
    loss = PerceptualLoss(Net()).half()
    assert torch.equal(loss.shift.flatten(), exact.float())
    assert torch.equal(loss.double().shift.flatten(), exact)
    assert loss.to("meta").shift.device.type == "meta"


def test_images_and_targets_of_another_device_are_named():
    image, image_pred = images()
    loss = PerceptualLoss(Net())
    targets = loss.encode(image)
    with pytest.raises(ValueError, match="image: expected it on the device of the loss, cpu, got meta"):
        loss.encode(image.to("meta"))
    with pytest.raises(ValueError, match="image_pred: expected it on the device of the loss, cpu, got meta"):
        loss(targets, image_pred.to("meta"))
    with pytest.raises(ValueError, match="image_pred: expected it on the device of image, meta, got cpu"):
        loss([[layer.to("meta") for layer in features] for features in targets], image_pred)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_image_dtypes(dtype):
    image, image_pred = images()
    loss = PerceptualLoss(Net())
    expected = loss(image, image_pred)
    value = loss(image.to(dtype), image_pred.to(dtype))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=4 * torch.finfo(torch.bfloat16).eps, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        under = loss(image, image_pred)
    assert under.dtype == torch.float32
    torch.testing.assert_close(under, expected, rtol=4 * torch.finfo(torch.bfloat16).eps, atol=0)


def test_float64_gradcheck_through_a_network():
    torch.manual_seed(8)
    loss = PerceptualLoss(Net(), criterion="l2").double()
    image, image_pred = (t.detach().double() for t in images(1, 6))
    assert loss(image, image_pred).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x: loss(image, x), image_pred.requires_grad_(), fast_mode=True)


def test_two_gradients_of_one_graph():
    image, image_pred = images()
    value = PerceptualLoss(Net())(image, image_pred)
    once = torch.autograd.grad(value, image_pred, retain_graph=True)[0]
    again = torch.autograd.grad(value, image_pred, retain_graph=True)[0]
    value.backward()
    assert torch.equal(once, again) and torch.equal(once, image_pred.grad)


def test_the_whole_loss_compiles_into_one_graph():
    torch._dynamo.reset()
    image, image_pred = images()
    loss = PerceptualLoss(Net())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, expected = compiled(image, image_pred), loss(image, image_pred)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, image_pred), torch.autograd.grad(expected, image_pred))


BAD_CALLS = [
    ((torch.zeros(0, 3, 8, 8), torch.zeros(0, 3, 8, 8)), ValueError, "mean of an empty batch"),
    ((torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9)), ValueError, "image_pred: expected the shape of image"),
    ((torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)), ValueError, r"image: expected 3 channels.*repeat a grey"),
    ((torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8)), ValueError, r"got shape \(1, 4, 8, 8\)$"),
    ((torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)), ValueError, "image: expected a 4-D tensor"),
    ((torch.zeros(1, 3, 8, 0), torch.zeros(1, 3, 8, 0)), ValueError, r"image: .*one pixel, got shape \(1, 3, 8, 0\)$"),
    (([[torch.zeros(1, 3, 4, 4)]], torch.zeros(1, 3, 0, 8)), ValueError, "image_pred: expected at least one pixel"),
    ((torch.zeros(1, 3, 8, 8).byte(), torch.zeros(1, 3, 8, 8)), TypeError, "image: expected a float16"),
    ((torch.zeros(1, 3, 8, 8), None), TypeError, "image_pred: expected a tensor, got NoneType"),
]


@pytest.mark.parametrize(("args", "error", "match"), BAD_CALLS)
def test_bad_calls(args, error, match):
    with pytest.raises(error, match=match):
        PerceptualLoss(twice_pooled)(*args)


BAD_OPTIONS = [
    ({"backbones": "vgg17"}, ValueError, "backbones: expected one of .*'alexnet'.*got 'vgg17'"),
    ({"backbones": 3}, TypeError, "backbones: expected a name, or a module or callable .*got int"),
    ({"backbones": []}, ValueError, "backbones: expected at least one"),
    ({"layers": ["relu1_2"]}, ValueError, "layers: only named backbones have named taps"),
    ({"pretrained": "weights.pth"}, ValueError, "pretrained: a callable has its own weights"),
    ({"criterion": "l3"}, ValueError, "criterion: expected one of"),
    ({"reduction": "avg"}, ValueError, "reduction: expected one of"),
    ({"layer_weights": [1.0, float("nan")]}, ValueError, r"layer_weights\[1\]: expected a finite number"),
    ({"layer_weights": 2.0}, TypeError, "layer_weights: expected a list of numbers"),
    ({"backbone_weights": [1.0, 2.0]}, ValueError, "backbone_weights: expected as many entries as backbones, 1"),
    ({"input_range": (1.0, 0.0)}, ValueError, "input_range: expected .low, high. with low < high"),
    ({"normalize": ([0.5], [1.0, 1.0])}, ValueError, "std: expected as many entries as mean, 1, got 2"),
    ({"normalize": "imagenet"}, TypeError, "normalize: expected True, False or a pair"),
    ({"normalize": ([0.5] * 3, [1.0, 0.0, 1.0])}, ValueError, r"std\[1\]: expected a finite number > 0"),
    ({"backbones": [twice_pooled] * 2, "layer_weights": [1.0, 2.0]}, TypeError, "one list .or None. for each"),
    ({"backbones": [twice_pooled] * 2, "layers": [None]}, ValueError, "layers: expected as many entries as backbones"),
    ({"backbones": [twice_pooled] * 2, "pretrained": [True]}, ValueError, "pretrained: expected as many entries"),
]


@pytest.mark.parametrize(("options", "error", "match"), BAD_OPTIONS)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        PerceptualLoss(**({"backbones": twice_pooled} | options))


def test_bad_backbones_and_weights_at_call():
    image, image_pred = images()
    with pytest.raises(TypeError, match="backbones: expected each to return a list of tensors, got Tensor"):
        PerceptualLoss(lambda x: x)(image, image_pred)
    with pytest.raises(ValueError, match="weights: expected as many entries as features, 2, got 3"):
        PerceptualLoss(twice_pooled, layer_weights=[1, 2, 3])(image, image_pred)
    with pytest.raises(TypeError, match=r"features\[0\]: expected a float16.*int64"):
        PerceptualLoss(lambda x: [x.long()])(image, image_pred)


def test_without_torchvision_callables_work_and_names_say_what_to_do():
    code = (
        "import sys; sys.modules['torchvision'] = None; import torch, fastloss; "
        "x = torch.zeros(1, 3, 4, 4); print(fastloss.PerceptualLoss(lambda i: [i], normalize=False)(x, x + 1).item()); "
        "fastloss.PerceptualLoss()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "1.0"
    assert done.returncode == 1
    for words in (
        "ImportError: backbones: 'vgg16' needs torchvision",
        "PyPI's CUDA build of torch",
        "CPU-only torch",
        "--index-url",
        "any callable that returns a list of features",
    ):
        assert words in done.stderr


@pytest.mark.parametrize(("criterion", "options", "direct"), [
    ("style", {"criterion": "l2", "normalization": "none"}, fastloss.style_distance),
    ("charbonnier", {"eps": 0.1}, functools.partial(fastloss.feature_distance, criterion="charbonnier")),
    ("dists", {"c1": 0.01}, lambda f, t, c1: fastloss.dists_distance(f, t, c1=c1).mean()),
])  # fmt: skip
def test_options_of_the_criterion(criterion, options, direct):
    """They reach the criterion's function, and survive a copy."""
    torch.manual_seed(0)
    image, image_pred = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)

    def features(x):
        return [x, x[:, :2].square()]

    loss = PerceptualLoss(features, criterion=criterion, criterion_options=options, normalize=False)
    wanted = direct(features(image_pred), features(image), **options)
    torch.testing.assert_close(loss(image, image_pred), wanted)
    assert str(options) in repr(copy.deepcopy(loss))
    with pytest.raises(TypeError, match="criterion_options: unknown option 'epsilon'"):
        PerceptualLoss(features, criterion=criterion, criterion_options={"epsilon": 1})
