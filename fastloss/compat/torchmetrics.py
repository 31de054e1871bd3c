"""torchmetrics' SSIM, MS-SSIM, total variation, LPIPS and DISTS (torchmetrics 1.9), by fastloss's losses.

``structural_similarity_index_measure`` pads by reflection: whole windows of images that are reflected at their borders
see the same. Uniform windows are torchmetrics' own. The metric classes are subclasses whose ``update`` adds up what the
functions here give; their states, reductions and ``compute`` are torchmetrics', and so are the networks of LPIPS and
DISTS. The functions make a network once for each device and dtype, where torchmetrics makes one at each call.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..image import smoothness_loss, ssim_loss
from ..image.ms_ssim import halved
from ..perceptual import dists_distance, lpips_distance
from ._common import NotServed, as_theirs, check_plain, hands_on, required

_theirs = required("torchmetrics.functional.image")
_image = required("torchmetrics.image")
_lpips, _dists = required("torchmetrics.functional.image.lpips"), required("torchmetrics.functional.image.dists")
_LPIPS: Any = required("torchmetrics.image.lpip").LearnedPerceptualImagePatchSimilarity
_DISTS: Any = required("torchmetrics.image.dists").DeepImageStructureAndTextureSimilarity
_LPIPS_EPS = 1e-8  # inside the root, as there
_StructuralSimilarityIndexMeasure: Any = _image.StructuralSimilarityIndexMeasure
_MultiScale: Any = _image.MultiScaleStructuralSimilarityIndexMeasure
_TotalVariation: Any = _image.TotalVariation
_MS_SSIM = "multiscale_structural_similarity_index_measure"
_REDUCTIONS = {"elementwise_mean": "mean", "sum": "sum", "none": "none", None: "none"}


@hands_on("torchmetrics.functional.image.total_variation", _theirs.total_variation)
def total_variation(img: Tensor, reduction: str | None = "sum") -> Tensor:
    """torchmetrics' function: the sums of absolute differences of each image, in the dtype of `img`."""
    check_plain(img)
    if img.ndim != 4:
        raise NotServed(f"expected images [N, C, H, W], got {tuple(img.shape)}")
    value = smoothness_loss(img, convention="torchmetrics", reduction="none" if reduction is None else reduction)
    return as_theirs(value, img)


@hands_on("torchmetrics.functional.image.structural_similarity_index_measure",
          _theirs.structural_similarity_index_measure)  # fmt: skip
def structural_similarity_index_measure(
    preds: Tensor,
    target: Tensor,
    gaussian_kernel: bool = True,
    sigma: float | Sequence[float] = 1.5,
    kernel_size: int | Sequence[int] = 11,
    reduction: str | None = "elementwise_mean",
    data_range: float | tuple[float, float] | None = None,
    k1: float = 0.01,
    k2: float = 0.03,
    return_full_image: bool = False,
    return_contrast_sensitivity: bool = False,
) -> Any:
    """torchmetrics' function: SSIM of images or volumes with reflect padding, its window as wide as `sigma` says; in
    `preds`' dtype. With it the map, or the mean contrast and structure of each image, where they are asked for."""
    options = _window(preds, target, gaussian_kernel, sigma, kernel_size, reduction)
    if return_full_image and return_contrast_sensitivity:
        raise NotServed("return_full_image, return_contrast_sensitivity: both")
    options |= {"k1": k1, "k2": k2}
    preds, target, options["data_range"] = _range(preds, target.to(preds.dtype), data_range)
    if return_full_image:
        image = _similarity(preds, target, options, reduction="map")
        return as_theirs(_reduced(image.flatten(1).mean(1), reduction), preds), as_theirs(image, preds)
    value = as_theirs(_reduced(_similarity(preds, target, options), reduction), preds)
    if not return_contrast_sensitivity:
        return value
    return value, as_theirs(_contrast(preds, target, options), preds)


