"""Pixel loss: |d|^p, Charbonnier and Huber distances between two images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core import Loss, Op, check_not_empty, check_reduction, result_dtype
from ..core.checks import check_number, check_same_shape, check_tensor, check_weight
from ..core.entry import takes_input_and_target
from ..core.scaled_sum import ScaledSum
from ..core.traced import filled, number
from .map_weights import over_weights, weight_sum

LARGEST_EPS = 1e18  # its square fits float32
P_OF = {"l1": 1, "mae": 1, "l2": 2, "mse": 2}


class Inputs(NamedTuple):
    """Of the op, which returns the weighted distance of each element, or their sum."""

    image: Tensor  # [...]
    image_pred: Tensor  # [...]
    weight: Tensor | None  # [...], of any strides
    kind: str  # "l1", "l2", "lp", "charbonnier" or "huber"
    parameter: float  # p, eps or delta
    reduce: bool  # to the sum


class Grads(NamedTuple):
    image: Tensor
    image_pred: Tensor


class Needs(NamedTuple):
    image: bool
    image_pred: bool


def pixel_reference(x: Inputs) -> Tensor:
    """The definition: weighted distances of the elements, or their sum, in float32 (float64 for float64)."""
    weight, kind, p = x.weight, x.kind, x.parameter
    dtype = result_dtype(x.image, x.image_pred)
    d = x.image_pred.to(dtype) - x.image.to(dtype)
    if weight is not None:
        d = d.masked_fill(weight == 0, 0)  # of NaN or infinity too: weights of 0 exclude, a product would not
    if kind == "l1":
        loss = d.abs()
    elif kind == "l2":
        loss = d * d
    elif kind == "lp":
        loss = d.abs().pow(number(p, d))
    elif kind == "charbonnier":
        eps = filled((), max(p, torch.finfo(dtype).tiny), dtype, d.device)
        loss = torch.hypot(d, eps)  # eps * eps may be too small or too large
    else:  # huber with delta = p: no where(), whose untaken branch would give NaN for the gradient at |d| = inf
        a = d.abs()
        inner = a.clamp(max=number(p, a))
        loss = inner * (a - 0.5 * inner)
    if weight is not None:
        loss = loss * weight.to(dtype)
    return loss.sum() if x.reduce else loss


def _pixel_fwd(x: Inputs) -> Tensor:
    if x.reduce:
        return x.image.new_empty((), dtype=torch.float32)
    return torch.empty_like(x.image, dtype=torch.float32)


def _pixel_bwd(grad: Tensor, x: Inputs, needs: Needs) -> Grads:
    none = x.image.new_empty(0)
    return Grads(
        image=torch.empty_like(x.image) if needs.image else none,
        image_pred=torch.empty_like(x.image_pred) if needs.image_pred else none.to(x.image_pred.dtype),
    )


_pixel = Op(
    "pixel",
    fwd=_pixel_fwd,
    bwd=_pixel_bwd,
    reference=pixel_reference,
    grads=Grads._fields,
    triton="image.kernels.pixel",
)


_pixel_total = ScaledSum(
    _pixel, fwd=_pixel_fwd, bwd=_pixel_bwd, reference=pixel_reference, triton="image.kernels.pixel"
)


def pixel_kind(p: float | str, eps: float = 1e-6, delta: float = 1.0) -> tuple[str, float]:
    """The kernel's op code and its one parameter, which fits float32."""
    eps = check_number("eps", eps, 0, LARGEST_EPS, open_low=True)
    delta = check_number("delta", delta, 0, open_low=True)
    if isinstance(p, str) and p in ("charbonnier", "huber"):
        return p, eps if p == "charbonnier" else delta
    if isinstance(p, str) and p not in P_OF:
        raise ValueError(
            f"p: expected a number >= 1, {', '.join(map(repr, P_OF))}, 'charbonnier' or 'huber', got {p!r}"
        )
    p = check_number("p", P_OF[p] if isinstance(p, str) else p, 1)
    return "l1" if p == 1 else "l2" if p == 2 else "lp", p


@takes_input_and_target(planned=True)
def pixel_loss(
    image: Tensor,
    image_pred: Tensor,
    *,
    p: float | str = 2,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    delta: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Pixel-wise distance between a target image and a predicted one.

    With :math:`d = \hat x - x`, element by element::

        p >= 1          |d|^p               (1, "l1" or "mae"; 2, "l2" or "mse", the default)
        "charbonnier"   sqrt(d^2 + eps^2)
        "huber"         d^2 / 2 if |d| <= delta, else delta (|d| - delta / 2)

    Args:
        image: target, any shape, float16, bfloat16, float32 or float64; any value range. As a keyword also `target`.
        image_pred: prediction of the same shape. Both may need gradients. As a keyword also `input`, torch's name.
        p: the distance, see above.
        weight: non-negative weights, or a mask (bool, True counts 1), broadcastable to `image` (``[N,1,H,W]`` counts
            once per channel), no gradient. A weight of 0 excludes its elements: even NaN there has no effect, on the
            value or on a gradient, which is 0.
        eps: smoothing of Charbonnier, in units of the image, > 0 and at most 1e18. Differences above 1e19 have an
            infinite distance in the kernels, which square them.
        delta: threshold of Huber, in units of the image, > 0.
        reduction: ``"mean"`` (with `weight`: weighted sum / sum of weights; 0 when all weights are 0, NaN when their
            sum is beyond float32, 3.4e38), ``"sum"``, or ``"none"`` for the map.

    Returns:
        float32 (float64 for float64 inputs), whatever the input dtype: a scalar, or the map for ``"none"``.
        The gradient at d = 0 is 0 for every distance. Of a NaN it is NaN, for p=1 it is 0, as torch has it.

    Raises:
        TypeError: an argument is no floating-point tensor. ValueError: shapes, devices or options do not fit,
            `weight` requires a gradient, or ``"mean"`` of an empty batch.

    Source: torch.nn.functional ``l1_loss``, ``mse_loss``, ``huber_loss`` (and their ``weight``); Charbonnier et al.,
    "Two deterministic half-quadratic regularization algorithms for computed imaging", ICIP 1994.

    Example:
        >>> pixel_loss(torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.5)).item()
        0.25
    """
    check_tensor("image", image)
    check_tensor("image_pred", image_pred)
    check_same_shape("image", image, "image_pred", image_pred)
    check_reduction(reduction)
    kind, parameter = pixel_kind(p, eps, delta)
    if weight is not None:
        check_weight("weight", weight, "image", image)
        weight = weight.expand(image.shape)
    if image.dtype != image_pred.dtype:
        dtype = torch.promote_types(image.dtype, image_pred.dtype)
        image, image_pred = image.to(dtype), image_pred.to(dtype)
    x = Inputs(image, image_pred, weight, kind, parameter, reduction != "none")
    backend = _pixel.backend(*x)
    if reduction == "mean" and weight is None and image.numel() > 0 and backend == "triton":
        return _pixel_total(*x, [1 / image.numel()], backend=backend)
    out = _pixel(*x, backend=backend)
    if reduction != "mean":
        return out
    return mean_of(out, weight, image.numel())


def mean_of(total: Tensor, weight: Tensor | None, count: int) -> Tensor:
    """A mean from a sum over `count` elements, or over those of `weight`; 0 where all weights are 0."""
    check_not_empty(count)
    return total / count if weight is None else over_weights(total, weight_sum(weight, total.dtype))


class PixelLoss(Loss):
    """Module form of :func:`pixel_loss`."""

    fn = staticmethod(pixel_loss)
