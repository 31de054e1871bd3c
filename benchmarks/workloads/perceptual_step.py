"""Loss and gradient of predicted images through VGG16, with the same random weights for everybody who computes it."""

from __future__ import annotations

import contextlib
import functools
import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.workloads.items import shape_of
from fastloss import Execution, PerceptualLoss

TAPS = {"l1": (3, 8, 15), "lpips": (3, 8, 15, 22, 29)}  # indices into vgg16.features, all ReLUs
EXECUTIONS = {
    "channels_last": Execution(channels_last=True),
    "chunk=1": Execution(chunk=1),
    "bfloat16 channels_last": Execution(dtype=torch.bfloat16, channels_last=True),
    "bfloat16 channels_last compiled": Execution(dtype=torch.bfloat16, channels_last=True, compile=True),
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Loss = Callable[[Tensor, Tensor], Tensor]


def network(criterion: str) -> nn.Sequential:
    """vgg16.features up to the last tap, random, the same each time."""
    import torchvision

    torch.manual_seed(0)
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])[: TAPS[criterion][-1] + 1]
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layers.eval()


class Taps(nn.Module):
    """The features as users of plain torch take them."""

    def __init__(self, criterion: str, device: str, frozen: bool, clone: bool, inplace: bool = True) -> None:
        super().__init__()
        self.layers, self.taps, self.clone = network(criterion).to(device), TAPS[criterion], clone
        self.layers.requires_grad_(not frozen)
        for layer in self.layers:
            if isinstance(layer, nn.ReLU):
                layer.inplace = inplace
        self.register_buffer("mean", torch.tensor(MEAN, device=device).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD, device=device).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        x, found = (x - self.mean) / self.std, []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.taps:
                found.append(x.clone() if self.clone else x)
        return found


def l1(features: list[Tensor], targets: list[Tensor]) -> Tensor:
    return torch.stack([nn.functional.l1_loss(f, t) for f, t in zip(features, targets, strict=True)]).sum()


def article(device: str) -> Loss:
    taps = Taps("l1", device, frozen=False, clone=False)

    def loss(image: Tensor, image_pred: Tensor) -> Tensor:
        taps.zero_grad(set_to_none=True)
        return l1(taps(image_pred), taps(image))

    loss.unfrozen = list(taps.parameters())  # type: ignore[attr-defined]
    return loss


def basicsr_style(device: str) -> Loss:
    taps = Taps("l1", device, frozen=True, clone=True)
    return lambda image, image_pred: l1(taps(image_pred), taps(image.detach()))


def piq_style(device: str) -> Loss:
    taps = Taps("l1", device, frozen=True, clone=False)

    def loss(image: Tensor, image_pred: Tensor) -> Tensor:
        pairs = zip(taps(image_pred), taps(image), strict=True)
        return torch.cat([(f - t).abs().mean((2, 3)) for f, t in pairs], 1).sum(1).mean()

    return loss


def compiled(device: str) -> Loss:
    taps = Taps("l1", device, frozen=True, clone=False, inplace=False)

    @torch.compile
    def loss(image: Tensor, image_pred: Tensor) -> Tensor:
        with torch.no_grad():
            targets = taps(image)
        return l1(taps(image_pred), targets)

    return loss


def lpips_package(device: str) -> Loss:
    import lpips

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arguments that torchvision has renamed since
        model = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).to(device)
    layers = [m for m in model.net.modules() if isinstance(m, nn.Conv2d)]
    for own, shared in zip(layers, (m for m in network("lpips") if isinstance(m, nn.Conv2d)), strict=True):
        own.load_state_dict(shared.state_dict())
    return lambda image, image_pred: model(image_pred, image, normalize=True).mean()


def fastloss_step(device: str, criterion: str, execution: Execution) -> Loss:
    loss = PerceptualLoss("vgg16", criterion=criterion, pretrained=False, execution=execution)
    values = list(network(criterion).state_dict().values())
    loss.backbones[0].load_state_dict(dict(zip(loss.backbones[0].state_dict(), values, strict=True)))
    return loss.to(device)


def who(criterion: str, device: str) -> list[tuple[dict, str]]:
    """(options, provider) of the rows, the first of which is what the others' values are compared with."""
    rivals = ["lpips"] if criterion == "lpips" else ["eager", "basicsr-style", "piq-style", "torch.compile"]
    forms = [name for name in EXECUTIONS if device == "cuda" or "bfloat16" not in name]
    main = {"criterion": criterion}
    return [(main, name) for name in (*rivals, "fastloss")] + [(main | {"execution": f}, "fastloss") for f in forms]


def make(options: dict, provider: str, device: str) -> Loss:
    if provider == "fastloss":
        return fastloss_step(device, options["criterion"], EXECUTIONS.get(options.get("execution", ""), Execution()))
    forms = {"eager": article, "basicsr-style": basicsr_style, "piq-style": piq_style, "torch.compile": compiled}
    return (forms | {"lpips": lpips_package})[provider](device)


def draw(shape: str, device: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    image = torch.rand(shape_of(shape))
    pred = (image + 0.1 * torch.randn(image.shape)).clamp(0, 1)
    return image.to(device), pred.to(device).requires_grad_()


def step_of(row: dict, device: str) -> tuple[Callable[[], Any], Callable[[], float]]:
    """The step of a row, and its loss alone."""
    loss = make(json.loads(row["options"]), row["provider"], device)
    inputs = draw(row["shape"], device)
    wrt = [inputs[1], *getattr(loss, "unfrozen", [])]
    half = contextlib.nullcontext if device == "cpu" else functools.partial(torch.autocast, device, torch.bfloat16)

    def value() -> Tensor:
        with half():
            return loss(*inputs)

    return lambda: torch.autograd.grad(value(), wrt), lambda: value().item()
