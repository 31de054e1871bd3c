"""piq's SSIM, MS-SSIM, total variation, content and style losses, LPIPS and DISTS (piq 0.8), by fastloss's losses.

Arguments are checked by piq's own checks, which look at the values too, so that its assertions stand. Networks and
their weights stay piq's: the losses of features are subclasses that compare the features, and their products, here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..image import ms_ssim_loss, smoothness_loss, ssim_loss
from ..perceptual import dists_distance, feature_distance, lpips_distance, style_distance
from ._common import NotServed, as_theirs, check_not_overridden, check_plain, hands_on, required

_theirs, _utils = required("piq"), required("piq.utils")
_validate, _reduce = _utils._validate_input, _utils._reduce
_FULL_SIZE = 256  # of the shorter side: larger images are averaged down to about it before SSIM
_TV: dict[str, int | str] = {"l1": 1, "l2_squared": 2, "l2": "norm"}
_MS_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_SSIMLoss: Any = _theirs.SSIMLoss
_MultiScaleSSIMLoss: Any = _theirs.MultiScaleSSIMLoss
_TVLoss: Any = _theirs.TVLoss
_ContentLoss: Any = _theirs.ContentLoss
_StyleLoss: Any = _theirs.StyleLoss
_LPIPS: Any = _theirs.LPIPS
_DISTS: Any = _theirs.DISTS
_LARGEST_DISTS = 256  # of the shorter side: DISTS shrinks larger images to it


@hands_on("piq.ssim", _theirs.ssim)
def ssim(
    x: Tensor,
    y: Tensor,
    kernel_size: int = 11,
    kernel_sigma: float = 1.5,
    data_range: int | float = 1.0,
    reduction: str = "mean",
    full: bool = False,
    downsample: bool = True,
    k1: float = 0.01,
    k2: float = 0.03,
) -> Any:
    """piq's function: SSIM of whole windows, of images averaged down to about 256 pixels with `downsample`; with `full`
    a list of it and its contrast and structure."""
    assert kernel_size % 2 == 1, f"Kernel size must be odd, got [{kernel_size}]"
    _validate([x, y], dim_range=(4, 5), data_range=(0, data_range))
    _check_real(x, y)
    factor = max(1, round(min(x.shape[2:]) / _FULL_SIZE)) if downsample else 1
    image, target = (F.avg_pool2d(t, factor) if factor > 1 else t for t in (x, y))
    found = []
    for luminance in (True, False)[: 1 + bool(full)]:
        loss = ssim_loss(
            target, image, window=kernel_size, sigma=kernel_sigma, data_range=data_range, padding="valid", k1=k1, k2=k2,
            reduction="none", luminance=luminance,
        )  # fmt: skip
        found.append(as_theirs(_reduce(1 - loss, reduction), x))
    return found if full else found[0]


class SSIMLoss(_SSIMLoss):
    """piq's module: 1 - :func:`ssim`, after the reduction."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        options = {"reduction": self.reduction, "downsample": self.downsample, "k1": self.k1, "k2": self.k2}
        score = ssim(x, y, self.kernel_size, self.kernel_sigma, self.data_range, **options)
        return torch.ones_like(score) - score


@hands_on("piq.multi_scale_ssim", _theirs.multi_scale_ssim)
def multi_scale_ssim(
    x: Tensor,
    y: Tensor,
    kernel_size: int = 11,
    kernel_sigma: float = 1.5,
    data_range: int | float = 1.0,
    reduction: str = "mean",
    scale_weights: Tensor | None = None,
    k1: float = 0.01,
    k2: float = 0.03,
) -> Tensor:
    """piq's function: MS-SSIM of whole windows; sides that are odd at some level are padded by their first pixels."""
    assert kernel_size % 2 == 1, f"Kernel size must be odd, got [{kernel_size}]"
    _validate([x, y], dim_range=(4, 5), data_range=(0, data_range))
    _check_real(x, y)
    weights = torch.tensor(_MS_WEIGHTS, dtype=torch.float64) if scale_weights is None else scale_weights
    if weights.ndim != 1:
        raise NotServed(f"scale_weights of shape {tuple(weights.shape)}")
    levels = (weights if scale_weights is None else weights / weights.sum()).tolist()
    if 0 in levels:
        raise NotServed("scale_weights: one of them is 0")
    loss = ms_ssim_loss(
        y, x, window=kernel_size, sigma=kernel_sigma, data_range=data_range, padding="valid", k1=k1, k2=k2,
        level_weights=levels, odd_sides="repeat", reduction="none",
    )  # fmt: skip
    return as_theirs(_reduce(1 - loss, reduction), x)


class MultiScaleSSIMLoss(_MultiScaleSSIMLoss):
    """piq's module: 1 - :func:`multi_scale_ssim`, after the reduction; its weights are a buffer, ``scale_weights``."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        options = {"reduction": self.reduction, "scale_weights": self.scale_weights, "k1": self.k1, "k2": self.k2}
        score = multi_scale_ssim(x, y, self.kernel_size, self.kernel_sigma, self.data_range, **options)
        return torch.ones_like(score) - score


@hands_on("piq.total_variation", _theirs.total_variation)
def total_variation(x: Tensor, reduction: str = "mean", norm_type: str = "l2") -> Tensor:
    """piq's function: the sum of each image's differences, ``"l1"``, ``"l2_squared"``, or ``"l2"``, its root.

    The gradient of a flat image is 0 with ``"l2"`` too, where piq's is NaN.
    """
    _validate([x], dim_range=(4, 4), data_range=(0, -1))
    _check_real(x)
    if norm_type not in _TV:
        raise NotServed(f"norm_type {norm_type!r}")
    return as_theirs(smoothness_loss(x, p=_TV[norm_type], convention="piq", reduction=reduction), x)


class TVLoss(_TVLoss):
    """piq's module, see :func:`total_variation`."""

    def forward(self, x: Tensor) -> Tensor:
        return total_variation(x, reduction=self.reduction, norm_type=self.norm_type)


