"""The DISTS head: structure and texture of two lists of deep features, compared by channel statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import Loss, Op, result_dtype
from ..core.checks import check_number, check_same_device, check_same_length, check_sequence, check_tensor
from ..core.entry import public_function
from .checks import check_layers, check_samples


class Inputs(NamedTuple):
    """Of the op, which returns the statistics ``[5, N, C]``, the channels of all layers side by side."""

    features: list[Tensor]  # [N, C_i, H_i, W_i] a layer
    targets: list[Tensor]


class Saved(NamedTuple):
    rest: Tensor  # [3, N, C], what rounding left of the means of f, t and d


class Needs(NamedTuple):
    """The backward returns the gradients of the needed lists, one after the other."""

    features: bool
    targets: bool


def dists_reference(x: Inputs) -> Tensor:
    """The definition: with d = f - t, the means over the pixels of f and d, and the mean squares about their means of
    f, t and d."""
    dtype = result_dtype(*x.features, *x.targets)
    layers = []
    for feature, target in zip(x.features, x.targets, strict=True):
        f, t = feature.to(dtype).flatten(2), target.to(dtype).flatten(2)
        means = [v.mean(2, keepdim=True) for v in (f, t, f - t)]
        squares = [(v - mean).square().mean(2) for v, mean in zip((f, t, f - t), means, strict=True)]
        layers.append(torch.stack([means[0].squeeze(2), means[2].squeeze(2), *squares]))
    return torch.cat(layers, 2)


def _dists_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    first, channels = x.features[0], sum(f.shape[1] for f in x.features)
    stats = first.new_empty((5, first.shape[0], channels), dtype=torch.float32)
    return stats, Saved(first.new_empty((3, first.shape[0], channels), dtype=torch.float32))


def _dists_bwd(grad: Tensor, x: Inputs, stats: Tensor, saved: Saved, needs: Needs) -> list[Tensor]:
    lists = [tensors for tensors, needed in zip(x, needs, strict=True) if needed]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for tensors in lists for t in tensors]


def _why_not(x: Inputs) -> str | None:
    dtypes = {str(t.dtype) for t in (*x.features, *x.targets)}
    return None if len(dtypes) == 1 else f"the kernels take features of one dtype, not {' and '.join(sorted(dtypes))}"


_dists = Op(
    "dists",
    fwd=_dists_fwd,
    bwd=_dists_bwd,
    reference=dists_reference,
    grads=Needs._fields,
    outputs=("stats", *Saved._fields),
    triton="perceptual.kernels.dists",
    declines=_why_not,
)


@public_function
def dists_distance(
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    alphas: Sequence[Tensor] | None = None,
    betas: Sequence[Tensor] | None = None,
    *,
    c1: float = 1e-6,
    c2: float = 1e-6,
) -> Tensor:
    r"""The DISTS head: one minus the weighted similarity of channel means (structure) and correlations (texture).

    With m, v and cov the means, variances and covariance over the pixels of channel c of layer i of a sample::

        l_ic = (2 m_f m_t + c1) / (m_f^2 + m_t^2 + c1)
        s_ic = (2 cov + c2) / (v_f + v_t + c2)
        distance_n = 1 - sum_ic (alpha_ic l_ic + beta_ic s_ic) / sum_ic (alpha_ic + beta_ic)

    computed as the sum of alpha (1 - l) and beta (1 - s), where 1 - l = (m_f - m_t)^2 / (m_f^2 + m_t^2 + c1) and 1 - s
    is the variance of f - t over v_f + v_t + c2: small distances keep their digits, equal features have distance 0.

    Args:
        features: one tensor ``[N,C_i,H_i,W_i]`` a layer, float16, bfloat16, float32 or float64, all on one device.
            DISTS counts the image, normalised as for the network, as the first layer.
        targets: as many tensors of the same shapes.
        alphas: weights of the means, one tensor a layer, ``[C_i]`` or ``[1,C_i,1,1]``; None means 1 for every channel.
        betas: likewise, of the correlations. All four lists may need gradients.
        c1, c2: keep the quotients finite, in units of squared features, > 0.

    Returns:
        float32 (float64 if any feature is float64), whatever the input dtypes: ``[N]``; 0 if all weights are 0.

    Raises:
        TypeError: an argument is no list of floating-point tensors. ValueError: lengths, shapes (the message names
            the layer), devices or options do not fit, or a layer has no pixels.

    Source: Ding, Ma, Wang, Simoncelli, "Image quality assessment: unifying structure and texture similarity", TPAMI
    2020; the ``dists-pytorch`` package, whose constants and normalisation of the weights these are.

    Example:
        >>> x, y = torch.tensor([0.0, 2.0]).view(1, 1, 1, 2), torch.tensor([0.0, 4.0]).view(1, 1, 1, 2)
        >>> dists_distance([x], [y])
        tensor([0.2000])
    """
    features, targets = check_layers(features, targets, 4)
    check_samples(features)
    c1, c2 = check_number("c1", c1, 0, open_low=True), check_number("c2", c2, 0, open_low=True)
    for i, feature in enumerate(features):
        if feature.shape[1] * feature.shape[2] * feature.shape[3] == 0:
            raise ValueError(f"features[{i}]: expected channels and pixels, got shape {tuple(feature.shape)}")
    stats = _dists(features, targets)
    weights = torch.cat([_weights(name, w, features, stats) for name, w in (("alphas", alphas), ("betas", betas))])
    weights = weights / (2 * weights.numel())  # so that no sum of them is infinite, not of 3e38 either
    mean_f, mean_d, square_f, square_t, square_d = stats.unbind()
    structure = mean_d.square() / (mean_f.square() + (mean_f - mean_d).square() + c1)
    texture = square_d / (square_f + square_t + c2)
    total = weights.sum()
    weights = weights / torch.where(total == 0, 1.0, total)
    return (torch.cat((structure, texture), 1) * weights).sum(1)


def _weights(name: str, weights: Any, features: Sequence[Tensor], stats: Tensor) -> Tensor:
    """The weights of the channels of all layers, side by side, in the dtype of the statistics."""
    if weights is None:
        return stats.new_ones(stats.shape[2])
    weights = check_sequence(name, weights, "tensors, one a layer")
    check_same_length("features", features, name, weights)
    for i, (feature, weight) in enumerate(zip(features, weights, strict=True)):
        check_tensor(f"{name}[{i}]", weight)
        check_same_device(f"features[{i}]", feature, f"{name}[{i}]", weight)
        channels = feature.shape[1]
        if tuple(weight.shape) not in ((channels,), (1, channels, 1, 1)):
            raise ValueError(
                f"{name}[{i}]: expected shape ({channels},) or (1, {channels}, 1, 1) for the {channels} channels of "
                f"features[{i}], got {tuple(weight.shape)}"
            )
    return torch.cat([weight.to(stats.dtype).reshape(-1) for weight in weights])


class DISTSDistance(Loss):
    """Module form of :func:`dists_distance`."""

    fn = staticmethod(dists_distance)
