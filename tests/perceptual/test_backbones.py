"""PerceptualLoss with torchvision's networks: taps, weights, agreement with torchvision's own forward."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import urllib.error

import pytest
import torch
import torch.nn.functional as F

from fastloss import PerceptualLoss
from fastloss.perceptual.backbones import BACKBONES, DEFAULT_TAPS, Backbone, read_weights
from tests.perceptual.test_perceptual_loss import MEAN, STD, images, twice_pooled


def torchvision_imports() -> bool:
    """Being installed is not enough: beside a torch of another build the import fails."""
    try:
        importlib.import_module("torchvision.models")
    except Exception:
        return False
    return True


needs_torchvision = pytest.mark.skipif(not torchvision_imports(), reason="named backbones come from torchvision")
needs_safetensors = pytest.mark.skipif(
    importlib.util.find_spec("safetensors") is None, reason="pip install safetensors"
)


@needs_torchvision
def test_the_default_is_the_hand_written_vgg16_in_value_and_gradient():
    import torchvision

    torch.manual_seed(9)
    loss = PerceptualLoss(pretrained=False, save_networks=True)
    assert loss.backbones[0].taps == ("relu1_2", "relu2_2", "relu3_3")
    layers = torchvision.models.vgg.make_layers([64, 64, "M", 128, 128, "M", 256, 256, 256])  # features[:16]
    assert len(layers) == 16 == len(loss.backbones[0].steps)
    layers.load_state_dict(dict(zip(layers.state_dict(), loss.state_dict().values(), strict=True)))

    def taps(x):
        x, out = (x - MEAN) / STD, []
        for i, layer in enumerate(layers):
            x = layer(x)
            if i in (3, 8, 15):  # cloned, since torchvision's ReLUs overwrite
                out.append(x.clone())
        return out

    image, image_pred = images(2, 24)
    expected = sum(F.l1_loss(f, t) for f, t in zip(taps(image_pred), taps(image), strict=True))
    value = loss(image, image_pred)
    torch.testing.assert_close(value, expected)
    (ours,), (eager,) = (torch.autograd.grad(v, image_pred) for v in (value, expected))
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-9)
    weight = loss.backbones[0].steps["conv1_1"].weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)  # torchvision's initialisation


@needs_torchvision
@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_agrees_with_torchvision(name, monkeypatch):
    """Same weights through torchvision's own forward, read by hooks, against our taps."""
    import torchvision

    extra = {"transform_input": True, "init_weights": False} if name == "inception_v3" else {}
    with torch.device("meta" if name.startswith("vgg") else "cpu"):  # the VGGs' classifiers are 120 M numbers
        model = getattr(torchvision.models, name)(weights=None, **extra).eval()
    if name.startswith("vgg"):
        model.features.to_empty(device="cpu").apply(lambda m: getattr(m, "reset_parameters", int)())
    state = model.state_dict()
    monkeypatch.setattr("fastloss.perceptual.backbones._download", lambda _: state)
    ours = Backbone(name).eval()
    size = 80 if name == "inception_v3" else 64
    image = torch.rand(1, 3, size, size)
    features = ours(image)
    hidden = {"vgg11": (1, 4, 9), "vgg13": (3, 8, 13), "vgg16": (3, 8, 15), "vgg19": (3, 8, 17)}
    hidden |= {"vgg11_bn": (2, 6, 13), "vgg13_bn": (5, 12, 19), "vgg16_bn": (5, 12, 22), "vgg19_bn": (5, 12, 25)}
    hidden |= {"alexnet": (1, 4, 7, 9, 11), "squeezenet1_1": (1, 4, 7, 9, 10, 11, 12), "convnext_tiny": (1, 3, 5)}
    kept = {}

    def keep(index):
        return lambda module, inputs, output: kept.__setitem__(index, output.clone())

    for tap in DEFAULT_TAPS[name] if name not in hidden else hidden[name]:
        module = model.features[tap] if name in hidden else getattr(model, tap)
        module.register_forward_hook(keep(tap))
    with torch.no_grad():
        model.features(image) if name in hidden else model(image)
        assert len(kept) == len(features) == len(ours.taps)
        for ours_f, theirs in zip(features, kept.values(), strict=True):
            torch.testing.assert_close(ours_f, theirs, rtol=1e-4, atol=1e-5)


