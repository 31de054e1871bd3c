"""Rows of the image-plane losses: smoothness, SSIM, MS-SSIM and their combination."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F

import fastloss
from tests.conformance.case import IMAGES, NARROW, Bench, Case, image_pair, with_argument, with_options


def eager_smoothness(image_pred, guide=None, weight=None, p=1, order=1, convention="fastloss", reduction="mean"):
    """Total variation as written with slices; by image, so that every convention is a line."""

    def edges(x):  # the differences along each axis, and those of the guide over the same pixels
        if order == 1:
            return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]
        return (
            x[..., 2:, :] - 2 * x[..., 1:-1, :] + x[..., :-2, :],
            x[..., :, 2:] - 2 * x[..., :, 1:-1] + x[..., :, :-2],
        )

    diffs = list(edges(image_pred))
    height, width = image_pred.shape[-2:]
    if guide is not None:
        steps = (guide[..., order:, :] - guide[..., :-order, :], guide[..., order:] - guide[..., :-order])
        edge = [torch.exp(-step.abs().mean(1, keepdim=True)) for step in steps]
        diffs = [d * e.sqrt() if p in (2, "norm") else d * e for d, e in zip(diffs, edge, strict=True)]
    w = torch.ones_like(image_pred) if weight is None else weight.expand_as(image_pred)
    if p == "isotropic":
        lead = order - 1
        rows = F.pad(diffs[0], (0, 0, lead, height - lead - diffs[0].shape[-2]))
        columns = F.pad(diffs[1], (lead, width - lead - diffs[1].shape[-1]))
        terms = [(torch.linalg.vector_norm(torch.stack((rows, columns)), dim=0), w)]
    else:
        at = order - 1
        cut = (w[..., at : max(height - 1, at), :], w[..., at : max(width - 1, at)])
        terms = [(d.abs() if p == 1 else d**2, c) for d, c in zip(diffs, cut, strict=True)]
    dims = (0, 1, 2, 3) if convention == "fastloss" and reduction == "mean" else (1, 2, 3)
    value = 0
    for loss, c in terms:
        here = (loss * c).sum(dims)
        value = value + (here / c.sum(dims) if convention == "fastloss" and loss.numel() else here)
    if p == "norm":
        value = torch.linalg.vector_norm(value.sqrt()[None], dim=0) if value.detach().any() else value * 0
    return value if reduction == "none" or value.ndim == 0 else getattr(value, reduction)()


def from_zero(image, image_pred, data_range):
    """Images of a range (low, high) moved to begin at 0, and how long the range is."""
    low, high = data_range
    return image - low, image_pred - low, high - low


def eager_ssim_map(image, image_pred, window=11, sigma=1.5, data_range=1.0, padding="same", k1=0.01, k2=0.03):
    """SSIM with the window as a matrix, the way most training scripts have it; and the structure term alone. Of images
    or volumes, with one window or one for each axis."""
    if isinstance(data_range, tuple):
        image, image_pred, data_range = from_zero(image, image_pred, data_range)
    channels, axes = image.shape[1], image.ndim - 2
    windows = window if isinstance(window, tuple) else (window,) * axes
    kernel = torch.ones((), dtype=torch.float64)
    for size, width in zip(windows, sigma if isinstance(sigma, tuple) else (sigma,) * axes, strict=True):
        g = torch.exp(-((torch.arange(size, dtype=torch.float64) - (size - 1) / 2) ** 2) / (2 * width**2))
        kernel = kernel[..., None] * (g / g.sum())
    kernel = kernel.to(image).expand(channels, 1, *windows)
    borders = [size // 2 for size in windows]

    def blur(t):
        filtered = F.conv2d if axes == 2 else F.conv3d
        return filtered(t, kernel, padding=borders if padding == "same" else 0, groups=channels)

    if padding == "reflect":
        pad = [border for border in reversed(borders) for _ in range(2)]
        image, image_pred = (F.pad(t, pad, mode="reflect") for t in (image, image_pred))

    mx, my = blur(image), blur(image_pred)
    sx, sy = blur(image**2) - mx**2, blur(image_pred**2) - my**2
    sxy = blur(image * image_pred) - mx * my
    c1, c2 = (k1 * data_range) ** 2, (k2 * data_range) ** 2
    structure = (2 * sxy + c2) / (sx + sy + c2) if max(windows) > 1 else torch.ones_like(sxy)  # a pixel has no variance
    return (2 * mx * my + c1) / (mx**2 + my**2 + c1) * structure, structure


def eager_ssim(image, image_pred, weight=None, reduction="mean", **options):
    ssim, _ = eager_ssim_map(image, image_pred, **options)
    if reduction == "map":
        return 1 - ssim
    if weight is None:
        each = 1 - ssim.flatten(1).mean(1)
        return each if reduction == "none" else getattr(each, reduction)()
    w = weight.expand_as(image)
    for axis, size in enumerate(ssim.shape[2:], 2):
        w = w.narrow(axis, max(image.shape[axis] - size, 0) // 2, size)
    if reduction == "mean":
        return ((1 - ssim) * w).sum() / w.sum()
    each = ((1 - ssim) * w).flatten(1).sum(1) / w.flatten(1).sum(1)
    return each if reduction == "none" else each.sum()


def eager_ms_ssim(image, image_pred, level_weights, padding="valid", reduction="mean", odd_sides="zeros", **options):
    levels, pool = [], F.avg_pool2d if image.ndim == 4 else F.avg_pool3d
    if isinstance(options.get("data_range"), tuple):
        image, image_pred, options["data_range"] = from_zero(image, image_pred, options["data_range"])
    for i, w in enumerate(level_weights):
        ssim, structure = eager_ssim_map(image, image_pred, padding=padding, **options)
        levels.append((ssim if i == len(level_weights) - 1 else structure).flatten(2).mean(2).relu() ** w)
        odd = [side % 2 for side in image.shape[2:]]
        if odd_sides == "repeat" and any(odd):
            image, image_pred = (F.pad(t, [1, 0] * len(odd), mode="replicate") for t in (image, image_pred))
        pad = odd if odd_sides == "zeros" else 0
        wide = torch.promote_types(image.dtype, torch.float32)  # pools of volumes are in no half precision on the CPU
        image, image_pred = (pool(t.to(wide), 2, padding=pad).to(t.dtype) for t in (image, image_pred))
    each = 1 - torch.stack(levels).prod(0).mean(1)
    return each if reduction == "none" else getattr(each, reduction)()


def guided_smoothness(image_pred, guide, weight, **options):
    return fastloss.smoothness_loss(image_pred, guide=guide, weight=weight, **options)


def unit_pair(draw, shape):
    """Images within [0, 1], which piq insists on."""
    return tuple(t.clamp(0, 1) for t in image_pair(draw, shape))


def weighted_ssim(image, image_pred, weight, **options):
    return fastloss.ssim_loss(image, image_pred, weight=weight, **options)


def rivals(**found):
    """Of other libraries' functions, those whose library is installed, under the name it is installed by."""
    return {name.replace("_", "-"): fn for name, fn in found.items() if importlib.util.find_spec(name)}