def _check_real(*images: Tensor) -> None:
    check_plain(*images)
    if images[0].ndim != 4:
        raise NotServed("complex images")


def _compared(loss: Any, x: Tensor, y: Tensor, style: bool) -> Tensor:
    """Each image's distance of features, or of their products, as piq weights them: means over pixels, sums over
    channels. The gradient reaches both images."""
    _validate([x, y], dim_range=(4, 4), data_range=(0, -1))
    base = _StyleLoss if style else _ContentLoss
    check_not_overridden(loss, base, "compute_distance", *(["gram_matrix"] if style else []))
    if any(weight.numel() != 1 for weight in loss.weights):
        raise NotServed("weights: tensors of several numbers")
    criterion = "l2" if isinstance(loss.distance, nn.MSELoss) else "l1"
    loss.model.to(x)
    features, targets = loss.get_features(x), loss.get_features(y)
    count = min(len(features), len(loss.weights))
    weights = [weight.item() for weight in loss.weights[:count]]
    if style:
        value = style_distance(features[:count], targets[:count], weights=weights, criterion=criterion,
                               normalization="none", reduction="none")  # fmt: skip
    else:
        sums = [weight * feature.shape[1] for weight, feature in zip(weights, features, strict=False)]
        value = feature_distance(features[:count], targets[:count], weights=sums, criterion=criterion, reduction="none")
    return as_theirs(_reduce(value, loss.reduction), *features)


class ContentLoss(_ContentLoss):
    """piq's module: distances of features by :func:`fastloss.feature_distance`."""

    @hands_on("piq.ContentLoss", _theirs.ContentLoss.forward)
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return _compared(self, x, y, style=False)


class StyleLoss(_StyleLoss, ContentLoss):
    """piq's module: distances of products of channels by :func:`fastloss.style_distance`."""

    @hands_on("piq.StyleLoss", _theirs.StyleLoss.forward)
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return _compared(self, x, y, style=True)


class LPIPS(_LPIPS, ContentLoss):
    """piq's module: squared differences of VGG16's unit features by :func:`fastloss.lpips_distance`.

    A pixel whose features are all 0 gets a gradient of 0, where piq's is NaN.
    """

    @hands_on("piq.LPIPS", _theirs.LPIPS.forward)
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        _validate([x, y], dim_range=(4, 4), data_range=(0, -1))
        check_plain(x, y)
        check_not_overridden(self, _LPIPS, "compute_distance", "get_features", "normalize")
        if not isinstance(self.distance, nn.MSELoss) or not self.normalize_features:
            raise NotServed("distance: absolute differences, or features that are not normalised")
        self.model.to(x)
        features, targets = self._raw_features(x), self._raw_features(y)
        lins = [weight.to(feature.device) for weight, feature in zip(self.weights, features, strict=True)]
        return as_theirs(_reduce(lpips_distance(features, targets, lins), self.reduction), *features)

    def _raw_features(self, image: Tensor) -> list[Tensor]:
        """What ``get_features`` makes unit features of."""
        image, features = (image - self.mean.to(image)) / self.std.to(image), []
        for name, layer in self.model.named_children():
            image = layer(image)
            if name in self.layers:
                features.append(image)
        return features


class DISTS(_DISTS, ContentLoss):
    """piq's module: means and correlations of features, the image among them, by :func:`fastloss.dists_distance`.

    As in piq, the weights are not divided by their sum, and ``reduction="sum"`` is 1 minus the sum of similarities.
    """

    @hands_on("piq.DISTS", _theirs.DISTS.forward)
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        check_plain(x, y)
        check_not_overridden(self, _DISTS, "compute_distance", "get_features")
        if x.ndim == 4 and min(x.shape[2:]) > _LARGEST_DISTS:
            scale = _LARGEST_DISTS / min(x.shape[2:])
            x, y = (F.interpolate(t, scale_factor=scale, recompute_scale_factor=False, mode="bilinear") for t in (x, y))
        _validate([x, y], dim_range=(4, 4), data_range=(0, -1))
        self.model.to(x)
        features, targets = self.get_features(x), self.get_features(y)
        weights = [weight.to(x.device) for weight in self.weights]
        alphas, betas = weights[: len(features)], weights[len(features) :]
        distance = dists_distance(features, targets, alphas, betas)
        total = torch.cat(weights, 1).to(distance.dtype).sum()
        value = _reduce(1 - total + total * distance, self.reduction)
        if self.reduction == "sum":
            value = value + (1 - len(x))
        return as_theirs(value, *features)


SWAPS = {
    "piq.ssim": ssim,
    "piq.SSIMLoss": SSIMLoss,
    "piq.multi_scale_ssim": multi_scale_ssim,
    "piq.MultiScaleSSIMLoss": MultiScaleSSIMLoss,
    "piq.total_variation": total_variation,
    "piq.TVLoss": TVLoss,
    "piq.ContentLoss": ContentLoss,
    "piq.StyleLoss": StyleLoss,
    "piq.LPIPS": LPIPS,
    "piq.DISTS": DISTS,
}
LEFT: dict[str, str] = {}