def _window(
    preds: Tensor, target: Tensor, gaussian_kernel: bool, sigma: Any, kernel_size: Any, reduction: str | None
) -> dict[str, Any]:
    """The options of :func:`ssim_loss` for torchmetrics' window, as wide as `sigma` says, in checked arguments.

    `kernel_size` torchmetrics only checks, but for the padding of the last axis of volumes.
    """
    check_plain(preds, target)
    if preds.ndim not in (4, 5) or preds.shape != target.shape or not gaussian_kernel or reduction not in _REDUCTIONS:
        raise NotServed(f"uniform windows, images {tuple(preds.shape)} and {tuple(target.shape)}")
    sigmas, sizes = _sides(sigma, preds.ndim - 2), _sides(kernel_size, preds.ndim - 2)
    if any(side <= 0 or side % 2 == 0 for side in sizes) or any(one <= 0 for one in sigmas):
        raise NotServed(f"sigma {sigma!r}, kernel_size {kernel_size!r}")
    window = [2 * int(3.5 * one + 0.5) + 1 for one in sigmas]
    if preds.ndim == 5 and window[-1] != sizes[-1]:
        raise NotServed(f"kernel_size: {kernel_size!r}, by which it pads, for windows of {window}")
    return {"window": window, "sigma": sigmas}


def _similarity(preds: Tensor, target: Tensor, options: dict[str, Any], reduction: str = "none") -> Tensor:
    """The SSIM of each image, ``[N]``, or its map, with reflect padding."""
    return 1 - ssim_loss(target, preds, padding="reflect", reduction=reduction, **options)


def _contrast(preds: Tensor, target: Tensor, options: dict[str, Any]) -> Tensor:
    """Contrast and structure of each image, ``[N]``: of the windows that lie within it, as torchmetrics has it."""
    if 1 in options["window"]:
        raise NotServed("sigma: a window of one pixel has no contrast")
    return 1 - ssim_loss(target, preds, padding="valid", reduction="none", luminance=False, **options)


def _reduced(values: Tensor, reduction: str | None) -> Tensor:
    how = _REDUCTIONS[reduction]
    return values if how == "none" else values.sum() if how == "sum" else values.mean()


@hands_on(f"torchmetrics.functional.image.{_MS_SSIM}", getattr(_theirs, _MS_SSIM))
def multiscale_structural_similarity_index_measure(
    preds: Tensor,
    target: Tensor,
    gaussian_kernel: bool = True,
    sigma: float | Sequence[float] = 1.5,
    kernel_size: int | Sequence[int] = 11,
    reduction: str | None = "elementwise_mean",
    data_range: float | tuple[float, float] | None = None,
    k1: float = 0.01,
    k2: float = 0.03,
    betas: tuple[float, ...] = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333),
    normalize: str | None = "relu",
) -> Tensor:
    """torchmetrics' function: the product over the levels of means over channels and pixels; in `preds`' dtype.

    With ``normalize="relu"`` a level that is not positive has gradient 0, where torchmetrics' is NaN.
    """
    options = _window(preds, target, gaussian_kernel, sigma, kernel_size, reduction) | {"k1": k1, "k2": k2}
    if normalize not in (None, "relu", "simple") or not isinstance(betas, tuple) or len(betas) == 0:
        raise NotServed(f"normalize {normalize!r}, betas {betas!r}")
    steps, sizes = len(betas) - 1, _sides(kernel_size, preds.ndim - 2)
    least = [max(2 ** (steps + 1), side * max(1, steps) ** 2 - 1) for side in sizes[:2]]
    if any(side < low for side, low in zip(preds.shape[-2:], least, strict=True)):
        raise NotServed(f"sides: {tuple(preds.shape[2:])} pixels for {len(betas)} levels")
    if any(side >> steps < window for side, window in zip(preds.shape[2:], options["window"], strict=True)):
        raise NotServed(f"sides: {tuple(preds.shape[2:])} pixels for a sigma of {sigma!r} at the last of the levels")
    dtype = torch.promote_types(preds.dtype, torch.float32)
    images = preds.to(dtype), target.to(preds.dtype).to(dtype)
    value = torch.ones(len(preds), dtype=dtype, device=preds.device)
    for level, beta in enumerate(betas):
        x, y, options["data_range"] = _range(*images, data_range)
        found = _contrast(x, y, options) if level < steps else _similarity(x, y, options)
        value = value * _power(found, beta, normalize)
        images = halved(images[0], "drop"), halved(images[1], "drop")
    return as_theirs(_reduced(value, reduction), preds)


