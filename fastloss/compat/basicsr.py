"""BasicSR's losses (BasicSR 1.4): L1Loss, MSELoss, CharbonnierLoss, WeightedTVLoss and PerceptualLoss.

They need no BasicSR. ``fastloss.patch("basicsr")`` swaps the names in its modules, and the classes in its registry,
which options files refer to.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor, nn

from ..image import pixel_loss, smoothness_loss
from ..perceptual import backbones, feature_distance, gram_matrix, style_distance
from ._common import as_theirs, library

_REDUCTIONS = ("none", "mean", "sum")


class _PixelLoss(nn.Module):
    """``loss_weight`` times the distance of all pixels, times a weight of each where one is given.

    The weight has as many dimensions as the images, and one channel or all; a mean with it is the weighted sum over the
    sum of weights (a weight of one channel counts for each of them, one for the whole batch counts once). All weights 0
    give NaN, as they do in BasicSR.
    """

    p: float | str

    def __init__(self, loss_weight: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self.reduction = _checked(reduction, _REDUCTIONS)

    def _options(self) -> dict[str, Any]:
        return {}

    def forward(self, pred: Tensor, target: Tensor, weight: Tensor | None = None, **kwargs: Any) -> Tensor:
        reduction = "sum" if weight is not None and self.reduction == "mean" else self.reduction
        if weight is not None:
            assert weight.dim() == pred.dim() and weight.shape[1] in (1, pred.shape[1])  # the error that BasicSR has
        value = pixel_loss(target, pred, p=self.p, weight=weight, reduction=reduction, **self._options())
        if weight is not None and self.reduction == "mean":
            value = value / (weight.sum(dtype=value.dtype) * (pred.shape[1] // weight.shape[1]))
        return self.loss_weight * as_theirs(value, pred, target)


class L1Loss(_PixelLoss):
    """BasicSR's ``L1Loss(loss_weight=1.0, reduction="mean")``: |pred - target|."""

    p = 1


class MSELoss(_PixelLoss):
    """BasicSR's ``MSELoss(loss_weight=1.0, reduction="mean")``: (pred - target)^2."""

    p = 2


class CharbonnierLoss(_PixelLoss):
    """BasicSR's ``CharbonnierLoss(loss_weight=1.0, reduction="mean", eps=1e-12)``: sqrt((pred - target)^2 + eps)."""

    p = "charbonnier"

    def __init__(self, loss_weight: float = 1.0, reduction: str = "mean", eps: float = 1e-12) -> None:
        super().__init__(loss_weight, reduction)
        self.eps = eps

    def _options(self) -> dict[str, Any]:
        return {"eps": math.sqrt(self.eps)}  # fastloss squares it


