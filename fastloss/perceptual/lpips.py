"""The LPIPS head: distance of deep features that are normalised over channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import Loss, Op, result_dtype
from ..core.checks import (
    check_flag,
    check_integer,
    check_number,
    check_same_device,
    check_same_length,
    check_sequence,
    check_tensor,
)
from ..core.entry import public_function
from .checks import check_layers, check_samples

MOST_EPS = 1e18  # of the kernels
STATISTICS = 4  # that the forward keeps of a pixel: |f|, |t|, and the sums over channels of w d u and w d v


class Inputs(NamedTuple):
    """Of the op, which returns the distance of each sample, or the layers' maps, flat, one after the other."""

    features: list[Tensor]  # [N, C_i, H_i, W_i] a layer
    targets: list[Tensor]
    lin_weights: list[Tensor]  # [C_i] a layer; none: ones
    eps: float  # added to the norms
    inside_eps: float  # added to the squares within their roots; one of the two is 0
    spatial: bool  # the maps


class Saved(NamedTuple):
    statistics: Tensor  # [STATISTICS, pixels of all layers]


class Needs(NamedTuple):
    """The backward returns the gradients of the needed lists, one after the other."""

    features: bool
    targets: bool


def _unit(x: Tensor, eps: float, inside_eps: float) -> Tensor:
    """x / (|x| + eps) over channels; 0 with zero gradient where |x| is 0 (sqrt alone would give NaN there)."""
    square = (x * x).sum(dim=1, keepdim=True) + inside_eps
    zero = square == 0
    norm = square.masked_fill(zero, 1.0).sqrt()
    return (x / (norm + eps)).masked_fill(zero, 0.0)


def lpips_reference(x: Inputs) -> Tensor:
    """The definition: the distance of each sample ``[N]``, or the layers' maps, flat, one after the other."""
    dtype = result_dtype(*x.features, *x.targets)
    maps = []
    for i, (feature, target) in enumerate(zip(x.features, x.targets, strict=True)):
        d = _unit(feature.to(dtype), x.eps, x.inside_eps) - _unit(target.to(dtype), x.eps, x.inside_eps)
        distance = d * d
        if x.lin_weights:
            distance = distance * x.lin_weights[i].to(dtype).reshape(1, -1, 1, 1)
        maps.append(distance.sum(dim=1).flatten(1))
    if x.spatial:
        return torch.cat([m.flatten() for m in maps])
    return torch.stack([m.mean(1) for m in maps]).sum(0)


def _pixels(features: list[Tensor]) -> int:
    return sum(math.prod((f.shape[0], *f.shape[2:])) for f in features)


def _lpips_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    first, pixels = x.features[0], _pixels(x.features)
    out = first.new_empty((pixels if x.spatial else first.shape[0],), dtype=torch.float32)
    return out, Saved(first.new_empty((STATISTICS, pixels), dtype=torch.float32))


def _lpips_bwd(grad: Tensor, saved: Saved, x: Inputs, needs: Needs) -> list[Tensor]:
    sides = (x.features if needs.features else []) + (x.targets if needs.targets else [])
    return [torch.empty_like(t) for t in sides]


def _why_not(x: Inputs) -> str | None:
    if any(lin.requires_grad for lin in x.lin_weights):  # they are learnt once, by those who make the metric
        return "lin_weights require gradients, which the kernels do not make"
    eps = max(x.eps, x.inside_eps)
    return None if eps <= MOST_EPS else f"the kernels divide eps by norms, and take up to {MOST_EPS:g}, not {eps:g}"


_lpips = Op(
    "lpips",
    fwd=_lpips_fwd,
    bwd=_lpips_bwd,
    reference=lpips_reference,
    grads=Needs._fields,
    outputs=("out", *Saved._fields),
    triton="perceptual.kernels.lpips",
    declines=_why_not,
)


