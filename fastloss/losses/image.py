"""Image loss: pixel, smoothness and SSIM losses of one image pair, each scalar and their weighted total."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_number, check_same_shape, check_tensor
from ..core import Loss
from .pixel import pixel_loss
from .smoothness import smoothness_loss
from .ssim import ssim_loss

_OPTIONS = {
    "pixel_options": ("weight", "eps", "delta"),
    "smoothness_options": ("order", "guide", "weight"),
    "ssim_options": ("window", "sigma", "data_range", "padding", "k1", "k2", "weight"),
}


class ImageLosses(NamedTuple):
    """What :func:`image_loss` returns: `total` carries the gradients, `parts` are detached and unweighted."""

    total: Tensor
    parts: dict[str, Tensor]


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
        ssim_options: ``window``, ``sigma``, ``data_range``, ``padding``, ``k1``, ``k2``, ``weight``.

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
    values: dict[str, Tensor] = {}
    weights: dict[str, float] = {}
    if pixel is not None:
        p, weights["pixel"] = _distance_and_weight("pixel", pixel)
        values["pixel"] = pixel_loss(image, image_pred, p=p, **more["pixel"])
    if smoothness is not None:
        p, weights["smoothness"] = _distance_and_weight("smoothness", smoothness)
        values["smoothness"] = smoothness_loss(image_pred, p=p, **more["smoothness"])  # type: ignore[arg-type]
    if ssim is not None:
        check_number("ssim", ssim, 0)
        weights["ssim"] = ssim
        values["ssim"] = ssim_loss(image, image_pred, **more["ssim"])
    if not values:
        raise ValueError("pixel, smoothness, ssim: expected at least one part that is not None")
    total = torch.stack([weights[name] * value for name, value in values.items()]).sum()
    return ImageLosses(total, {name: value.detach() for name, value in values.items()})


def _distance_and_weight(name: str, part: Any) -> tuple[float | str, float]:
    if not isinstance(part, (tuple, list)) or len(part) != 2:
        raise TypeError(f"{name}: expected (p, w), the distance and the part's weight, or None, got {part!r}")
    p, w = part
    check_number(f"{name}: w", w, 0)
    return p, w


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