@needs_torchvision
def test_taps_are_chosen_by_name_and_nothing_runs_after_the_last():
    loss = PerceptualLoss("squeezenet1_1", layers=["fire2", "conv1"], layer_weights=[2.0, 0.5], pretrained=False)
    assert list(loss.backbones[0].steps) == ["conv1", "relu1", "pool1", "fire2"]
    image, image_pred = images(2, 32)
    assert [f.shape[1] for f in loss.encode(image)[0]] == [128, 64]  # in the order asked for
    conv = loss.encode(image)[0][1]
    assert (conv < 0).any()  # the ReLU after it is not in-place
    fire, first = (F.l1_loss(p, t) for p, t in zip(loss._features(image_pred)[0], loss.encode(image)[0], strict=True))
    torch.testing.assert_close(loss(image, image_pred), 2.0 * fire + 0.5 * first)


@needs_torchvision
def test_several_named_backbones():
    loss = PerceptualLoss(
        ["squeezenet1_1", "resnet18", twice_pooled],
        layers=[["relu1"], ["relu", "layer1"], None],
        layer_weights=[None, [1.0, 2.0], None],
        backbone_weights=[1.0, 0.0, 0.0],
        pretrained=False,
    )
    image, image_pred = images(1, 32)
    alone = PerceptualLoss(loss.backbones[0])
    torch.testing.assert_close(loss(image, image_pred), alone(image, image_pred))
    assert [len(t) for t in loss.encode(image)] == [1, 2, 2]


@needs_torchvision
@pytest.mark.parametrize("suffix", [".pth", pytest.param(".safetensors", marks=needs_safetensors)])
def test_weights_from_a_file(tmp_path, suffix):
    import torchvision

    def save(state):
        if suffix == ".pth":
            return torch.save(state, path)
        from safetensors.torch import save_file

        return save_file(state, path)

    torch.manual_seed(10)
    model, path = torchvision.models.squeezenet1_1(weights=None), tmp_path / f"weights{suffix}"
    state = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("features.")}  # no classifier needed
    save(state)
    loss = PerceptualLoss("squeezenet1_1", layers=["fire3"], pretrained=path)
    loss = pickle.loads(pickle.dumps(loss))
    image, _ = images(1, 32)
    with torch.no_grad():
        torch.testing.assert_close(loss.encode(image)[0][0], model.features[:5]((image - MEAN) / STD))
    del state["features.3.squeeze.bias"]
    save(state)
    with pytest.raises(ValueError, match=r"(?s)does not fit squeezenet1_1: at features.3: .*squeeze.bias"):
        PerceptualLoss("squeezenet1_1", pretrained=path)
    path.write_bytes(b"not weights at all")
    with pytest.raises(ValueError, match="pretrained: .* is no readable weights file"):
        PerceptualLoss("squeezenet1_1", pretrained=str(path))


WEIGHTS = {"a.weight": torch.arange(3.0), "a.bias": torch.ones(1)}
WRAPPED = {f"module.{name}": value for name, value in WEIGHTS.items()}


@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        {"state_dict": WEIGHTS, "epoch": 3},
        {"model": WEIGHTS, "optimizer": {"state": {}}, "args": {"lr": 1e-3}},
        {"model_state_dict": WEIGHTS},
        {"params": WEIGHTS},
        {"params_ema": WEIGHTS, "params": {"a.weight": torch.zeros(3)}},
        {"params": {"a.weight": torch.zeros(3)}, "params_ema": WEIGHTS},
        {"state_dict": {"model": WEIGHTS, "step": 1}},
        WRAPPED,
        {"model": WRAPPED},
        {f"_orig_mod.{name}": value for name, value in WEIGHTS.items()},
        {f"module._orig_mod.{name}": value for name, value in WEIGHTS.items()},
    ],
    ids=lambda content: "-".join(content),
)
def test_weights_are_found_where_trainers_put_them(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    state = read_weights(str(tmp_path / "weights.pth"), "pretrained")
    assert list(state) == list(WEIGHTS)
    assert all(torch.equal(state[name], value) for name, value in WEIGHTS.items())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "but a list"),
        (torch.ones(2), "but a Tensor"),
        ({"net": WEIGHTS, "epoch": 3}, "but a dict of 'net' (dict), 'epoch' (int)"),
        ({"model": {"generator": WEIGHTS}}, "but a dict of 'generator' (dict) under 'model'"),
        ({"a.weight": torch.ones(1), "lr": 0.1}, "but a dict of 'lr' (float), 'a.weight' (Tensor)"),
        ({"state_dict": {"model": {"x": 1}}}, "but a dict of 'x' (int) under 'state_dict' 'model'"),
        ({str(i): i for i in range(20)}, "but a dict of " + "".join(f"'{i}' (int), " for i in range(8)) + "..."),
    ],
    ids=str,
)
def test_a_file_without_weights_says_what_it_holds(tmp_path, content, said):
    torch.save(content, tmp_path / "weights.pth")
    wanted = "holds no state dict (names and tensors, at the top or under 'state_dict', 'model_state_dict', 'model', "
    with pytest.raises(ValueError) as raised:
        read_weights(str(tmp_path / "weights.pth"), "pretrained")
    assert wanted in str(raised.value) and str(raised.value).endswith(said)


