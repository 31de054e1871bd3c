"""Image loss: pixel, smoothness and SSIM losses of one image pair, each scalar and their weighted total."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import Loss, Op, check_not_empty, result_dtype
from ..core.checks import check_number, check_same_shape, check_tensor, check_weight, is_sequence
from ..core.inference import takes_inference_tensors
from ..core.traced import changes, filled
from .map_weights import over_weights, weight_sum
from .pixel import pixel_kind, pixel_loss, pixel_reference
from .smoothness import (
    check_distance,
    smoothness_counts,
    smoothness_kind,
    smoothness_loss,
    smoothness_mean,
    smoothness_reference,
)
from .ssim import KEEP_GRADIENTS, LARGEST_WINDOW, map_weight, ssim_loss
from .ssim_checks import NegativeImages, check_ssim_options, check_window_fits
from .ssim_reference import Inputs as SsimInputs
from .ssim_reference import ssim_reference

SIGNS = 4  # of `keep`, see Inputs
_OPTIONS = {
    "pixel_options": ("weight", "eps", "delta"),
    "smoothness_options": ("order", "guide", "weight"),
    "ssim_options": ("window", "sigma", "data_range", "padding", "k1", "k2", "weight"),
}


class Inputs(NamedTuple):
    """Of the op, whose value are sums: of the pixel loss, of the smoothness along each axis, of SSIM; 0 of what is off.

    `keep`: what the backward finds beside the inputs, 0 nothing. KEEP_GRADIENTS and 1 image, 2 image_pred, 3 both: the
    gradients of a total that counts each sum by its share, each in the order of the prediction's memory; any other
    upstream gradient makes the backward do the pass again. 1, 2 or 3 alone: the partial derivatives of SSIM. SIGNS: a
    byte an element, in the order of the prediction's memory.
    """

    image: Tensor  # [N, C, ...]
    image_pred: Tensor  # [N, C, ...]
    pixel_weight: Tensor | None  # [N, C, ...]
    guide: Tensor | None  # [N, G, ...]
    smoothness_weight: Tensor | None  # [N, 1, ...] or [N, C, ...]
    ssim_weight: Tensor | None  # of the map
    kinds: str  # "pixel,smoothness", empty where off
    # the pixel loss's parameter, the order of the smoothness, and of SSIM window (0: off), sigma, whether the padding
    # is "same", c1, c2 and the value that images begin at
    numbers: list[float]
    keep: int = 0
    shares: Tensor | None = None  # [sums], with KEEP_GRADIENTS


class Saved(NamedTuple):
    kept: Tensor


class Grads(NamedTuple):
    image: Tensor
    image_pred: Tensor


class Needs(NamedTuple):
    image: bool
    image_pred: bool


def image_reference(x: Inputs) -> Tensor:
    """The sums in differentiable torch."""
    pixel, smoothness = x.kinds.split(",")
    p, order, window, sigma, same, c1, c2, low = x.numbers
    dtype = result_dtype(x.image, x.image_pred)
    sums = [x.image_pred.new_zeros(1, dtype=dtype)] * 3
    if pixel:
        sums[0] = pixel_reference(x.image, x.image_pred, x.pixel_weight, pixel, p, True).reshape(1)
    if smoothness:
        along = smoothness_reference(x.image_pred, x.guide, x.smoothness_weight, smoothness, int(order))
        sums[1] = along.sum((0, 1))
    else:
        sums[1] = x.image_pred.new_zeros(x.image_pred.ndim - 2, dtype=dtype)
    if window:
        ssim = SsimInputs(x.image, x.image_pred, x.ssim_weight, int(window), sigma, same != 0, c1, c2, low, False)
        sums[2] = ssim_reference(ssim).sum().reshape(1)
    return torch.cat(sums)


def _image_loss_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    axes = 1 if x.kinds.endswith(",isotropic") else x.image_pred.ndim - 2
    out = x.image_pred.new_empty(axes + 2, dtype=torch.float32)
    if x.keep == SIGNS:
        return out, Saved(x.image_pred.new_empty(x.image_pred.numel(), dtype=torch.uint8))
    count = (x.keep & 1) + (x.keep >> 1 & 1)
    kept: tuple[int, ...] = (0,)
    if x.keep & KEEP_GRADIENTS:
        kept = (count, x.image_pred.numel())
    elif x.keep:
        images, channels, height, width = x.image_pred.shape
        _, _, window, _, same, *_ = x.numbers
        cut = 0 if same else int(window) - 1
        kept = (2 + count, height - cut, images * channels * (width - cut))
    return out, Saved(x.image_pred.new_empty(kept, dtype=torch.float32))


def _image_loss_bwd(grad: Tensor, saved: Saved, x: Inputs, needs: Needs) -> Grads:
    none = x.image.new_empty(0)
    return Grads(
        image=torch.empty_like(x.image) if needs.image else none,
        image_pred=torch.empty_like(x.image_pred) if needs.image_pred else none,
    )


def _why_not(image: Tensor, *args: Any) -> str | None:
    if image.numel() == 0:
        return "the images have no pixels"
    window = args[6][2]
    fits = window <= LARGEST_WINDOW
    return None if fits else f"the kernels take windows of up to {LARGEST_WINDOW} pixels, not {window}"


_image = Op(
    "image_loss",
    fwd=_image_loss_fwd,
    bwd=_image_loss_bwd,
    reference=image_reference,
    grads=Grads._fields,
    outputs=("out", *Saved._fields),
    triton="image.kernels.image_loss",
    declines=_why_not,
)


class ImageLosses(NamedTuple):
    """What :func:`image_loss` returns: `total` carries the gradients, `parts` are detached and unweighted."""

    total: Tensor
    parts: dict[str, Tensor]


@takes_inference_tensors
def image_loss(
    image: Tensor,
    image_pred: Tensor,
    *,
    pixel: tuple[float | str, float] | None = (2, 1.0),
    smoothness: tuple[int | str, float] | None = None,
    ssim: float | None = None,
    pixel_options: Mapping[str, Any] | None = None,
    smoothness_options: Mapping[str, Any] | None = None,
    ssim_options: Mapping[str, Any] | None = None,
) -> ImageLosses:
    r"""Any combination of the image-plane losses of a target image and a predicted one.

    Each part is the mean over the batch that its own function gives::

        total = w_pixel pixel_loss(image, image_pred, p=p_pixel)
              + w_smoothness smoothness_loss(image_pred, p=p_smoothness)
              + w_ssim ssim_loss(image, image_pred)

    Args:
        image: target ``[N, C, H, W]``, any floating-point dtype (other ranks where only the pixel part is on).
        image_pred: prediction of the same shape. Both may need gradients.
        pixel: ``(p, w)``, the distance of :func:`pixel_loss` and the weight of the part, >= 0; None: off.
        smoothness: ``(p, w)``, the distance of :func:`smoothness_loss` and the weight; None (the default): off.
        ssim: the weight of :func:`ssim_loss`; None (the default): off. At least one part must be on.
        pixel_options: further options of the part: ``weight`` (a map), ``eps``, ``delta``.
        smoothness_options: ``order``, ``guide``, ``weight``.
        ssim_options: ``window``, ``sigma``, ``data_range``, ``padding``, ``k1``, ``k2``, ``weight``. For images in
            [-1, 1] pass ``data_range=(-1, 1)``, see :func:`ssim_loss`.

    Returns:
        ``(total, parts)``, a named tuple. `total` is a float32 scalar (float64 for float64 inputs) with the gradients;
        `parts` maps ``"pixel"``, ``"smoothness"`` and ``"ssim"``, those that are on, to their values: unweighted,
        detached, on the device (nothing here waits for it). A part of weight 0 is computed and reported.

    Raises:
        TypeError: an argument is of the wrong type, or an option unknown. ValueError: every part is off, a weight is
            negative, or what the part's own function raises.

    Source: the L1 and SSIM mix is that of Zhao et al., "Loss functions for image restoration with neural networks",
    TCI 2017; all the parts are those of the functions named.

    Example:
        >>> total, parts = image_loss(torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8), pixel=(1, 0.8), ssim=0.2)
        >>> sorted(parts), parts["pixel"].item()
        (['pixel', 'ssim'], 1.0)
    """
    check_tensor("image", image)
    check_tensor("image_pred", image_pred)
    check_same_shape("image", image, "image_pred", image_pred)
    more = {
        "pixel": _options("pixel_options", pixel_options, pixel is not None),
        "smoothness": _options("smoothness_options", smoothness_options, smoothness is not None),
        "ssim": _options("ssim_options", ssim_options, ssim is not None),
    }
    weights: dict[str, float] = {}
    distances: dict[str, float | str] = {}
    for name, part in (("pixel", pixel), ("smoothness", smoothness)):
        if part is not None:
            distances[name], weights[name] = _distance_and_weight(name, part)
    if ssim is not None:
        weights["ssim"] = check_number("ssim", ssim, 0)
    if not weights:
        raise ValueError("pixel, smoothness, ssim: expected at least one part that is not None")
    values = (_in_one_pass if len(weights) > 1 else _part_by_part)(image, image_pred, distances, more, weights)
    total = torch.stack([weights[name] * value for name, value in values.items()]).sum()
    return ImageLosses(total, {name: value.detach() for name, value in values.items()})


def _part_by_part(
    image: Tensor, image_pred: Tensor, distances: dict, more: dict, weights: dict[str, float]
) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    if "pixel" in distances:
        values["pixel"] = pixel_loss(image, image_pred, p=distances["pixel"], **more["pixel"])
    if "smoothness" in distances:
        values["smoothness"] = smoothness_loss(image_pred, p=distances["smoothness"], **more["smoothness"])
    if "ssim" in weights:
        values["ssim"] = ssim_loss(image, image_pred, **more["ssim"])
    return values


def _in_one_pass(
    image: Tensor, image_pred: Tensor, distances: dict, more: dict, weights: dict[str, float]
) -> dict[str, Tensor]:
    """The same values from one op, which returns the sum of every part, where a kernel takes it."""
    names, numbers, maps = ["", ""], [0.0, 1.0, *[0.0] * 6], dict.fromkeys(weights)
    guide = more["smoothness"].get("guide")
    p, order = check_distance(distances.get("smoothness", 1), more["smoothness"].get("order", 1))
    counts: dict[str, list[Tensor | int]] = {"pixel": [0], "smoothness": [0] * (image_pred.ndim - 2), "ssim": [0]}
    if "pixel" in distances:
        options = dict(more["pixel"])
        maps["pixel"] = _expanded(options.pop("weight", None), image)
        names[0], numbers[0] = pixel_kind(distances["pixel"], **options)
        counts["pixel"] = [_count(maps["pixel"], image.numel(), result_dtype(image, image_pred))]
    if "smoothness" in distances:
        names[1], maps["smoothness"] = smoothness_kind(image_pred, p, order, guide, more["smoothness"].get("weight"))
        numbers[1] = float(order)
        counts["smoothness"] = smoothness_counts(image_pred, maps["smoothness"], p, order)
    if "ssim" in weights:
        numbers[2:], maps["ssim"], count = _ssim_numbers(image, image_pred, more["ssim"])
        counts["ssim"] = [_count(maps["ssim"], count, result_dtype(image, image_pred))]
    dtype = torch.promote_types(image.dtype, image_pred.dtype)
    args = (image.to(dtype), image_pred.to(dtype), maps.get("pixel"), guide, maps.get("smoothness"), maps.get("ssim"))
    kinds = ",".join(names)
    backend = _image.backend(*args, kinds, numbers)
    # On the CPU a sweep would subtract the pixels of a side without differences from themselves, NaN too.
    narrow = backend == "cpp" and "smoothness" in distances and min(image.shape[2:]) <= order
    if backend == "reference" or narrow or (backend == "triton" and _is_heavy(kinds, guide, maps, numbers)):
        return _part_by_part(image, image_pred, distances, more, weights)
    keep, shares = 0, None
    if backend == "triton":
        keep = _keep(*args, kinds, numbers)
    elif "ssim" in weights and p != "norm" and torch.is_grad_enabled():  # the root's share depends on the sums
        keep = int(image.requires_grad) + 2 * int(image_pred.requires_grad)
        keep, shares = (keep + KEEP_GRADIENTS, _shares(weights, counts, image_pred)) if keep else (0, None)
    sums = _image(*args, kinds, numbers, keep, shares)
    values: dict[str, Tensor] = {}
    if "pixel" in distances:
        values["pixel"] = _mean(sums[0], counts["pixel"][0])
    if "smoothness" in distances:
        values["smoothness"] = smoothness_mean(sums[1:-1], counts["smoothness"], p)
    if "ssim" in weights:
        values["ssim"] = _mean(sums[-1], counts["ssim"][0])
    return values


def _is_heavy(kinds: str, guide: Tensor | None, maps: dict, numbers: list[float]) -> bool:
    """More than the registers of a device hold at once: an isotropic smoothness with a guide; and beside SSIM more than
    one of a guide, maps of weights and second differences."""
    weighted = any(weight is not None for weight in maps.values())
    many = (guide is not None) + weighted + (numbers[1] == 2) > 1
    return (kinds.endswith("isotropic") and guide is not None) or (numbers[2] > 0 and many)


def _keep(image: Tensor, image_pred: Tensor, *args: Any) -> int:
    """What the Triton kernels keep for a backward."""
    needs = int(image.requires_grad) + 2 * int(image_pred.requires_grad)
    *maps, kinds, numbers = args
    if not (needs and torch.is_grad_enabled()):
        return 0
    if numbers[2]:
        return needs
    signs = kinds == "l1,l1" and image.ndim == 4 and all(t is None for t in maps)
    return SIGNS if signs else 0


def _count(weight: Tensor | None, count: int, dtype: torch.dtype) -> Tensor | int:
    """What a mean is over: how many elements, or how much weight."""
    check_not_empty(count)
    return count if weight is None else weight_sum(weight, dtype)


def _mean(total: Tensor, count: Tensor | int) -> Tensor:
    return over_weights(total, count) if isinstance(count, Tensor) else total / count


def _shares(weights: dict[str, float], counts: dict[str, list[Tensor | int]], like: Tensor) -> Tensor:
    """What each sum counts in the total."""
    shares = [
        over_weights(filled((), weights.get(name, 0.0), torch.float32, c.device), c.float())
        if isinstance(c, Tensor) else weights.get(name, 0.0) / max(c, 1)
        for name, each in counts.items() for c in each
    ]  # fmt: skip
    if not any(isinstance(share, Tensor) or changes(share) for share in shares):
        return torch.tensor(shares, dtype=torch.float32, device=like.device)
    each = (s if isinstance(s, Tensor) else filled((), s, torch.float32, like.device) for s in shares)
    return torch.stack([s.to(torch.float32) for s in each]).detach()


def _ssim_numbers(image: Tensor, image_pred: Tensor, options: dict) -> tuple[list[float], Tensor | None, int]:
    """(window, sigma, whether the padding is "same", c1, c2, low), the weight of the map, how many elements it has."""
    check_tensor("image", image, 4)
    o = {"window": 11, "sigma": 1.5, "data_range": 1.0, "padding": "same", "k1": 0.01, "k2": 0.03, **options}
    weight = o.pop("weight", None)
    window, sigma, same, *numbers = check_ssim_options(**o, dtype=result_dtype(image, image_pred))
    if not same:
        check_window_fits(image, window, 1)
    NegativeImages.warn_once(image, o["data_range"])
    cut = 0 if same else window // 2
    shape = (*image.shape[:2], image.shape[2] - 2 * cut, image.shape[3] - 2 * cut)
    if weight is not None:
        weight = map_weight(weight, image, cut).expand(shape)
    return [float(window), sigma, float(same), *numbers], weight, math.prod(shape)


def _expanded(weight: Any, image: Tensor) -> Tensor | None:
    if weight is None:
        return None
    check_weight("weight", weight, "image", image)
    return weight.expand(image.shape)


def _distance_and_weight(name: str, part: Any) -> tuple[float | str, float]:
    pair = list(part) if is_sequence(part) else []
    if len(pair) != 2:
        raise TypeError(f"{name}: expected (p, w), the distance and the part's weight, or None, got {part!r}")
    return pair[0], check_number(f"{name}: w", pair[1], 0)


def _options(name: str, options: Any, on: bool) -> dict[str, Any]:
    if options is None:
        return {}
    allowed: Collection[str] = _OPTIONS[name]
    if not isinstance(options, Mapping):
        raise TypeError(f"{name}: expected a dict of options, got {type(options).__name__}")
    unknown = [key for key in options if key not in allowed]
    if unknown:
        raise TypeError(f"{name}: unknown option {unknown[0]!r}; the options are {list(allowed)}")
    if not on:
        raise ValueError(f"{name}: the part it is for is off; pass {name.removesuffix('_options')} too")
    return dict(options)


class ImageLoss(Loss):
    """Module form of :func:`image_loss`."""

    fn = staticmethod(image_loss)
