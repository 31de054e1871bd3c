"""Image loss: pixel, smoothness and SSIM losses of one image pair, each scalar and their weighted total."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import Loss, Op, check_not_empty, result_dtype
from ..core.checks import check_number, check_same_shape, check_tensor, check_weight, is_sequence
from ..core.entry import takes_input_and_target, unknown_option
from ..core.traced import changes, filled
from ..core.weighted_sum import weighted_sum
from .map_weights import over_weights, weight_sum
from .pixel import Inputs as PixelInputs
from .pixel import pixel_kind, pixel_loss, pixel_reference
from .smoothness import Inputs as SmoothnessInputs
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
from .ssim_reference import Axis, ssim_reference
from .ssim_reference import Inputs as SsimInputs

SIGNS = 4  # of `keep`, see Inputs
_OPTIONS = {
    "pixel_options": ("weight", "eps", "delta"),
    "smoothness_options": ("order", "guide", "weight"),
    "ssim_options": ("window", "sigma", "data_range", "padding", "k1", "k2", "weight"),
}
_HINTS = {key: f"{name}={{{key!r}: ...}}" for name, keys in _OPTIONS.items() for key in keys if key != "weight"}
_HINTS |= {
    "p": "pixel=(p, w) or smoothness=(p, w)",
    "weight": "it in pixel_options, smoothness_options or ssim_options",
}


class Inputs(NamedTuple):
    """Of the op, whose value are sums: of the pixel loss, of the smoothness along each axis, of SSIM; 0 of what is off.

    `keep`: what the backward finds beside the inputs, 0 nothing. KEEP_GRADIENTS and 1 image, 2 image_pred, 3 both: the
    gradients of a total in which each sum has its weight, each in the order of the prediction's memory; any other
    upstream gradient makes the backward do the pass again. 1, 2 or 3 alone: the partial derivatives of SSIM. SIGNS: a
    byte an element, in the order of the prediction's memory.
    """

    image: Tensor  # [N, C, ...]
    image_pred: Tensor  # [N, C, ...]
    pixel_weight: Tensor | None = None  # [N, C, ...]
    guide: Tensor | None = None  # [N, G, ...]
    smoothness_weight: Tensor | None = None  # [N, C, ...]
    ssim_weight: Tensor | None = None  # of the map, [N, C, ...]
    pixel_kind: str = ""  # as in pixel.py; empty: off
    pixel_parameter: float = 0.0
    smoothness_kind: str = ""  # as in smoothness.py; empty: off
    order: int = 1
    window: int = 0  # and what follows: as in ssim_reference.py; 0: off
    sigma: float = 0.0
    same: bool = False
    c1: float = 0.0
    c2: float = 0.0
    low: float = 0.0
    keep: int = 0
    sum_weights: Tensor | None = None  # [sums], with KEEP_GRADIENTS


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
    dtype = result_dtype(x.image, x.image_pred)
    sums = [x.image_pred.new_zeros(1, dtype=dtype)] * 3
    if x.pixel_kind:
        pixel = PixelInputs(x.image, x.image_pred, x.pixel_weight, x.pixel_kind, x.pixel_parameter, True)
        sums[0] = pixel_reference(pixel).reshape(1)
    if x.smoothness_kind:
        smoothness = SmoothnessInputs(x.image_pred, x.guide, x.smoothness_weight, x.smoothness_kind, x.order)
        sums[1] = smoothness_reference(smoothness).sum((0, 1))
    else:
        sums[1] = x.image_pred.new_zeros(x.image_pred.ndim - 2, dtype=dtype)
    if x.window:
        ssim = SsimInputs(
            x.image, x.image_pred, x.ssim_weight, x.window, x.sigma, x.same, x.c1, x.c2, x.low, structure_only=False
        )
        sums[2] = ssim_reference(ssim).sum().reshape(1)
    return torch.cat(sums)


def _image_loss_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    axes = 1 if x.smoothness_kind == "isotropic" else x.image_pred.ndim - 2
    out = x.image_pred.new_empty(axes + 2, dtype=torch.float32)
    if x.keep == SIGNS:
        return out, Saved(x.image_pred.new_empty(x.image_pred.numel(), dtype=torch.uint8))
    count = (x.keep & 1) + (x.keep >> 1 & 1)
    kept: tuple[int, ...] = (0,)
    if x.keep & KEEP_GRADIENTS:
        kept = (count, x.image_pred.numel())
    elif x.keep:
        images, channels, height, width = x.image_pred.shape
        cut = 0 if x.same else x.window - 1
        kept = (2 + count, height - cut, images * channels * (width - cut))
    return out, Saved(x.image_pred.new_empty(kept, dtype=torch.float32))


def _image_loss_bwd(grad: Tensor, saved: Saved, x: Inputs, needs: Needs) -> Grads:
    none = x.image.new_empty(0)
    return Grads(
        image=torch.empty_like(x.image) if needs.image else none,
        image_pred=torch.empty_like(x.image_pred) if needs.image_pred else none,
    )


def _why_not(x: Inputs) -> str | None:
    if x.image.numel() == 0:
        return "the images have no pixels"
    fits = x.window <= LARGEST_WINDOW
    return None if fits else f"the kernels take windows of up to {LARGEST_WINDOW} pixels, not {x.window}"


_image_loss = Op(
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


@takes_input_and_target(hints=_HINTS)
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
        image_pred: prediction of the same shape. Both may need gradients. As keywords also `target` and `input`.
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
    found = _in_one_pass(image, image_pred, distances, more, weights) if len(weights) > 1 else None
    if found is None:
        found = _of_parts(_part_by_part(image, image_pred, distances, more, weights), weights)
    return found


def _of_parts(values: dict[str, Tensor], weights: dict[str, float]) -> ImageLosses:
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
) -> ImageLosses | None:
    """From one op, which returns the sum of every part; None where no kernel takes them all."""
    guide = more["smoothness"].get("guide")
    dtype, returned = torch.promote_types(image.dtype, image_pred.dtype), result_dtype(image, image_pred)
    fields: dict[str, Any] = {"image": image.to(dtype), "image_pred": image_pred.to(dtype), "guide": guide}
    p, order = check_distance(distances.get("smoothness", 1), more["smoothness"].get("order", 1))
    counts: dict[str, list[Tensor | int]] = {"pixel": [0], "smoothness": [0] * (image_pred.ndim - 2), "ssim": [0]}
    if "pixel" in distances:
        options = dict(more["pixel"])
        weight = _expanded(options.pop("weight", None), image)
        kind, parameter = pixel_kind(distances["pixel"], **options)
        fields |= {"pixel_weight": weight, "pixel_kind": kind, "pixel_parameter": parameter}
        counts["pixel"] = [_count(weight, image.numel(), returned)]
    if "smoothness" in distances:
        kind, weight = smoothness_kind(image_pred, p, order, guide, more["smoothness"].get("weight"))
        fields |= {"smoothness_weight": weight, "smoothness_kind": kind, "order": order}
        counts["smoothness"] = smoothness_counts(image_pred, weight, p, order)
    if "ssim" in weights:
        ssim, weight, count = _ssim_fields(image, image_pred, more["ssim"])
        fields |= {"ssim_weight": weight, **ssim}
        counts["ssim"] = [_count(weight, count, returned)]
    x = Inputs(**fields)
    backend = _image_loss.backend(*x)
    # On the CPU a sweep would subtract the pixels of a side without differences from themselves, NaN too.
    narrow = backend == "cpp" and "smoothness" in distances and min(image.shape[2:]) <= order
    if backend == "reference" or narrow or (backend == "triton" and _is_heavy(x)):
        return None
    keep, sum_weights = 0, None
    if backend == "triton":
        keep = _keep(x)
    elif "ssim" in weights and p != "norm" and torch.is_grad_enabled():  # the root's weight depends on the sums
        keep = int(image.requires_grad) + 2 * int(image_pred.requires_grad)
        keep, sum_weights = (keep + KEEP_GRADIENTS, _sum_weights(weights, counts, image_pred)) if keep else (0, None)
    sums, total = _image_loss(*x._replace(keep=keep, sum_weights=sum_weights), backend=backend), None
    whole = not any(isinstance(count, Tensor) for of_part in counts.values() for count in of_part)
    if backend == "triton" and p != "norm" and whole:  # two launches for some twenty
        total, sums = weighted_sum(sums, _factors(weights, counts), backend=backend), sums.detach()
    values: dict[str, Tensor] = {}
    if "pixel" in distances:
        values["pixel"] = _mean(sums[0], counts["pixel"][0])
    if "smoothness" in distances:
        values["smoothness"] = smoothness_mean(sums[1:-1], counts["smoothness"], p)
    if "ssim" in weights:
        values["ssim"] = _mean(sums[-1], counts["ssim"][0])
    return _of_parts(values, weights) if total is None else ImageLosses(total, values)


def _is_heavy(x: Inputs) -> bool:
    """More than the registers of a device hold at once: an isotropic smoothness with a guide; and beside SSIM more than
    one of a guide, maps of weights and second differences."""
    weighted = any(weight is not None for weight in (x.pixel_weight, x.smoothness_weight, x.ssim_weight))
    many = (x.guide is not None) + weighted + (x.order == 2) > 1
    return (x.smoothness_kind == "isotropic" and x.guide is not None) or (x.window > 0 and many)


def _keep(x: Inputs) -> int:
    """What the Triton kernels keep for a backward."""
    needs = int(x.image.requires_grad) + 2 * int(x.image_pred.requires_grad)
    if not (needs and torch.is_grad_enabled()):
        return 0
    if x.window:
        return needs
    plain = all(t is None for t in (x.pixel_weight, x.guide, x.smoothness_weight))
    signs = x.pixel_kind == x.smoothness_kind == "l1" and x.image.ndim == 4 and plain
    return SIGNS if signs else 0


def _count(weight: Tensor | None, count: int, dtype: torch.dtype) -> Tensor | int:
    """What a mean is over: how many elements, or how much weight."""
    check_not_empty(count)
    return count if weight is None else weight_sum(weight, dtype)


def _mean(total: Tensor, count: Tensor | int) -> Tensor:
    return over_weights(total, count) if isinstance(count, Tensor) else total / count


def _factors(weights: dict[str, float], counts: dict[str, list[Tensor | int]]) -> list[Any]:
    """The weight of each sum in the total; tensors where the counts are."""
    return [
        over_weights(filled((), weights.get(name, 0.0), torch.float32, c.device), c.float())
        if isinstance(c, Tensor) else weights.get(name, 0.0) / max(c, 1)
        for name, of_part in counts.items() for c in of_part
    ]  # fmt: skip


def _sum_weights(weights: dict[str, float], counts: dict[str, list[Tensor | int]], like: Tensor) -> Tensor:
    """The same on the images' device."""
    found = _factors(weights, counts)
    if not any(isinstance(weight, Tensor) or changes(weight) for weight in found):
        return torch.tensor(found, dtype=torch.float32, device=like.device)
    tensors = (w if isinstance(w, Tensor) else filled((), w, torch.float32, like.device) for w in found)
    return torch.stack([w.to(torch.float32) for w in tensors]).detach()


