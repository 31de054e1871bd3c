"""Mode seeking: push two images of one caption apart, as far as their noise is."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import Loss, check_not_empty, result_dtype
from ..core.checks import check_choice, check_number, check_same_device, check_same_shape, check_tensor
from ..core.entry import public_function
from ..core.traced import number

FORMS = ("msgan", "dsgan")


def mode_seeking_reference(images_a: Tensor, images_b: Tensor, z_a: Tensor, z_b: Tensor, eps: float) -> Tensor:
    """MSGAN's definition: 1 / (dI / dz + eps), and 0 with zero gradients at dz = 0."""
    dtype = result_dtype(images_a, images_b, z_a, z_b)
    d_image = (images_a.to(dtype) - images_b.to(dtype)).abs().mean()
    d_z = (z_a.to(dtype) - z_b.to(dtype)).abs().mean()
    same = d_z == 0
    ratio = d_image / torch.where(same, torch.ones_like(d_z), d_z)
    return torch.where(same, torch.zeros_like(ratio), 1 / (ratio + eps))


def per_sample_reference(
    images_a: Tensor, images_b: Tensor, z_a: Tensor, z_b: Tensor, eps: float, margin: float | None
) -> Tensor:
    """DSGAN's definition: the mean of -min(dI_i / (dz_i + eps), margin), and 0 with zero gradients where dz_i = 0."""
    dtype = result_dtype(images_a, images_b, z_a, z_b)
    d_image = (images_a.to(dtype) - images_b.to(dtype)).abs().reshape(len(z_a), -1).mean(1)
    d_z = (z_a.to(dtype) - z_b.to(dtype)).abs().reshape(len(z_a), -1).mean(1)
    ratio = torch.where(d_z == 0, torch.zeros_like(d_image), d_image) / (d_z + eps)
    return -(ratio if margin is None else ratio.clamp(max=number(margin, ratio))).mean()


@public_function
def mode_seeking_loss(
    images_a: Tensor,
    images_b: Tensor,
    z_a: Tensor,
    z_b: Tensor,
    *,
    form: str = "msgan",
    eps: float = 1e-5,
    margin: float | None = None,
) -> Tensor:
    r"""Mode-seeking regulariser: two images of one caption must differ as much as their noises do.

    ::

        "msgan"   1 / ( mean|I_a - I_b| / mean|z_a - z_b| + eps )                            the means over the batch
        "dsgan"   - mean_i min( mean|I_a,i - I_b,i| / ( mean|z_a,i - z_b,i| + eps ), margin )   over a sample

    Equal noises cost nothing and get no gradient, equal images or not: of the batch ("msgan") or of a sample ("dsgan").

    Args:
        images_a, images_b: ``[N, ...]`` images made from the same conditions and the noises `z_a` and `z_b`. All four
            get gradients; DSGAN's own code differentiates one image: pass the other detached.
        z_a, z_b: ``[N, ...]`` noises of one shape.
        form: ``"msgan"`` is bounded by 1 / eps, ``"dsgan"`` only with a margin.
        eps: > 0, see above; with ``"msgan"`` the bound of the loss at equal images is 1 / eps.
        margin: for ``"dsgan"``: None, or the ratio > 0 from which on a pair gains nothing more.

    Returns:
        A float32 scalar (float64 for float64 inputs): from 0 to 1 / eps, or with ``"dsgan"`` from -margin to 0.

    Raises:
        TypeError: an argument is no floating-point tensor. ValueError: shapes or devices do not fit, eps or margin
            <= 0, a margin with ``"msgan"``, or the batch is empty.

    Source: Mao et al., "Mode seeking generative adversarial networks for diverse image synthesis", CVPR 2019 (MSGAN);
    Yang et al., "Diversity-sensitive conditional generative adversarial networks", ICLR 2019 (DSGAN).

    Example:
        >>> images, noises = (torch.zeros(2, 3), torch.ones(2, 3)), (torch.zeros(2, 1), torch.ones(2, 1))
        >>> mode_seeking_loss(*images, *noises, eps=1.0).item()
        0.5
        >>> mode_seeking_loss(*images, *noises, eps=1.0, form="dsgan").item()
        -0.5
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
    check_choice("form", form, FORMS)
    eps = check_number("eps", eps, 0, open_low=True)
    if margin is not None:
        margin = check_number("margin", margin, 0, open_low=True)
        if form != "dsgan":
            raise ValueError(f'margin: expected None with form="{form}", which is bounded, got {margin}')
    check_not_empty(images_a.numel() * z_a.numel())
    if form == "dsgan":
        return per_sample_reference(images_a, images_b, z_a, z_b, eps, margin)
    return mode_seeking_reference(images_a, images_b, z_a, z_b, eps)


class ModeSeekingLoss(Loss):
    """Module form of :func:`mode_seeking_loss`."""

    fn = staticmethod(mode_seeking_loss)
