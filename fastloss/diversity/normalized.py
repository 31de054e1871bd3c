"""Normalised diversification: images of a batch lie as far from one another as their noises do."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import Loss, check_not_empty, result_dtype
from ..core.checks import check_choice, check_flag, check_number, check_same_device, check_tensor
from ..core.entry import public_function
from .pair_distances import Inputs, pair_distances

METRICS = ("l2", "l1")


def normalized_diversity_reference(images: Tensor, z: Tensor, alpha: float, metric: str, detach_sums: bool) -> Tensor:
    """The definition, of images [N,P] and noises [N,Q]."""
    dtype, count = result_dtype(images, z), images.shape[0]
    of_images, of_noises = (_shares(t.to(dtype), metric, detach_sums) for t in (images, z))
    return (alpha * of_noises - of_images).relu().sum() / max(count * (count - 1), 1)


def _shares(x: Tensor, metric: str, detach_sums: bool) -> Tensor:
    """[N,N]: distances over their row's sum; all 0 where that is 0."""
    distances = pair_distances(*Inputs(x, metric))
    if metric == "l2":
        distances = _root(distances)
    total = distances.sum(1, keepdim=True)
    if detach_sums:
        total = total.detach()
    return distances / torch.where(total.detach() == 0, torch.ones_like(total), total)


def _root(x: Tensor) -> Tensor:
    """Whose gradient is 0 at 0."""
    zero = x.detach() == 0
    return torch.where(zero, torch.zeros_like(x), torch.where(zero, torch.ones_like(x), x).sqrt())


@public_function
def normalized_diversity_loss(
    images: Tensor, z: Tensor, *, alpha: float = 0.8, metric: str = "l2", detach_sums: bool = True
) -> Tensor:
    r"""Normalised diversification (NDiv): the images of a batch keep the pairwise distances of their noises.

    With :math:`d_{ij}` the distance of two samples and :math:`D_{ij} = d_{ij} / \sum_k d_{ik}` its share of its row::

        1 / (N (N - 1))  sum_{i != j} max( 0, alpha D(z)_ij - D(images)_ij )

    so that two images cost something where they are closer than their noises, as shares of their distances from all
    others. Give it images of one caption: those of different captions differ anyhow.

    Args:
        images: ``[N, ...]`` images or features of them, made from the noises `z`. Both get gradients.
        z: ``[N, ...]`` noises.
        alpha: how large a part of the noises' share the images' must reach, > 0.
        metric: ``"l2"``, the Euclidean distance, or ``"l1"``, the sum of absolute differences.
        detach_sums: whether the rows' sums are constants to the gradient, as in the paper, so that no image gains by
            being nearer to the others. False: the derivative of the value.

    Returns:
        A float32 scalar (float64 for float64 inputs), from 0 to alpha / (N - 1). Samples that are all equal have shares
        of 0; the gradient is 0 at equal samples, and one sample has no pairs: 0. The [N, N] distances are stored,
        the differences that they are of are not.

    Raises:
        TypeError: an argument is no floating-point tensor. ValueError: shapes or devices do not fit, alpha <= 0, or the
            batch is empty.

    Source: Liu, Zhang, Wangni and Shi, "Normalized Diversification", CVPR 2019; alpha 0.8 and the Euclidean distance
    are those of its authors' code.

    Example:
        >>> z = torch.tensor([[0.0], [1.0], [3.0]])
        >>> normalized_diversity_loss(5 * z, z).item(), round(normalized_diversity_loss(0 * z, z).item(), 4)
        (0.0, 0.4)
    """
    check_tensor("images", images)
    check_tensor("z", z)
    check_same_device("images", images, "z", z)
    if images.ndim < 1 or z.shape[:1] != images.shape[:1]:
        raise ValueError(f"z: expected one noise for each of the images, {tuple(images.shape)}, got {tuple(z.shape)}")
    alpha = check_number("alpha", alpha, 0, open_low=True)
    check_choice("metric", metric, METRICS)
    detach_sums = check_flag("detach_sums", detach_sums)
    check_not_empty(images.numel() * z.numel())
    count = images.shape[0]
    return normalized_diversity_reference(images.reshape(count, -1), z.reshape(count, -1), alpha, metric, detach_sums)


class NormalizedDiversityLoss(Loss):
    """Module form of :func:`normalized_diversity_loss`."""

    fn = staticmethod(normalized_diversity_loss)
