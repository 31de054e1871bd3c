"""taming-transformers' LPIPS, of its and latent diffusion's LPIPSWithDiscriminator, by :func:`fastloss.lpips_distance`.

Where taming is installed it is a subclass of its class, with its constructor; else it stands alone, on torchvision's
VGG16, with the same names in its state_dict.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from ..perceptual import lpips_distance
from ..perceptual.criteria import load_lins
from ._common import as_theirs, library

_FILE = os.path.join("taming", "modules", "autoencoder", "lpips", "vgg.pth")  # where taming keeps its weights
_SLICES = (0, 4, 9, 16, 23, 30)  # of VGG16's layers: each ends with relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
_CHANNELS = (64, 128, 256, 512, 512)


class _ScalingLayer(nn.Module):
    """From [-1, 1] to ImageNet's mean and deviation."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        return (image - self.shift) / self.scale


class _VGG16(nn.Module):
    """Five slices of torchvision's layers, whose numbers their parameters keep."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        for i, (first, end) in enumerate(zip(_SLICES, _SLICES[1:], strict=False)):
            part = nn.Sequential()
            for number in range(first, end):
                part.add_module(str(number), layers[number])
            self.add_module(f"slice{i + 1}", part)

    def forward(self, image: Tensor) -> list[Tensor]:
        features = []
        for part in self.children():
            image = part(image)
            features.append(image)
        return features


class _NetLinLayer(nn.Module):
    def __init__(self, channels: int, use_dropout: bool) -> None:
        super().__init__()
        dropout = [nn.Dropout()] if use_dropout else []
        self.model = nn.Sequential(*dropout, nn.Conv2d(channels, 1, 1, bias=False))


def _pretrained_layers() -> Any:
    from torchvision import models

    return models.vgg16(weights=models.VGG16_Weights.IMAGENET1K_V1).features


class _LPIPSAlone(nn.Module):
    def __init__(self, use_dropout: bool = True) -> None:
        super().__init__()
        self.scaling_layer = _ScalingLayer()
        self.chns = list(_CHANNELS)
        self.net = _VGG16(_pretrained_layers())
        for i, channels in enumerate(_CHANNELS):
            self.add_module(f"lin{i}", _NetLinLayer(channels, use_dropout))
        self.load_from_pretrained()
        self.requires_grad_(False)

    def load_from_pretrained(self, name: str = "vgg_lpips") -> None:
        """The weights of taming's own file where it is, else of the lpips package, from which taming's is."""
        lins = load_lins(_FILE if os.path.exists(_FILE) else None, "vgg16")
        for i, lin in enumerate(lins or ()):
            layer: Any = self.get_submodule(f"lin{i}")
            with torch.no_grad():
                layer.model[-1].weight.copy_(lin)


_theirs = library("taming.modules.losses.lpips")
_Base: Any = _LPIPSAlone if _theirs is None else _theirs.LPIPS


class LPIPS(_Base):
    """taming's module: ``LPIPS().eval()(input, target)``, ``[N, 1, 1, 1]``, of images in [-1, 1].

    In training mode, in which its dropout drops, PyTorch's operators compute it, as there. A pixel whose features are
    all 0 gets a gradient of 0, where taming's is NaN.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        features, targets = (list(self.net(self.scaling_layer(image))) for image in (input, target))
        layers = [self.get_submodule(f"lin{i}").model for i in range(len(features))]
        if any(isinstance(m, nn.Dropout) and m.training for layer in layers for m in layer):
            return _dropped(features, targets, layers)
        value = lpips_distance(features, targets, [layer[-1].weight for layer in layers])
        return as_theirs(value.view(-1, 1, 1, 1), *features)


def _dropped(features: list[Tensor], targets: list[Tensor], layers: list[Any]) -> Tensor:
    """With dropout, which falls on each squared difference."""
    total: Any = 0
    for feature, wanted, layer in zip(features, targets, layers, strict=True):
        one, two = (f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (feature, wanted))
        total = total + layer((one - two).square()).mean((2, 3), keepdim=True)
    return total


SWAPS = {"taming.modules.losses.lpips.LPIPS": LPIPS}
LEFT: dict[str, str] = {}
