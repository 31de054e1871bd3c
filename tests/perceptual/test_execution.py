"""PerceptualLoss: how its networks run changes no value; other criteria than L1; LPIPS as the lpips package has it."""

from __future__ import annotations

import copy
import importlib.util
import os
import pickle
import types
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastloss import Execution, PerceptualLoss, dists_distance, lpips_distance, style_distance
from tests.perceptual.test_backbones import needs_torchvision
from tests.perceptual.test_perceptual_loss import Net, images, twice_pooled

CRITERIA = ("l1", "l2", "lpips", "dists", "style")
needs_lpips = pytest.mark.skipif(importlib.util.find_spec("lpips") is None, reason="pip install lpips")


def made(criterion: str = "l1", net: nn.Module | None = None, **options) -> PerceptualLoss:
    lins = {"lin_weights": [torch.linspace(0, 1, 5), torch.linspace(1, 2, 4)]} if criterion == "lpips" else {}
    torch.manual_seed(0)
    return PerceptualLoss(net or Net(), criterion=criterion, **lins, **options)


def value_and_gradient(loss, image, image_pred):
    value = loss(image, image_pred)
    upstream = torch.linspace(0.5, 2, value.numel()).reshape(value.shape)
    return value.detach(), torch.autograd.grad(value, image_pred, upstream)[0]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_criteria_are_those_of_the_functions(criterion):
    image, image_pred = images()
    loss = made(criterion, layer_weights=[0.5, 2.0], reduction="none")
    features, targets = loss._features(image_pred)[0], loss.encode(image)[0]
    if criterion == "lpips":
        lins = [0.5 * torch.linspace(0, 1, 5), 2.0 * torch.linspace(1, 2, 4)]
        expected = lpips_distance(features, targets, lins)
    elif criterion == "dists":
        weights = [torch.full((5,), 0.5), torch.full((4,), 2.0)]
        expected = dists_distance(features, targets, weights, weights)
    elif criterion == "style":
        expected = style_distance(features, targets, weights=[0.5, 2.0], reduction="none")
    else:
        d = [f - t for f, t in zip(features, targets, strict=True)]
        d = [x.abs() if criterion == "l1" else x * x for x in d]
        expected = 0.5 * d[0].mean((1, 2, 3)) + 2.0 * d[1].mean((1, 2, 3))
    torch.testing.assert_close(loss(image, image_pred), expected)
    mean = made(criterion, loss.backbones[0], layer_weights=[0.5, 2.0])(image, image_pred)
    torch.testing.assert_close(mean, expected.mean())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_in_pieces_is_the_whole_batch(criterion, reduction):
    image, image_pred = images(5)
    net = Net()
    whole = value_and_gradient(made(criterion, net, reduction=reduction), image, image_pred)
    for chunk in (2, 8):
        loss = made(criterion, net, reduction=reduction, execution=Execution(chunk=chunk))
        torch.testing.assert_close(value_and_gradient(loss, image, image_pred), whole)
        torch.testing.assert_close(value_and_gradient(loss, loss.encode(image), image_pred), whole)


