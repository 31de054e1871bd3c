"""Mode seeking: push two images of one caption apart, as far as their noise is."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import Loss, check_not_empty, result_dtype
from ..core.checks import check_number, check_same_device, check_same_shape, check_tensor
from ..core.entry import public_function


def mode_seeking_reference(images_a: Tensor, images_b: Tensor, z_a: Tensor, z_b: Tensor, eps: float) -> Tensor:
    """The definition: 1 / (dI / dz + eps), and 0 with zero gradients at dz = 0."""
    dtype = result_dtype(images_a, images_b, z_a, z_b)
    d_image = (images_a.to(dtype) - images_b.to(dtype)).abs().mean()
    d_z = (z_a.to(dtype) - z_b.to(dtype)).abs().mean()
    same = d_z == 0
    ratio = d_image / torch.where(same, torch.ones_like(d_z), d_z)
    return torch.where(same, torch.zeros_like(ratio), 1 / (ratio + eps))


@public_function
def mode_seeking_loss(images_a: Tensor, images_b: Tensor, z_a: Tensor, z_b: Tensor, *, eps: float = 1e-5) -> Tensor:
    r"""Mode-seeking regulariser: two images of one caption must differ as much as their noises do.

    .. math:: L = \frac{1}{\frac{\mathrm{mean}|I_a - I_b|}{\mathrm{mean}|z_a - z_b|} + \epsilon}

    with the means over the whole batch. Equal noises cost nothing and get no gradient, equal images or not.

    Args:
        images_a, images_b: ``[N, ...]`` images made from the same conditions and the noises `z_a` and `z_b`.
        z_a, z_b: ``[N, ...]`` noises of one shape.
        eps: bound of the loss at equal images, 1 / eps, > 0.

    Returns:
        A float32 scalar (float64 for float64 inputs), from 0 to 1 / eps.

    Raises:
        TypeError: an argument is no floating-point tensor. ValueError: shapes or devices do not fit, eps <= 0, or the
            batch is empty.

    Source: Mao et al., "Mode seeking generative adversarial networks for diverse image synthesis", CVPR 2019 (MSGAN).

    Example:
        >>> mode_seeking_loss(torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2, 1), torch.ones(2, 1), eps=1.0).item()
        0.5
    """
    check_tensor("images_a", images_a)
    check_tensor("images_b", images_b)
    check_same_shape("images_a", images_a, "images_b", images_b)
    check_tensor("z_a", z_a)
    check_tensor("z_b", z_b)
    check_same_shape("z_a", z_a, "z_b", z_b)
    check_same_device("images_a", images_a, "z_a", z_a)
    if images_a.ndim < 1 or z_a.shape[:1] != images_a.shape[:1]:
        raise ValueError(
            f"z_a: expected one noise for each of the images, {tuple(images_a.shape)}, got {tuple(z_a.shape)}"
        )
    eps = check_number("eps", eps, 0, open_low=True)
    check_not_empty(images_a.numel() * z_a.numel())
    return mode_seeking_reference(images_a, images_b, z_a, z_b, eps)


class ModeSeekingLoss(Loss):
    """Module form of :func:`mode_seeking_loss`."""

    fn = staticmethod(mode_seeking_loss)