def kornia_ssim(image, image_pred, padding="same", **_):
    """Windows that would leave the image are cut, and the loss is half of one minus SSIM, not below 0."""
    if padding != "valid":
        raise ValueError("pads by reflection, and then by nothing: it has padding='valid' only")
    from kornia.losses import ssim_loss

    return 2 * ssim_loss(image, image_pred, 11, padding="valid")


def msssim_ms_ssim(image, image_pred, **_):
    from pytorch_msssim import ms_ssim

    return 1 - ms_ssim(image, image_pred, data_range=1.0)


def piq_ms_ssim(image, image_pred, **_):
    from piq import multi_scale_ssim

    return 1 - multi_scale_ssim(image, image_pred)


def guided_image(draw, shape):
    return draw.uniform(*shape), draw.uniform(shape[0], 3, *shape[2:]), draw.uniform(shape[0], 1, *shape[2:])


IMAGE_CASES = [
    Case(
        "smoothness_loss",
        fastloss.smoothness_loss,
        lambda draw, shape: (draw.uniform(*shape),),
        eager_smoothness,
        shapes=(*IMAGES, (2, 1, 2, 7), (2, 1, 7, 2), (1, 1, 2, 2), (1, 1, 1, 2)),
        options=[
            {},
            {"p": 2},
            {"p": "isotropic"},
            {"p": "norm"},
            {"order": 2},
            {"p": "isotropic", "order": 2},
            {"convention": "torchmetrics"},
            {"p": "norm", "convention": "piq"},
        ],
        grads=(0,),
        bad=[
            ("rank", with_argument(0, lambda t: t[0]), ValueError, "image_pred: expected a 4-D or 5-D tensor"),
            ("integer", with_argument(0, lambda t: t.to(torch.uint8)), TypeError, "divide uint8 images by 255"),
            ("p", with_options(p=3), ValueError, "p: expected one of (1, 2, 'isotropic', 'norm', 'l1', 'l2'), got 3"),
            ("order", with_options(order=3), ValueError, "order: expected one of (1, 2), got 3"),
            ("convention", with_options(convention="tf"), ValueError, "convention: expected one of ('fastloss'"),
            ("none", with_options(convention="kornia", reduction="none"), ValueError, "'kornia' has 'mean' and 'sum'"),
            ("guide", with_options(guide=torch.zeros(2, 3, 8, 9)), ValueError, "guide: expected the batch and size of"),
            (
                "guide gradient",
                with_options(guide=torch.zeros(2, 3, 8, 8, requires_grad=True)),
                ValueError,
                "guide: no gradient is provided for it",
            ),
            ("weight", with_options(weight=torch.ones(3, 1, 8, 8)), ValueError, "weight: expected a shape that"),
            ("empty", with_argument(0, lambda t: t[:0]), ValueError, "the mean of an empty batch"),
        ],
        bench=Bench(
            shapes=[(8, 3, 512, 512)],
            # forward reads the image; backward reads it again and writes the gradient
            cost=lambda shape, size, mode: (
                {"forward": 1, "backward": 2, "both": 3}[mode] * size * torch.Size(shape).numel()
            ),
            options=[{"p": 1}, {"p": 2}, {"p": "isotropic"}],
            headline=3,
        ),
        module=fastloss.SmoothnessLoss,
        extra={"reach": 1},
    ),
    Case(
        "smoothness_loss with guide and weight",
        guided_smoothness,
        guided_image,
        eager_smoothness,
        shapes=((2, 3, 8, 8), (3, 2, 7, 13), *NARROW),
        options=[{}, {"p": 2}, {"p": "isotropic"}, {"p": "norm"}, {"order": 2}, {"p": "isotropic", "order": 2}],
        grads=(0,),
        extra={"reach": 1},
        bench=Bench(
            shapes=[(8, 3, 512, 512)],
            # forward reads the image, as much of a guide, and a weight per pixel; backward the same, and a gradient
            cost=lambda shape, size, mode: (
                {"forward": 7, "backward": 10, "both": 17}[mode] * size * torch.Size(shape).numel() // 3
            ),
            options=[{"p": 1}, {"p": "isotropic"}],
        ),
    ),
    Case(
        "ssim_loss",
        fastloss.ssim_loss,
        image_pair,
        eager_ssim,
        shapes=((2, 3, 5, 4), (1, 1, 1, 1), (3, 2, 7, 13), (1, 3, 12, 33)),
        options=[
            {},
            {"window": 5, "sigma": 0.8, "data_range": 2.0, "k1": 0.02, "k2": 0.05},
            {"window": 5, "data_range": (-1.0, 1.5)},
            {"window": 1},
        ],
        bad=[
            ("rank", with_argument(0, lambda t: t[0]), ValueError, "image: expected a 4-D or 5-D tensor, got shape"),
            ("axes", with_options(window=(3, 3, 3)), ValueError, "window: expected a number or 2, one along each axis"),
            ("axis", with_options(window=(3, 4)), ValueError, "window[1]: expected an odd integer >= 1, got 4"),
            ("sigmas", with_options(sigma=(1.0, 0.0)), ValueError, "sigma[1]: expected a finite number > 0"),
            ("map", with_options(reduction="map", weight=torch.ones(1)), ValueError, "weight: a map is not weighted"),
            ("shape", with_argument(1, lambda t: t[..., :-1]), ValueError, "image_pred: expected the shape of image"),
            ("channels", with_argument(1, lambda t: t[:, :1]), ValueError, "image_pred: expected the shape of image"),
            ("integer", with_argument(0, lambda t: t.to(torch.uint8)), TypeError, "divide uint8 images by 255"),
            ("even", with_options(window=10), ValueError, "window: expected an odd integer >= 1, got 10"),
            ("window", with_options(window=11.0), TypeError, "window: expected an odd integer, got float 11.0"),
            ("too large", with_options(padding="valid"), ValueError, "got 11 for images of 5 x 4 pixels"),
            (
                "too wide",
                with_options(padding="reflect"),
                ValueError,
                "less 1 with padding='reflect', got 11 for images",
            ),
            ("range", with_options(data_range=0), ValueError, "data_range: expected a finite number > 0, got 0"),
            ("range ends", with_options(data_range=(1, 0)), ValueError, "data_range: expected low < high, got (1, 0)"),
            ("sigma", with_options(sigma=-1.0), ValueError, "sigma: expected a finite number > 0"),
            ("padding", with_options(padding="zeros"), ValueError, "padding: expected one of ('same', 'va"),
            ("reduction", with_options(reduction="avg"), ValueError, "reduction: expected one of"),
            ("weight", with_options(weight=torch.ones(2, 3, 8)), ValueError, "weight: expected a shape that"),
            ("empty", lambda args, options: ((args[0][:0], args[1][:0]), options), ValueError, "the mean of an empty"),
        ],
        bench=Bench(
            shapes=[(8, 3, 256, 256)],
            cuda_shapes=[(8, 3, 512, 512)],
            # forward reads both images; backward reads both again and writes one gradient
            cost=lambda shape, size, mode: (
                {"forward": 2, "backward": 3, "both": 5}[mode] * size * torch.Size(shape).numel()
            ),
            options=[{"padding": "valid"}, {}],
            make=unit_pair,
        ),
        module=fastloss.SSIMLoss,
        extra={"rivals": rivals(kornia=kornia_ssim), "reach": 5},
    ),
    Case(
        "ssim_loss with weight",
        weighted_ssim,
        lambda draw, shape: (*image_pair(draw, shape), draw.uniform(shape[0], 1, *shape[2:])),
        eager_ssim,
        shapes=((2, 3, 6, 5), (1, 2, 7, 13)),
        options=[
            {},
            {"window": 5, "padding": "reflect"},
            {"window": 5, "padding": "valid"},
            {"window": 5, "data_range": (-1.0, 1.5)},
        ],
        extra={"reach": 5},
    ),
    Case(
        "ms_ssim_loss",
        fastloss.ms_ssim_loss,
        image_pair,
        eager_ms_ssim,
        shapes=((2, 3, 9, 9), (1, 2, 10, 13)),
        options=[
            {"window": 5, "level_weights": (0.4, 0.6)},
            {"padding": "same", "level_weights": (0.2, 0.8), "sigma": 1.0, "data_range": 2.0},
            {"padding": "same", "level_weights": (0.2, 0.8), "window": 5, "data_range": (-1.0, 1.5)},
            {"padding": "same", "level_weights": (0.2, 0.8), "window": 3, "odd_sides": "repeat"},
            {"padding": "same", "level_weights": (0.2, 0.8), "window": 5, "odd_sides": "drop"},
        ],
        bad=[
            ("size", with_options(window=7), ValueError, "9 x 9 pixels, which is 5 x 5 at level 2"),
            ("even", with_options(window=4), ValueError, "window: expected an odd integer >= 1, got 4"),
            ("channels", with_argument(1, lambda t: t[:, :1]), ValueError, "image_pred: expected the shape of image"),
            ("integer", with_argument(1, lambda t: t.to(torch.uint8)), TypeError, "divide uint8 images by 255"),
            ("levels", with_options(level_weights=()), ValueError, "level_weights: expected at least one number"),
            (
                "odd",
                with_options(odd_sides="floor"),
                ValueError,
                "odd_sides: expected one of ('zeros', 'repeat', 'drop",
            ),
            (
                "nothing left",
                with_options(padding="same", odd_sides="drop", level_weights=(0.2,) * 5),
                ValueError,
                "level_weights: 5 levels leave nothing of images of (9, 9) pixels",
            ),
            ("weight", with_options(level_weights=(1.0, -1.0)), ValueError, "level_weights[1]: expected a finite"),
        ],
        bench=Bench(
            shapes=[(8, 3, 256, 256)],
            cuda_shapes=[(8, 3, 512, 512)],
            # the same as ssim_loss for five levels of 1, 1/4, 1/16, 1/64 and 1/256 of the pixels; what is written to
            # make the levels is not counted
            cost=lambda shape, size, mode: (
                {"forward": 2, "backward": 3, "both": 5}[mode] * size * torch.Size(shape).numel() * 341 // 256
            ),
            options=[{"level_weights": (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)}],
            make=unit_pair,
        ),
        module=fastloss.MSSSIMLoss,
        extra={"rivals": rivals(pytorch_msssim=msssim_ms_ssim, piq=piq_ms_ssim)},
    ),
]
