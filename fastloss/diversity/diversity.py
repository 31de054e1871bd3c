"""Diversity: push generated images away from a bank of training images."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..core import Loss, check_reduction, reduce, result_dtype
from ..core.checks import (
    check_choice,
    check_dense,
    check_flag,
    check_number,
    check_tensor,
    check_workspace,
)
from ..core.entry import public_function
from .bank_distance import distance_from_bank
from .distances import METRICS, Bank
from .nearest import Inputs, Nearest, nearest, nearest_in_pieces, nearest_with_row

if TYPE_CHECKING:
    from ..distributed.exchange import Exchange, Group

MODES = ("nearest", "softmin", "mean")


class Search(NamedTuple):
    """How images are compared with a bank."""

    mode: str
    metric: str
    temperature: float
    workspace: int  # bytes
    with_row: bool  # whether the nearest row's number is asked for


def distances(generated: Tensor, bank: Bank, search: Search) -> Nearest:
    """D of images [N,P]; a row only where it is asked for."""
    mode, metric, temperature, workspace, with_row = search
    if mode != "nearest":
        return Nearest(distance_from_bank(generated, bank, mode, metric, temperature, workspace), generated)
    generated = generated.to(result_dtype(generated, bank.rows))
    if bank.rows.ndim > 2 or bank.rows.device != generated.device:
        return nearest_in_pieces(generated, bank, metric, workspace)
    return _nearest(Inputs(generated, bank.rows, metric, bank.scale, bank.shift, workspace / 2**20), with_row)


@public_function
def diversity_loss(
    generated: Tensor,
    bank: Tensor,
    *,
    mode: str = "nearest",
    margin: float | None = None,
    metric: str = "l1",
    temperature: float = 0.01,
    reduction: str = "mean",
    bank_scale: float | None = None,
    bank_shift: float = 0.0,
    return_nearest: bool = False,
    workspace_mib: int = 256,
    group: Group = None,
    exchange: Exchange | None = None,
) -> Any:
    r"""Reward for generated images that differ from the training-set images of a bank.

    Per generated image, :math:`L_i = -D(g_i, T)`, or :math:`\max(0, m - D(g_i, T))` with a margin m. D is, over the
    distances :math:`d_{ij}` to the M images of the bank::

        "nearest"   min_j d_ij                                      (the default: do not copy a training image)
        "softmin"   -t log( 1/M sum_j exp(-d_ij / t) )              (t -> 0: nearest; t -> infinity: mean)
        "mean"      1/M sum_j d_ij                                  (for l2 this only pushes away from the mean image)

    and d is a mean over the elements of an image, so that it does not depend on the image size::

        "l1"        mean |g - t|           in units of the image (the default)
        "l2"        mean (g - t)^2         in squared units: the mean squared error, no root
        "cosine"    1 - cos(g, t)          from 0 to 2, and 1 where either is all zeros

    Without a margin the loss is unbounded below (l1, l2): the best images are infinitely far from the bank. Use a
    small weight, or a margin, which also says how far is far enough.

    Args:
        generated: ``[N, ...]`` images (or features) in the value range of the bank.
        bank: ``[M, ...]`` training images of the same trailing shape, M >= 1. It gets no gradient, by design. Floating
            point of any dtype, or uint8 with a `bank_scale`. It may lie on another device than `generated` and in a
            memory map (``torch.from_numpy(numpy.memmap(...))``, ``torch.from_file``), in any strides: it comes a piece
            at a time, within `workspace_mib`, from its first row to its last, once (twice for ``"mean"`` of l2, and
            once more in the backward of ``"softmin"`` and the ``"mean"`` of l1).
        mode: how the distances to the bank become one, see above.
        margin: None, or the distance > 0 beyond which an image costs nothing.
        metric: the distance, see above.
        temperature: softness of ``"softmin"`` in units of the distance, > 0.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` for the ``[N]`` losses.
        bank_scale: the images are ``bank_scale * bank + bank_shift``, computed as they are read: 1 / 255 for bytes of
            images from 0 to 1. None is 1, which a uint8 bank does not take.
        bank_shift: see `bank_scale`, in units of the image.
        return_nearest: also return which image of the bank is nearest to each generated one and how far, whatever the
            reduction and the margin; for ``mode="nearest"``. A check for memorised images.
        workspace_mib: bound of the temporaries, >= 1: the bank is read in chunks whose ``[N, rows, ...]``
            differences fit in it (one bank row at a time where even that is too large). The backward recomputes
            them, and ``"nearest"`` differentiates the winning distances only. No mode stores the ``[N, M]`` distances,
            and ``"mean"`` of l2 and cosine makes none: means over the bank are all that it needs. The kernels
            compare 8 bank rows or more at a time, on a GPU 64, and need up to 8 MiB, the backward of ``"softmin"``
            and the ``"mean"`` of l1 on a GPU up to eight times the images besides.
        group: None, or a ProcessGroup or 1-D DeviceMesh. The bank is then that of all of its ranks, each of which has
            some of the rows (their numbers may differ and be 0), and `generated` are this rank's images (their numbers
            may differ too). Images travel, the bank does not. The loss is that of all images, on every rank, its
            gradients are for DDP's average, and the nearest `row` counts through the ranks' rows in their order.
        exchange: see :class:`fastloss.Exchange`: `gradients`, and `rows` of ``"generated"`` and ``"bank"``, which
            torch.compile must know; without it the ranks tell each other. All images are gathered at once.

    Returns:
        float32 (float64 for float64 inputs), or with `return_nearest` a tuple of that and a tuple
        ``(distance, row)`` of ``[N]`` tensors, without gradients. The gradient is 0 where an element equals the
        bank's (l1), for zero images (cosine), and beyond the margin; of equally near images the first gets it.

    Raises:
        TypeError: an argument is no floating-point tensor. ValueError: shapes, devices or options do not fit, the
            bank is empty, requires a gradient or is uint8 without a scale, `return_nearest` with another mode, or
            ``"mean"`` of an empty batch.

    Source: Imagen's "maximise the difference between generated and training-set images"; the nearest neighbour as the
    test for memorised images; margin as in Yang et al., "Diversity-sensitive conditional GANs", ICLR 2019.

    Example:
        >>> diversity_loss(torch.full((1, 4), 0.5), torch.tensor([[0.0] * 4, [1.5] * 4])).item()
        -0.5
    """
    scale, shift, size = _check_images(generated, bank, bank_scale, bank_shift, group is not None)
    check_choice("mode", mode, MODES)
    check_choice("metric", metric, METRICS)
    temperature = check_number("temperature", temperature, 0, open_low=True)
    workspace = int(check_workspace(workspace_mib, 1, open_low=False) * 2**20)
    check_reduction(reduction)
    if margin is not None:
        margin = check_number("margin", margin, 0, open_low=True)
    if check_flag("return_nearest", return_nearest) and mode != "nearest":
        raise ValueError(f'return_nearest: expected False with mode="{mode}"; "nearest" finds the nearest image')
    search = Search(mode, metric, temperature, workspace, return_nearest)
    images, rows = generated.reshape(-1, size), Bank(_rows(bank, size), scale, shift)
    meeting: Any = None
    if group is None:
        found = distances(images, rows, search)
    else:
        from ..distributed.sharded_bank import distances_of_all

        options = {"reduction": reduction, "margin": margin}
        found, meeting = distances_of_all(images, rows, search, distances, options, group, exchange)
    loss = -found.distance if margin is None else (-found.distance + margin).relu()
    loss = reduce(loss, reduction) if group is None else meeting.ranks.reduced(loss, None, reduction, meeting.counts)
    return (loss, found._replace(distance=found.distance.detach())) if return_nearest else loss


def _rows(bank: Tensor, size: int) -> Tensor:
    """[M,P] where that takes no copy of the bank, else [M,...] as it is."""
    return bank.reshape(-1, size) if bank.ndim < 3 or bank[:1].is_contiguous() else bank


def _check_images(
    generated: Tensor, bank: Tensor, scale: float | None, shift: float, sharded: bool
) -> tuple[float, float, int]:
    """The bank's scale and shift, and the elements of an image; a `sharded` bank may have no rows here."""
    check_tensor("generated", generated)
    scale, shift = _check_bank(generated, bank, scale, shift)
    if generated.ndim < 1 or generated.shape[1:] != bank.shape[1:] or bank.ndim != generated.ndim:
        raise ValueError(
            f"bank: expected [M, ...] with the trailing shape of generated, {tuple(generated.shape)}, "
            f"got {tuple(bank.shape)}"
        )
    size = math.prod(bank.shape[1:])  # elements of an image: 1 where generated is [N]
    if size == 0 or (bank.shape[0] == 0 and not sharded):
        raise ValueError(f"bank: expected at least one image of at least one element, got {tuple(bank.shape)}")
    if bank.requires_grad:
        raise ValueError("bank: no gradient is provided for it; pass bank.detach()")
    return scale, shift, size


def _check_bank(generated: Tensor, bank: Tensor, scale: float | None, shift: float) -> tuple[float, float]:
    """The scale and the shift of a bank that they fit."""
    if type(bank).__module__.split(".")[0] == "numpy":
        raise TypeError(f"bank: expected a tensor, got numpy's {type(bank).__name__}; pass torch.from_numpy(bank)")
    check_dense("bank", bank)
    if bank.is_meta and not generated.is_meta:
        raise ValueError("bank: expected a device that has its values, got meta")
    if bank.dtype != torch.uint8:
        check_tensor("bank", bank)
    elif scale is None:
        raise ValueError(
            "bank_scale: expected the number that makes a uint8 bank's values those of generated, "
            "1 / 255 for images from 0 to 1, got None"
        )
    number = 1.0 if scale is None else check_number("bank_scale", scale)
    if number == 0:
        raise ValueError("bank_scale: expected a number other than 0, got 0")
    return number, check_number("bank_shift", shift)


def _nearest(x: Inputs, with_row: bool) -> Nearest:
    """The distance of each image from its nearest one, and on request which that is."""
    backend = nearest.backend(*x)
    if not with_row:
        return Nearest(nearest(*x, backend=backend), x.generated)
    if backend == "reference":
        return nearest_with_row(x)
    return Nearest(*nearest.fwd(*x))


class DiversityLoss(Loss):
    """Module form of :func:`diversity_loss`."""

    fn = staticmethod(diversity_loss)
