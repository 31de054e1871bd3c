"""Pixel loss: |d|^p, Charbonnier and Huber distances between two images."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import Loss, Op, check_not_empty, check_reduction, result_dtype
from ..core.checks import check_number, check_same_shape, check_tensor, check_weight
from ..core.inference import takes_inference_tensors
from ..core.scaled_sum import Total
from ..core.traced import filled, number
from .map_weights import over_weights, weight_sum

LARGEST_EPS = 1e18  # its square fits float32


def pixel_reference(
    image: Tensor, image_pred: Tensor, weight: Tensor | None, kind: str, p: float, reduce: bool
) -> Tensor:
    """The definition: weighted distances of the elements, or their sum, in float32 (float64 for float64)."""
    dtype = result_dtype(image, image_pred)
    d = image_pred.to(dtype) - image.to(dtype)
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
    return loss.sum() if reduce else loss


def _pixel_fwd(image: Tensor, image_pred: Tensor, weight: Tensor | None, kind: str, p: float, reduce: bool) -> Tensor:
    if reduce:
        return image.new_empty((), dtype=torch.float32)
    return torch.empty_like(image, dtype=torch.float32)


def _pixel_bwd(
    grad: Tensor,
    image: Tensor,
    image_pred: Tensor,
    weight: Tensor | None,
    kind: str,
    p: float,
    reduce: bool,
    needs_image: bool,
    needs_image_pred: bool,
) -> tuple[Tensor, Tensor]:
    none = image.new_empty(0)
    return (
        torch.empty_like(image) if needs_image else none,
        torch.empty_like(image_pred) if needs_image_pred else none.to(image_pred.dtype),
    )


_pixel = Op(
    "pixel",
    fwd=_pixel_fwd,
    bwd=_pixel_bwd,
    reference=pixel_reference,
    grads=("image", "image_pred"),
    triton="image.kernels.pixel",
)


_pixel_total = Total(_pixel, fwd=_pixel_fwd, bwd=_pixel_bwd, reference=pixel_reference, triton="image.kernels.pixel")


def pixel_kind(p: float | str, eps: float = 1e-6, delta: float = 1.0) -> tuple[str, float]:
    """The kernel's op code and its one parameter, which fits float32."""
    eps = check_number("eps", eps, 0, LARGEST_EPS, open_low=True)
    delta = check_number("delta", delta, 0, open_low=True)
    if isinstance(p, str) and p in ("charbonnier", "huber"):
        return p, eps if p == "charbonnier" else delta
    if isinstance(p, str):
        raise ValueError(f"p: expected a number >= 1, 'charbonnier' or 'huber', got {p!r}")
    p = check_number("p", p, 1)
    return "l1" if p == 1 else "l2" if p == 2 else "lp", p


@takes_inference_tensors
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

        p >= 1          |d|^p               (p=1: MAE, p=2: MSE, the default)
        "charbonnier"   sqrt(d^2 + eps^2)
        "huber"         d^2 / 2 if |d| <= delta, else delta (|d| - delta / 2)

    Args:
        image: target, any shape, float16, bfloat16, float32 or float64; any value range.
        image_pred: prediction of the same shape. Both may need gradients.
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
    args = (image, image_pred, weight, kind, parameter, reduction != "none")
    if reduction == "mean" and weight is None and image.numel() > 0 and _pixel_total.serves(*args):
        return _pixel_total(*args, [1 / image.numel()], backend="triton")
    out = _pixel(*args)
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