class WeightedTVLoss(L1Loss):
    """BasicSR's ``WeightedTVLoss(loss_weight=1.0, reduction="mean")``: absolute differences of neighbouring pixels.

    A difference has the weight of its first pixel; each direction has its own mean, or sum.
    """

    def __init__(self, loss_weight: float = 1.0, reduction: str = "mean") -> None:
        super().__init__(loss_weight, _checked(reduction, ("mean", "sum")))

    def forward(self, pred: Tensor, weight: Tensor | None = None) -> Tensor:  # type: ignore[override]
        value = smoothness_loss(pred, weight=weight, convention="basicsr", reduction=self.reduction)
        if weight is not None and self.reduction == "mean":  # one for the whole batch counts once
            value = value * (pred.shape[0] // weight.shape[0])
        return self.loss_weight * as_theirs(value, pred)


_VGG_FILE = os.path.join("experiments", "pretrained_models", "vgg19-dcbb9e9d.pth")  # where BasicSR looks for weights


class _VGGFeatures(nn.Module):
    """BasicSR's VGGFeatureExtractor where BasicSR is not installed: torchvision's layers up to the last one wanted."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, layer_name_list: list[str], vgg_type: str = "vgg19", use_input_norm: bool = True, range_norm: bool = False
    ) -> None:
        super().__init__()
        self.layer_name_list, self.use_input_norm, self.range_norm = layer_name_list, use_input_norm, range_norm
        steps = backbones._steps(vgg_type)
        names = [name for name, _, _ in steps]
        for name in layer_name_list:
            if name not in names:
                raise ValueError(f"layer_weights: {vgg_type} has {', '.join(names)}, no {name!r}")
        backbones._load(steps, vgg_type, _VGG_FILE if vgg_type == "vgg19" and os.path.exists(_VGG_FILE) else True)
        end = 1 + max(names.index(name) for name in layer_name_list)
        self.vgg_net = nn.Sequential()
        for name, _, layer in steps[:end]:
            self.vgg_net.add_module(name, layer)
        self.eval().requires_grad_(False)
        if use_input_norm:
            self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
            self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = (x + 1) / 2 if self.range_norm else x
        x = (x - self.mean) / self.std if self.use_input_norm else x
        found = {}
        for name, layer in self.vgg_net.named_children():
            x = layer(x)
            if name in self.layer_name_list:
                found[name] = x.clone()  # before a ReLU in place
        return found


class PerceptualLoss(nn.Module):
    """BasicSR's ``PerceptualLoss``: ``(percep, style)``, each None where its weight is 0.

    By :func:`fastloss.feature_distance` and :func:`fastloss.style_distance`, on BasicSR's network where BasicSR is
    installed, else on its own, with the same names in its state_dict. The target gets no gradient.

    Args:
        layer_weights: weights by the names of layers, such as ``{"conv5_4": 1.0}``.
        vgg_type, use_input_norm, range_norm: of the network; `range_norm` for images in [-1, 1].
        perceptual_weight, style_weight: of the two results.
        criterion: ``"l1"``, ``"l2"`` or ``"fro"``, the Frobenius norm of each layer's difference.
    """

    def __init__(
        self,
        layer_weights: dict[str, float],
        vgg_type: str = "vgg19",
        use_input_norm: bool = True,
        range_norm: bool = False,
        perceptual_weight: float = 1.0,
        style_weight: float = 0.0,
        criterion: str = "l1",
    ) -> None:
        super().__init__()
        if criterion not in ("l1", "l2", "fro"):
            raise NotImplementedError(f"{criterion} criterion has not been supported.")
        self.perceptual_weight = perceptual_weight
        self.style_weight = style_weight
        self.layer_weights = layer_weights
        theirs = library("basicsr.archs.vgg_arch")
        network: Any = _VGGFeatures if theirs is None else theirs.VGGFeatureExtractor
        self.vgg = network(
            layer_name_list=list(layer_weights), vgg_type=vgg_type, use_input_norm=use_input_norm, range_norm=range_norm
        )
        self.criterion_type = criterion

    def forward(self, x: Tensor, gt: Tensor) -> tuple[Tensor | None, Tensor | None]:
        found, wanted = self.vgg(x), self.vgg(gt.detach())
        features, targets = list(found.values()), [wanted[name] for name in found]
        weights = [self.layer_weights[name] for name in found]
        percep = style = None
        if self.perceptual_weight > 0:
            percep = self.perceptual_weight * self._distance(features, targets, weights)
        if self.style_weight > 0:
            if self.criterion_type == "fro":
                features, targets = ([gram_matrix(f) for f in side] for side in (features, targets))
                style = self.style_weight * self._distance(features, targets, weights)
            else:
                value = style_distance(features, targets, weights=weights, criterion=self.criterion_type)
                style = self.style_weight * as_theirs(value, *features)
        return percep, style

    def _distance(self, features: list[Tensor], targets: list[Tensor], weights: list[float]) -> Tensor:
        if self.criterion_type == "fro":
            pairs = zip(features, targets, weights, strict=True)
            return torch.stack([w * torch.linalg.vector_norm(f - t) for f, t, w in pairs]).sum()
        value = feature_distance(features, targets, weights=weights, criterion=self.criterion_type)
        return as_theirs(value, *features)


def _checked(reduction: str, choices: tuple[str, ...]) -> str:
    if reduction not in choices:
        raise ValueError(f"reduction: expected one of {choices}, got {reduction!r}")
    return reduction


SWAPS = {
    "basicsr.losses.basic_loss.L1Loss": L1Loss,
    "basicsr.losses.basic_loss.MSELoss": MSELoss,
    "basicsr.losses.basic_loss.CharbonnierLoss": CharbonnierLoss,
    "basicsr.losses.basic_loss.WeightedTVLoss": WeightedTVLoss,
    "basicsr.losses.basic_loss.PerceptualLoss": PerceptualLoss,
}
LEFT: dict[str, str] = {}
REGISTRIES = {"basicsr.utils.registry.LOSS_REGISTRY": "_obj_map"}  # what options files refer to