def _power(base: Tensor, exponent: float, normalize: str | None) -> Tensor:
    if normalize == "simple":
        base = (base + 1) / 2
    if normalize != "relu":
        return base**exponent
    positive = base > 0
    return torch.where(positive, torch.where(positive, base, 1.0) ** exponent, base * 0)


class StructuralSimilarityIndexMeasure(_StructuralSimilarityIndexMeasure):
    """torchmetrics' metric, of :func:`structural_similarity_index_measure`."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        more = {name: getattr(self, name) for name in ("return_full_image", "return_contrast_sensitivity")}
        found = structural_similarity_index_measure(preds, target, **_options_of(self), **more)
        value, *images = found if isinstance(found, tuple) else (found,)
        if images:
            self.image_return += images
        _add(self, value)
        if self.reduction not in ("none", None):  # as torchmetrics counts them
            self.total += len(value)


class MultiScaleStructuralSimilarityIndexMeasure(_MultiScale):
    """torchmetrics' metric, of :func:`multiscale_structural_similarity_index_measure`."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        value = multiscale_structural_similarity_index_measure(
            preds, target, **_options_of(self), betas=self.betas, normalize=self.normalize
        )
        _add(self, value)
        self.total += len(value)


def _options_of(metric: Any) -> dict[str, Any]:
    """What both similarities have, of each image."""
    names = ("gaussian_kernel", "sigma", "kernel_size", "data_range", "k1", "k2")
    return {name: getattr(metric, name) for name in names} | {"reduction": None}


class TotalVariation(_TotalVariation):
    """torchmetrics' metric, of :func:`total_variation`."""

    def update(self, img: Tensor) -> None:
        value = total_variation(img, "none")
        if self.reduction in ("none", None):
            self.score_list.append(value)
        else:
            self.score += value.sum()
        self.num_elements += len(value)