def test_in_pieces_no_more_than_one_piece_is_alive():
    image, image_pred = images(6)
    loss = made(execution=Execution(chunk=2))
    alive, most = weakref.WeakSet(), []

    def count(module, inputs, output):
        alive.add(output)
        most.append(sum(t.shape[0] for t in alive))

    loss.backbones[0].b.register_forward_hook(count)
    value = loss(image, image_pred)
    assert max(most) == 4 and not alive  # prediction and target of one piece; nothing waits for the backward
    once = torch.autograd.grad(value, image_pred, retain_graph=True)[0]
    assert torch.equal(once, torch.autograd.grad(value, image_pred, retain_graph=True)[0])
    (first,) = torch.autograd.grad(value.square(), image_pred, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(loss(image, image_pred), value.detach())
    empty = torch.zeros(0, 3, 16, 16)
    with pytest.raises(ValueError, match="mean of an empty batch"):
        loss(empty, empty)


EXECUTIONS = [
    Execution(channels_last=True),
    Execution(checkpoint=True),
    Execution(compile="aot_eager"),
    Execution(checkpoint=True, chunk=1, channels_last=True),
    Execution(dtype=torch.float32),
]


@pytest.mark.parametrize("execution", EXECUTIONS, ids=str)
def test_execution_changes_no_value(execution):
    torch._dynamo.reset()
    image, image_pred = images()
    net = Net()
    expected = value_and_gradient(made(net=copy.deepcopy(net)), image, image_pred)
    loss = made(net=net, execution=execution)
    for form in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        torch.testing.assert_close(value_and_gradient(form, image, image_pred), expected)
        assert form.execution == execution
        assert (form.backbones[0]._compiled_call_impl is not None) == bool(execution.compile)


def test_checkpoints_run_the_network_again_in_the_backward():
    image, image_pred = images()
    for again in (False, True):
        loss, calls = made(execution=Execution(checkpoint=again)), []
        loss.backbones[0].a.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        value = loss(image, image_pred)
        assert len(calls) == 2
        value.backward()
        assert len(calls) == 2 + again


@needs_torchvision
def test_checkpoints_of_a_named_network_keep_the_taps_alone():
    image, image_pred = images(1, 64)
    results, kept = [], []
    for execution in (Execution(), Execution(checkpoint=True), Execution(checkpoint=True, channels_last=True)):
        torch.manual_seed(1)
        loss = PerceptualLoss("squeezenet1_1", pretrained=False, execution=execution)
        held: dict[int, int] = {}
        weights = {p.data_ptr() for p in loss.backbones.parameters()}

        def pack(t, held=held, weights=weights):
            if t.data_ptr() not in weights:
                held[t.data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            value = loss(image, image_pred)
        results.append((value.detach(), torch.autograd.grad(value, image_pred)[0]))
        kept.append(sum(held.values()))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-6)
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [None, 1])
def test_half_precision_networks(dtype, chunk):
    """Float16 gradients of a mean are as small as 1 / 10^6 here: unscaled they would be 0 or a few bits."""
    image, image_pred = images(2, 64)
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(3, 96, 3), nn.ReLU(), nn.Conv2d(96, 64, 3))
    expected, exact = value_and_gradient(PerceptualLoss(lambda x: [net(x)]), image, image_pred)
    loss = PerceptualLoss(_Listed(copy.deepcopy(net)), execution=Execution(dtype=dtype, chunk=chunk))
    assert next(loss.backbones.parameters()).dtype == dtype
    value, gradient = value_and_gradient(loss, image, image_pred)
    assert value.dtype == gradient.dtype == torch.float32 and gradient.isfinite().all()
    torch.testing.assert_close(value, expected, rtol=0.02, atol=0)
    assert (gradient - exact).norm() < 0.1 * exact.norm()  # signs of small differences flip
    torch.testing.assert_close(loss(image, image_pred, pairwise=True).diagonal().mean(), value, rtol=1e-3, atol=0)


class _Listed(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x):
        return [self.net(x)]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_pairwise_is_the_loop_and_encodes_once(criterion):
    image, image_pred = images(3)[0], images(2, seed=1)[1]
    loss, calls = made(criterion, reduction="none"), []
    expected = torch.stack(
        [torch.cat([loss(image[i : i + 1], image_pred[j : j + 1]) for j in range(2)]) for i in range(3)]
    )
    loss.backbones[0].b.register_forward_hook(lambda *_: calls.append(1))
    for target in (image, loss.encode(image)):
        calls.clear()
        matrix = loss(target, image_pred, pairwise=True)
        assert matrix.shape == (3, 2) and len(calls) == (2 if target is image else 1)
        torch.testing.assert_close(matrix, expected)
    upstream = torch.arange(6.0).view(3, 2)
    got, wanted = (torch.autograd.grad(m, image_pred, upstream)[0] for m in (matrix, expected))
    torch.testing.assert_close(got, wanted)
    assert loss(image[:0], image_pred, pairwise=True).shape == (0, 2)
    with pytest.raises(ValueError, match="image_pred: expected the shape of image"):
        loss(image, image_pred[..., 1:], pairwise=True)


def test_the_targets_features_are_free_after_the_forward():
    image, image_pred = images()
    loss, seen = made(), []
    loss.backbones[0].b.register_forward_hook(lambda m, i, output: seen.append(weakref.ref(output)))
    value = loss(image, image_pred)
    assert seen[0]() is None  # L1's kernels keep signs; the reference keeps the differences
    value.backward()


def test_distributed_data_parallel_with_a_frozen_trunk(tmp_path):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder, self.loss = nn.Conv2d(3, 3, 1), made()

        def forward(self, image):
            return self.loss(image, self.decoder(image))

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Model())
        model(images()[0]).backward()
        assert model.module.decoder.weight.grad.abs().sum() > 0
        assert all(p.grad is None for p in model.module.loss.backbones.parameters())
    finally:
        dist.destroy_process_group()


@needs_torchvision
def test_taps_by_torchvisions_names_and_indices():
    by_name = PerceptualLoss("vgg11", layers=["relu1_1", "relu2_1"], pretrained=False)
    for layers in (["features.1", "features.4"], [1, 4]):
        assert PerceptualLoss("vgg11", layers=layers, pretrained=False).backbones[0].taps == by_name.backbones[0].taps
    assert PerceptualLoss("resnet18", layers=["layer1"], pretrained=False).backbones[0].taps == ("layer1",)
    with pytest.raises(ValueError, match="layers: vgg11 has no 99; the names there are conv1_1"):
        PerceptualLoss("vgg11", layers=[99], pretrained=False)
    with pytest.raises(ValueError, match="layers: expected one or more different names"):
        PerceptualLoss("vgg11", layers=[1, "relu1_1"], pretrained=False)


