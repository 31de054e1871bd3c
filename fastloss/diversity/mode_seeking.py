"""Mode seeking: push two images of one caption apart, as far as their noise is."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import Loss, Op, check_not_empty, result_dtype
from ..core.checks import check_choice, check_number, check_same_device, check_same_shape, check_tensor
from ..core.entry import public_function
from ..core.traced import number

FORMS = ("msgan", "dsgan")


class Inputs(NamedTuple):
    """Of the op: samples in rows, each pair in a dtype of its own."""

    images_a: Tensor  # [N, P]
    images_b: Tensor  # [N, P]
    z_a: Tensor  # [N, Q]
    z_b: Tensor  # [N, Q]
    form: str
    eps: float
    margin: float  # infinity: none


class Saved(NamedTuple):
    """The derivatives of the loss by each |a - b|: of a sample ("dsgan", K = N) or of all ("msgan", K = 1)."""

    of_images: Tensor  # [K] float32
    of_noises: Tensor  # [K] float32


class Grads(NamedTuple):
    images_a: Tensor
    images_b: Tensor
    z_a: Tensor
    z_b: Tensor


class Needs(NamedTuple):
    images_a: bool
    images_b: bool
    z_a: bool
    z_b: bool


def mode_seeking_reference(x: Inputs) -> Tensor:
    """The definition, with 0 and zero gradients where noises are equal."""
    return _per_sample(x) if x.form == "dsgan" else _of_batch(x)


def _of_batch(x: Inputs) -> Tensor:
    """MSGAN's: 1 / (dI / dz + eps)."""
    dtype = result_dtype(x.images_a, x.images_b, x.z_a, x.z_b)
    d_image = (x.images_a.to(dtype) - x.images_b.to(dtype)).abs().mean()
    d_z = (x.z_a.to(dtype) - x.z_b.to(dtype)).abs().mean()
    same = d_z == 0
    ratio = d_image / torch.where(same, torch.ones_like(d_z), d_z)
    return torch.where(same, torch.zeros_like(ratio), 1 / (ratio + number(x.eps, ratio)))


def _per_sample(x: Inputs) -> Tensor:
    """DSGAN's: the mean of -min(dI_i / (dz_i + eps), margin)."""
    dtype = result_dtype(x.images_a, x.images_b, x.z_a, x.z_b)
    d_image = (x.images_a.to(dtype) - x.images_b.to(dtype)).abs().mean(1)
    d_z = (x.z_a.to(dtype) - x.z_b.to(dtype)).abs().mean(1)
    ratio = torch.where(d_z == 0, torch.zeros_like(d_image), d_image) / (d_z + number(x.eps, d_z))
    return -(ratio if x.margin == math.inf else ratio.clamp(max=number(x.margin, ratio))).mean()


def _mode_seeking_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    kept = x.images_a.shape[0] if x.form == "dsgan" else 1
    one, other = (x.images_a.new_empty(kept, dtype=torch.float32) for _ in range(2))
    return x.images_a.new_empty((), dtype=torch.float32), Saved(one, other)


def _mode_seeking_bwd(grad: Tensor, x: Inputs, saved: Saved, needs: Needs) -> Grads:
    def gradient(t: Tensor, needed: bool) -> Tensor:
        return t.new_empty(t.shape if needed else 0)

    return Grads(
        gradient(x.images_a, needs.images_a),
        gradient(x.images_b, needs.images_b),
        gradient(x.z_a, needs.z_a),
        gradient(x.z_b, needs.z_b),
    )


mode_seeking = Op(
    "mode_seeking",
    fwd=_mode_seeking_fwd,
    bwd=_mode_seeking_bwd,
    reference=mode_seeking_reference,
    grads=Grads._fields,
    outputs=("out", *Saved._fields),
    triton="diversity.kernels.mode_seeking",
)


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
    images, noises = _rows(images_a, images_b), _rows(z_a, z_b)
    return mode_seeking(*Inputs(*images, *noises, form, eps, math.inf if margin is None else margin))


def _rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors [N, ...] as [N, P] of one dtype, in any one order of the elements: images that both lie with their
    channels last are not copied."""
    if a.dtype != b.dtype:
        dtype = torch.promote_types(a.dtype, b.dtype)
        a, b = a.to(dtype), b.to(dtype)
    if a.ndim == 4 and all(t.is_contiguous(memory_format=torch.channels_last) for t in (a, b)):
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)


class ModeSeekingLoss(Loss):
    """Module form of :func:`mode_seeking_loss`."""

    fn = staticmethod(mode_seeking_loss)