@public_function
def lpips_distance(
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    lin_weights: Sequence[Tensor] | None,
    *,
    spatial: bool = False,
    size: tuple[int, int] | None = None,
    eps: float = 1e-10,
    inside_root: bool = False,
) -> Tensor:
    r"""The LPIPS head: weighted squared distance of features normalised over channels, added up over the layers.

    With :math:`u = f / (\lVert f \rVert_2 + \mathrm{eps})` over the channels of each pixel, v likewise from t::

        distance_n = sum_i mean_{h,w} sum_c lin_i[c] (u_i - v_i)^2

    Args:
        features: one tensor ``[N,C_i,H_i,W_i]`` a layer, float16, bfloat16, float32 or float64, all on one device.
        targets: as many tensors of the same shapes.
        lin_weights: one tensor a layer, ``[C_i]`` or lpips' own ``[1,C_i,1,1]``; None means 1 for every channel (what
            ``lpips.LPIPS(lpips=False)`` does). All three lists may need gradients; where these do, no kernel is used.
        spatial: return the map instead: the map of each layer, bilinearly resized (``align_corners=False``), added.
        size: (height, width) of that map; None means the size of the first layer. lpips gives the size of the image:
            pass ``image.shape[2:]`` for the same.
        eps: added to the norm, outside its square root, as lpips has it; > 0.
        inside_root: u = f / sqrt(sum f^2 + eps) instead, as in torchmetrics, whose eps is 1e-8. The gradient of a pixel
            whose channels are all 0 is then the exact one, finite.

    Returns:
        float32 (float64 if any feature is float64), whatever the input dtypes: ``[N]``, or ``[N,1,H,W]`` with
        `spatial`. A pixel whose channels are all 0 counts with u = 0, as in lpips, and gets the gradient 0 (lpips:
        NaN).

    Raises:
        TypeError: an argument is no list of floating-point tensors. ValueError: lengths, shapes (the message names
            the layer), devices or options do not fit, or a layer has no pixels.

    Source: Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric", CVPR 2018; the
    ``lpips`` package, version 0.1.4, whose convention for eps this is.

    Example:
        >>> x, y = torch.tensor([3.0, 0.0]).view(1, 2, 1, 1), torch.tensor([0.0, 2.0]).view(1, 2, 1, 1)
        >>> lpips_distance([x], [y], [torch.tensor([1.0, 0.5])])
        tensor([1.5000])
    """
    features, targets = check_layers(features, targets, 4)
    spatial, inside_root = check_flag("spatial", spatial), check_flag("inside_root", inside_root)
    check_samples(features)
    eps = check_number("eps", eps, 0, open_low=True)
    if lin_weights is not None:
        lin_weights = _check_lin_weights(features, lin_weights)
    for i, feature in enumerate(features):
        if feature.shape[2] * feature.shape[3] == 0:
            raise ValueError(f"features[{i}]: expected at least one pixel, got shape {tuple(feature.shape)}")
    wanted = list(features[0].shape[2:]) if size is None else _checked_size(size)
    if size is not None and not spatial:
        raise ValueError(f"size: only a map has a size; pass spatial=True with it, got size={size!r} alone")
    dtype = features[0].dtype
    for t in (*features, *targets):
        dtype = torch.promote_types(dtype, t.dtype)
    lins = [lin.reshape(-1).to(result_dtype(*features, *targets)) for lin in lin_weights or ()]
    both = (0.0, eps) if inside_root else (eps, 0.0)
    out = _lpips([f.to(dtype) for f in features], [t.to(dtype) for t in targets], lins, *both, spatial)
    if not spatial:
        return out
    maps: list[Tensor] = []
    for f, flat in zip(features, out.split([_pixels([f]) for f in features]), strict=True):
        layer = flat.view(f.shape[0], 1, *f.shape[2:])
        if list(f.shape[2:]) != wanted:
            layer = F.interpolate(layer, size=wanted, mode="bilinear", align_corners=False)
        maps.append(layer)
    return sum(maps[1:], maps[0])


def _check_lin_weights(features: Sequence[Tensor], lin_weights: Any) -> list[Tensor]:
    lin_weights = check_sequence("lin_weights", lin_weights, "tensors, one a layer")
    check_same_length("features", features, "lin_weights", lin_weights)
    for i, (feature, lin) in enumerate(zip(features, lin_weights, strict=True)):
        check_tensor(f"lin_weights[{i}]", lin)
        check_same_device(f"features[{i}]", feature, f"lin_weights[{i}]", lin)
        channels = feature.shape[1]
        if tuple(lin.shape) not in ((channels,), (1, channels, 1, 1)):
            raise ValueError(
                f"lin_weights[{i}]: expected shape ({channels},) or (1, {channels}, 1, 1) for the {channels} channels "
                f"of features[{i}], got {tuple(lin.shape)}"
            )
    return lin_weights


def _checked_size(size: Any) -> list[int]:
    wanted = "(height, width), two whole numbers"
    size = size.tolist() if isinstance(size, Tensor) and size.ndim == 1 else size
    sides = [check_integer("size", side, 0, wanted=wanted) for side in check_sequence("size", size, wanted)]
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"size: expected {wanted} >= 1, got {size!r}")
    return sides


class LPIPSDistance(Loss):
    """Module form of :func:`lpips_distance`."""

    fn = staticmethod(lpips_distance)
