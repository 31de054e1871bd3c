"""BasicSR's pixel and total variation losses (BasicSR 1.4): L1Loss, MSELoss, CharbonnierLoss and WeightedTVLoss.

They need no BasicSR. ``fastloss.patch("basicsr")`` swaps the names in its modules; its registry, which options files
refer to, holds the classes themselves: ``LOSS_REGISTRY._obj_map.update(L1Loss=...)`` puts these there.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from ..image import pixel_loss, smoothness_loss
from ._common import as_theirs

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


def _checked(reduction: str, choices: tuple[str, ...]) -> str:
    if reduction not in choices:
        raise ValueError(f"reduction: expected one of {choices}, got {reduction!r}")
    return reduction


SWAPS = {
    "basicsr.losses.basic_loss.L1Loss": L1Loss,
    "basicsr.losses.basic_loss.MSELoss": MSELoss,
    "basicsr.losses.basic_loss.CharbonnierLoss": CharbonnierLoss,
    "basicsr.losses.basic_loss.WeightedTVLoss": WeightedTVLoss,
}
LEFT = {
    "basicsr.losses.basic_loss.PerceptualLoss": "its own network and weight files",
    "basicsr.utils.registry.LOSS_REGISTRY": "holds the classes themselves, see fastloss/compat/basicsr.py",
}
