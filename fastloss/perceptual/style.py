"""Style distance: the Gram matrices of two lists of deep features compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import Loss, full_precision, result_dtype, transformed
from ..core.checks import check_choice, check_tensor
from ..core.entry import public_function
from .checks import check_layers, check_samples
from .feature_distance import feature_distance

NORMALIZATIONS = ("chw", "hw", "none")


class _Gram(torch.autograd.Function):
    """x x^T / count of a batch of matrices. Its gradient is one product, (G + G^T) x / count, where autograd's rule
    makes two. A power of two of the count, about its root, divides the product and only the rest the first factor:
    of float16 that factor would underflow alone, as a gradient of a mean over so many."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, normalization: str) -> Tensor:
        if ctx.needs_input_grad[0]:  # a target may be of inference mode, which lets nobody save it
            ctx.save_for_backward(x)
        ctx.normalization = normalization
        return _product(x, x.mT) / _count(x, normalization)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        later, count = 1.0, _count(x, ctx.normalization)
        if x.dtype == torch.float16:
            later = 2.0 ** -(int(count).bit_length() // 2)
        factor = ((grad + grad.mT) / (count * later)).to(x.dtype)
        if later == 1:
            return torch.bmm(factor, x), None
        return torch.baddbmm(x.new_zeros((1, 1, 1)), factor, x, beta=0, alpha=later), None


def _count(x: Tensor, normalization: str) -> int:
    """Z of a matrix [N, channels, pixels]; from its shape where it is needed: a symbolic number that goes into an
    autograd function ends torch.compile with an error where other sides are 1 (torch 2.14)."""
    _, channels, pixels = x.shape
    return {"chw": channels * pixels, "hw": pixels, "none": 1}[normalization] or 1  # of no pixels


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The batch of products, in float32 for half precision without rounding in between."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a, b)


@public_function
def gram_matrix(features: Tensor, *, normalization: str = "chw") -> Tensor:
    r"""Products of the channels of a feature map with one another, :math:`G_{ab} = \sum_p f_a(p) f_b(p) / Z`.

    The product is the library's (``torch.bmm``), and its gradient one further product.

    Args:
        features: ``[N,C,H,W]``, float16, bfloat16, float32 or float64.
        normalization: Z: ``"chw"``, C H W, as most training code has it; ``"hw"``, the number of pixels; ``"none"``, 1.

    Returns:
        ``[N,C,C]``, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: `features` is no 4-D floating-point tensor, or no such normalisation.

    Source: Gatys, Ecker, Bethge, "A neural algorithm of artistic style", 2015; Johnson et al., ECCV 2016 (C H W).

    Example:
        >>> gram_matrix(torch.ones(1, 2, 2, 3)).tolist()
        [[[0.5, 0.5], [0.5, 0.5]]]
    """
    check_tensor("features", features, 4)
    check_choice("normalization", normalization, NORMALIZATIONS)
    with full_precision(features):
        x = features.flatten(2)
        # on CUDA the product of 16-bit matrices is summed and returned in float32; the CPU's would be rounded
        x = x if features.is_cuda and not transformed() else x.to(result_dtype(x))
        if transformed():
            return _product(x, x.mT) / _count(x, normalization)
        return _Gram.apply(x, normalization)


@public_function
def style_distance(
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    criterion: str = "l1",
    normalization: str = "chw",
    eps: float = 1e-6,
    beta: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Distance of Gram matrices of two lists of features, :math:`\sum_i w_i \cdot \mathrm{mean}\,c(G(f_i) - G(t_i))`.

    Args:
        features: one tensor ``[N,C_i,H_i,W_i]`` a layer, float16, bfloat16, float32 or float64, all on one device.
        targets: as many tensors of the same shapes. Both lists may need gradients.
        normalization: what the products are divided by, see :func:`gram_matrix`.
        weights, criterion, eps, beta, reduction: as in :func:`feature_distance`, of the Gram matrices. Whoever passes
            sums over pixels (``normalization="none"``) wants small weights.

    Returns:
        float32 (float64 if any feature is float64): a scalar, or ``[N]`` for ``reduction="none"``.

    Raises:
        TypeError, ValueError: as :func:`feature_distance`, or no such normalisation.

    Source: Gatys et al. 2015; BasicSR's ``PerceptualLoss`` (its style part: ``"chw"`` with l1), piq's ``StyleLoss``
    (``"none"`` with l2 for its mse).

    Example:
        >>> style_distance([torch.ones(1, 2, 2, 3)], [torch.zeros(1, 2, 2, 3)]).item()
        0.5
    """
    features, targets = check_layers(features, targets, 4)
    check_samples(features)
    grams, wanted = ([gram_matrix(t, normalization=normalization) for t in side] for side in (features, targets))
    return feature_distance(
        grams, wanted, weights=weights, criterion=criterion, eps=eps, beta=beta, reduction=reduction
    )


class StyleDistance(Loss):
    """Module form of :func:`style_distance`."""

    fn = staticmethod(style_distance)