@functools.lru_cache(maxsize=8)
def _network(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """torchmetrics' network of LPIPS or DISTS, frozen, made once; whole for autograd whatever mode it is made in."""
    with torch.inference_mode(False), torch.enable_grad():
        made = _dists.DISTSNetwork() if name == "dists" else _lpips._NoTrainLpips(net=name)
        return made.to(device=device, dtype=dtype)


def _lpips_of(net: Any, img1: Tensor, img2: Tensor, normalize: bool = False) -> Tensor:
    """What its network gives of each pair, ``[N]``."""
    check_plain(img1, img2)
    if net.spatial or any(isinstance(m, nn.Dropout) and m.training for m in net.lins.modules()):
        raise NotServed("net: maps, or dropout of the linear layers in training mode")
    sides = []
    for image in (img1, img2):
        image = net.scaling_layer(2 * image - 1 if normalize else image)
        sides.append(list(net.net(image if net.resize is None else _lpips._resize_tensor(image, size=net.resize))))
    lins = [lin.model[-1].weight for lin in net.lins]
    features, targets = sides
    return as_theirs(lpips_distance(features, targets, lins, eps=_LPIPS_EPS, inside_root=True), *features)


@hands_on("torchmetrics.functional.image.learned_perceptual_image_patch_similarity",
          _lpips.learned_perceptual_image_patch_similarity)  # fmt: skip
def learned_perceptual_image_patch_similarity(
    img1: Tensor, img2: Tensor, net_type: str = "alex", reduction: str | None = "mean", normalize: bool = False
) -> Tensor:
    """torchmetrics' function: LPIPS of images ``[N, 3, H, W]`` in [-1, 1], with `normalize` in [0, 1]."""
    net = functools.partial(_lpips_of, _network(net_type, img1.device, img1.dtype))
    return _lpips._lpips_compute(_lpips._lpips_update(img1, img2, net, normalize), reduction)


class LearnedPerceptualImagePatchSimilarity(_LPIPS):
    """torchmetrics' metric, of :func:`learned_perceptual_image_patch_similarity`."""

    @hands_on("torchmetrics.image.LearnedPerceptualImagePatchSimilarity", _LPIPS.update)
    def update(self, img1: Tensor, img2: Tensor) -> None:
        net = functools.partial(_lpips_of, self.net)
        self.all_scores.append(_lpips._lpips_update(img1, img2, net, self.normalize))


def _dists_of(preds: Tensor, target: Tensor) -> Tensor:
    """The distance of each pair ``[N]``, of one a scalar; the images get a gradient where `preds` needs one."""
    check_plain(preds, target)
    net = _network("dists", preds.device, torch.float32)
    with torch.set_grad_enabled(preds.requires_grad and torch.is_grad_enabled()):
        features, targets = net.forward_once(preds), net.forward_once(target)
    return dists_distance(features, targets, *(w.split(net.chns, dim=1) for w in (net.alpha, net.beta))).squeeze()


@hands_on("torchmetrics.functional.image.deep_image_structure_and_texture_similarity",
          _dists.deep_image_structure_and_texture_similarity)  # fmt: skip
def deep_image_structure_and_texture_similarity(preds: Tensor, target: Tensor, reduction: str | None = None) -> Tensor:
    """torchmetrics' function: DISTS of images ``[N, 3, H, W]`` in [0, 1]."""
    return _dists._dists_compute(_dists_of(preds, target), reduction)


class DeepImageStructureAndTextureSimilarity(_DISTS):
    """torchmetrics' metric, of :func:`deep_image_structure_and_texture_similarity`."""

    @hands_on("torchmetrics.image.DeepImageStructureAndTextureSimilarity", _DISTS.update)
    def update(self, preds: Tensor, target: Tensor) -> None:
        scores = _dists_of(preds, target)
        self.score += scores.sum()
        self.total += len(preds)


def _add(metric: Any, similarities: Tensor) -> None:
    """Adds those of a batch to the state that both similarities have."""
    if metric.reduction in ("none", None):
        metric.similarity.append(similarities)
    else:
        metric.similarity += similarities.sum()


def _sides(option: Any, count: int) -> list[Any]:
    """An option for each axis of the images."""
    if not isinstance(option, Sequence):
        return [option] * count
    if len(option) != count:
        raise NotServed(f"expected {count} sides, got {option!r}")
    return list(option)


def _range(preds: Tensor, target: Tensor, data_range: Any) -> tuple[Tensor, Tensor, float]:
    """The images, cut to a range (low, high), and its length; without one that of the images."""
    if isinstance(data_range, tuple):
        low, high = data_range
        return preds.clamp(low, high), target.clamp(low, high), high - low
    if data_range is not None:
        return preds, target, data_range
    if torch.is_grad_enabled() and (preds.requires_grad or target.requires_grad):
        raise NotServed("data_range: None gives its gradient to the largest and smallest pixel")
    spans = [image.amax() - image.amin() for image in (preds, target)]
    return preds, target, max(span.item() for span in spans)


SWAPS = {
    "torchmetrics.functional.image.total_variation": total_variation,
    "torchmetrics.functional.image.structural_similarity_index_measure": structural_similarity_index_measure,
    f"torchmetrics.functional.image.{_MS_SSIM}": multiscale_structural_similarity_index_measure,
    "torchmetrics.image.TotalVariation": TotalVariation,
    "torchmetrics.image.StructuralSimilarityIndexMeasure": StructuralSimilarityIndexMeasure,
    "torchmetrics.image.MultiScaleStructuralSimilarityIndexMeasure": MultiScaleStructuralSimilarityIndexMeasure,
    "torchmetrics.functional.image.learned_perceptual_image_patch_similarity": (
        learned_perceptual_image_patch_similarity
    ),
    "torchmetrics.functional.image.deep_image_structure_and_texture_similarity": (
        deep_image_structure_and_texture_similarity
    ),
    "torchmetrics.image.LearnedPerceptualImagePatchSimilarity": LearnedPerceptualImagePatchSimilarity,
    "torchmetrics.image.DeepImageStructureAndTextureSimilarity": DeepImageStructureAndTextureSimilarity,
}
LEFT: dict[str, str] = {}