@needs_torchvision
@needs_lpips
@pytest.mark.parametrize("version", ["0.0", "0.1"])
@pytest.mark.parametrize(("net", "name"), [("alex", "alexnet"), ("squeeze", "squeezenet1_1"), ("vgg", "vgg16")])
def test_lpips_agrees_with_the_package_on_the_same_random_network(net, name, version, monkeypatch):
    import lpips
    import torchvision

    torch.manual_seed(3)
    models = lpips.pretrained_networks.tv  # without the classifiers, which are 100 M numbers
    if net == "vgg":
        layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
        monkeypatch.setattr(models, "vgg16", lambda pretrained: types.SimpleNamespace(features=layers))
    else:
        model = getattr(torchvision.models, name)(weights=None)
        monkeypatch.setattr(models, name, lambda pretrained=False, weights=None: model)
    theirs = lpips.LPIPS(net=net, pnet_rand=True, version=version, verbose=False)
    monkeypatch.undo()
    folder = os.path.join(os.path.dirname(lpips.__file__), "weights", "v0.0", f"{net}.pth")
    extra = {} if version == "0.1" else {"lin_weights": folder, "normalize": False}
    ours = PerceptualLoss(name, criterion="lpips", pretrained=False, input_range=(-1, 1), reduction="none", **extra)
    values = [v for k, v in theirs.net.state_dict().items()]
    ours.backbones[0].load_state_dict(dict(zip(ours.backbones[0].state_dict(), values, strict=True)))
    image, image_pred = (2 * t.detach() - 1 for t in images(2, 64))
    image_pred.requires_grad_()
    mine, reference = ours(image, image_pred), theirs(image_pred, image).flatten()
    torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-7)
    ours_g, theirs_g = (torch.autograd.grad(v.sum(), image_pred)[0] for v in (mine, reference))
    finite = theirs_g.isfinite()  # theirs is NaN where a pixel of a layer is 0 in all channels
    torch.testing.assert_close(ours_g[finite], theirs_g[finite], rtol=1e-3, atol=1e-6 * theirs_g[finite].abs().max())
    assert ours_g.isfinite().all()
    state = ours.lins.state_dict()
    assert len(state) == len(ours.backbones[0].taps)


BAD = [
    ({"execution": 3}, TypeError, "execution: expected an Execution, got int"),
    ({"lin_weights": False}, ValueError, "lin_weights: only criterion='lpips' has them"),
    ({"criterion": "lpips"}, ValueError, "lin_weights: lpips has weights for alexnet, .*not for a callable"),
    ({"criterion": "lpips", "lin_weights": 3}, TypeError, "lin_weights: expected None .*got int"),
    ({"criterion": "lpips", "lin_weights": "none.pth"}, FileNotFoundError, "lin_weights: there is no weights file"),
]


@pytest.mark.parametrize(("options", "error", "match"), BAD)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        PerceptualLoss(twice_pooled, **options)


def test_bad_executions_and_lin_files(tmp_path):
    for options, error, match in (
        ({"dtype": torch.int8}, ValueError, "execution: expected a floating-point dtype"),
        ({"compile": 1.5}, TypeError, "execution: expected compile to be"),
        ({"chunk": 0}, ValueError, "execution: expected chunk >= 1"),
        ({"chunk": 1.0}, TypeError, "execution: expected chunk to be a number"),
    ):
        with pytest.raises(error, match=match):
            Execution(**options)
    torch.save({"weight": torch.ones(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="lin_weights: .* has no lin0.model.1.weight"):
        PerceptualLoss(twice_pooled, criterion="lpips", lin_weights=tmp_path / "other.pth")
    image, image_pred = images()
    loss = PerceptualLoss(twice_pooled, criterion="lpips", lin_weights=[torch.ones(3), torch.ones(4)])
    with pytest.raises(ValueError, match=r"lin_weights\[1\]: expected shape \(3,\)"):
        loss(image, image_pred)
    ones = PerceptualLoss(twice_pooled, criterion="lpips", lin_weights=False)
    given = PerceptualLoss(twice_pooled, criterion="lpips", lin_weights=[torch.ones(3), torch.ones(1, 3, 1, 1)])
    torch.testing.assert_close(ones(image, image_pred), given(image, image_pred))


def test_pieces_under_inference_mode():
    """A prediction that requires a gradient gets its value, and no gradient is made."""
    image, image_pred = images(4)
    expected = made()(image, image_pred)
    with torch.inference_mode():
        got = made(execution=Execution(chunk=2))(image, image_pred.requires_grad_())
    torch.testing.assert_close(got, expected)
    assert not got.requires_grad


def test_pairwise_is_a_flag_and_needs_one_device():
    image, image_pred = images(2)
    for value in (2.5, [], "yes", None):
        with pytest.raises(TypeError, match="pairwise: expected True or False"):
            made()(image, image_pred, pairwise=value)
    with pytest.raises(ValueError, match="image_pred: expected it on the device of image"):
        made()(image, image_pred.to("meta"), pairwise=True)
