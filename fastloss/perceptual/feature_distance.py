"""The distance of two lists of deep features: the multi-layer perceptual loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..checks import check_choice, check_number
from ..core import Loss, Op, check_not_empty, check_reduction
from ..inference import takes_inference_tensors
from ..losses.perceptual_checks import check_layers, check_samples, check_weights
from ..losses.perceptual_ops import distance_call

CRITERIA = ("l1", "l2", "charbonnier", "smooth_l1")


@takes_inference_tensors
def feature_distance(
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    criterion: str = "l1",
    eps: float = 1e-6,
    beta: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Weighted distance between two lists of features, :math:`\sum_i w_i \cdot \mathrm{mean}\,c(f_i - t_i)`.

    Element by element, with d = f - t::

        "l1"            |d|                  (the default)
        "l2"            d^2
        "charbonnier"   sqrt(d^2 + eps^2)
        "smooth_l1"     d^2 / (2 beta) if |d| < beta, else |d| - beta / 2

    Args:
        features: one tensor a layer, any shapes, float16, bfloat16, float32 or float64, all on one device.
        targets: as many tensors of the same shapes. Both lists may need gradients.
        weights: one finite number a layer; None means 1 for each.
        criterion: the distance, see above.
        eps: smoothing of Charbonnier, in units of the features, > 0.
        beta: threshold of smooth L1, in units of the features, > 0.
        reduction: ``"mean"``: the mean over all elements of a layer, times its weight, added over the layers.
            ``"sum"``: the same with the sum over all elements. ``"none"``: one value a sample, ``[N]``, where the
            first dimension of every layer is N: the mean over the elements of that sample in a layer, times its
            weight, added over the layers; its mean over the samples is ``"mean"``.

    Returns:
        float32 (float64 if any feature is float64), whatever the input dtypes: a scalar, or ``[N]`` for ``"none"``.
        The gradient at d = 0 is 0 for every criterion. With ``"l1"`` the kernels keep two bits an element for the
        backward and neither list, and to autograd that gradient depends on the upstream gradient only.

    Raises:
        TypeError: an argument is no list of floating-point tensors, or a weight is no number. ValueError: lengths,
            shapes (the message names the layer), devices or options do not fit, or a mean over no elements.

    Source: Johnson, Alahi, Fei-Fei, "Perceptual losses for real-time style transfer and super-resolution", ECCV 2016
    (l2); the weighted sum of means over layers is what most training code uses, with ``l1``.

    Example:
        >>> features, targets = [torch.ones(2, 4, 8, 8), torch.ones(2, 8, 4, 4)], [torch.zeros(2, 4, 8, 8)] * 2
        >>> feature_distance(features, [targets[0], 0.5 * features[1]], weights=[1.0, 2.0]).item()
        2.0
    """
    op, args = feature_distance_call(
        features, targets, weights=weights, criterion=criterion, eps=eps, beta=beta, reduction=reduction
    )
    return op(*args)


def feature_distance_call(
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    weights: Sequence[float] | None,
    criterion: str,
    eps: float,
    beta: float,
    reduction: str,
) -> tuple[Op, tuple]:
    """The op that computes a `feature_distance`, and its arguments; raises where they do not fit."""
    features, targets = check_layers(features, targets)
    check_choice("criterion", criterion, CRITERIA)
    check_reduction(reduction)
    eps, beta = check_number("eps", eps, 0, open_low=True), check_number("beta", beta, 0, open_low=True)
    if reduction == "none":
        check_samples(features)
    if weights is None:
        weights = [1.0] * len(features)
    weights = check_weights(features, weights)
    for feature in features:
        empty_batch = reduction == "none" and feature.shape[0] == 0  # has no sample to give a value for
        if reduction != "sum" and not empty_batch:
            check_not_empty(feature.numel())
    parameter = beta if criterion == "smooth_l1" else eps
    return distance_call(features, targets, weights, criterion, parameter, reduction)


class FeatureDistance(Loss):
    """Module form of :func:`feature_distance`."""

    fn = staticmethod(feature_distance)