@needs_torchvision
def test_a_nested_checkpoint_of_a_wrapped_model_is_a_backbone(tmp_path):
    import torchvision

    torch.manual_seed(11)
    model = torchvision.models.squeezenet1_1(weights=None)
    wrapped = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": wrapped, "epoch": 9}, tmp_path / "checkpoint.pth")
    loss = PerceptualLoss("squeezenet1_1", layers=["fire3"], pretrained=tmp_path / "checkpoint.pth")
    image, _ = images(1, 32)
    with torch.no_grad():
        torch.testing.assert_close(loss.encode(image)[0][0], model.features[:5]((image - MEAN) / STD))
    torch.save({"model": {f"net.{name}": value for name, value in model.state_dict().items()}}, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"(?s)does not fit squeezenet1_1: at .*; its names are net.features.0.weight"):
        PerceptualLoss("squeezenet1_1", pretrained=tmp_path / "net.pth")


@needs_torchvision
def test_a_failed_download_says_what_to_pass_instead(monkeypatch):
    from torchvision.models import _api

    def fail(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(_api, "load_state_dict_from_url", fail)
    with pytest.raises(RuntimeError) as raised:
        PerceptualLoss()
    for words in (
        "VGG16_Weights.IMAGENET1K_V1",
        "https://download.pytorch.org/models/vgg16-",
        "no route to host",
        "pretrained=PATH",
        "pretrained=False",
        "any callable",
    ):
        assert words in str(raised.value)
    assert isinstance(raised.value.__cause__, urllib.error.URLError)


@needs_torchvision
def test_bad_options_of_named_backbones(tmp_path):
    names = "layers: squeezenet1_1 has no 'relu9_9'; the names there are conv1, relu1, pool1, fire2"
    torch.save([1, 2], tmp_path / "list.pth")
    for options, error, match in (
        ({"layers": ["relu9_9"]}, ValueError, names),
        ({"layers": "relu1"}, TypeError, "layers: expected a list of names, got str"),
        ({"layers": []}, ValueError, "layers: expected one or more different names"),
        ({"layers": ["relu1", "relu1"]}, ValueError, "layers: expected one or more different names"),
        ({"layers": ["relu1"], "layer_weights": [1.0, 2.0]}, ValueError, "layer_weights: expected as many entries as"),
        ({"pretrained": str(tmp_path / "none.pth")}, FileNotFoundError, "pretrained: there is no weights file"),
        ({"pretrained": tmp_path / "list.pth"}, ValueError, "pretrained: .* holds no state dict"),
        ({"pretrained": None}, TypeError, "pretrained: expected True"),
    ):
        with pytest.raises(error, match=match):
            PerceptualLoss(**({"backbones": "squeezenet1_1", "pretrained": False} | options))
    loss = PerceptualLoss("squeezenet1_1", pretrained=False, normalize=False)
    grey = torch.zeros(1, 1, 32, 32)
    with pytest.raises(ValueError, match="image: expected 3 channels"):
        loss(grey, grey)
    tiny = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match="image: 8 x 8 is too small for squeezenet1_1, at pool3"):
        loss(tiny, tiny)