def _ssim_fields(image: Tensor, image_pred: Tensor, options: dict) -> tuple[dict[str, Any], Tensor | None, int]:
    """The fields of Inputs that say which SSIM, the weight of the map, and how many elements the map has."""
    check_tensor("image", image, 4)
    o = {"window": 11, "sigma": 1.5, "data_range": 1.0, "padding": "same", "k1": 0.01, "k2": 0.03, **options}
    weight = o.pop("weight", None)
    ssim = check_ssim_options(**o, dtype=result_dtype(image, image_pred))
    if not ssim.same:
        check_window_fits(image, (Axis(ssim.window, ssim.sigma, same=False),) * 2)
    NegativeImages.warn_once(image, o["data_range"])
    cut = 0 if ssim.same else ssim.window // 2
    shape = (*image.shape[:2], image.shape[2] - 2 * cut, image.shape[3] - 2 * cut)
    if weight is not None:
        weight = map_weight(weight, image, (cut, cut)).expand(shape)
    return ssim._asdict(), weight, math.prod(shape)


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
        raise unknown_option(name, unknown[0], allowed)
    if not on:
        raise ValueError(f"{name}: the part it is for is off; pass {name.removesuffix('_options')} too")
    return dict(options)


class ImageLoss(Loss):
    """Module form of :func:`image_loss`."""

    fn = staticmethod(image_loss)
