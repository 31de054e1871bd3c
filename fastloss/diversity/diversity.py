"""Diversity: push generated images away from a bank of training images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..core import Loss, check_reduction, full_precision, reduce, result_dtype
from ..core.checks import check_choice, check_number, check_same_device, check_tensor, check_workspace
from ..core.entry import public_function

MODES = ("nearest", "softmin", "mean")
METRICS = ("l1", "l2", "cosine")
_TEMPORARIES = 4  # tensors of a chunk's size that live at once: difference, distance and their gradients


def _chunk_distances(generated: Tensor, rows: Tensor, metric: str) -> Tensor:
    """[N,P] against [m,P]: the [N,m] distances."""
    rows = rows.to(generated.dtype)
    if metric == "cosine":
        with full_precision(generated):
            return 1 - _unit(generated) @ _unit(rows).T
    d = generated[:, None] - rows
    return (d.abs() if metric == "l1" else d * d).mean(-1)


def _paired_distances(generated: Tensor, rows: Tensor, metric: str) -> Tensor:
    """[N,P] against its own rows [N,P]: the [N] distances, by direct differences."""
    rows = rows.to(generated.dtype)
    if metric == "cosine":
        return 1 - (_unit(generated) * _unit(rows)).sum(-1)
    d = generated - rows
    return (d.abs() if metric == "l1" else d * d).mean(-1)


def _unit(x: Tensor) -> Tensor:
    """Rows of length 1; a zero row stays zero and gets a zero gradient."""
    zero = x.detach().norm(dim=-1, keepdim=True) == 0
    safe = torch.where(zero, torch.ones_like(x), x)
    return torch.where(zero, torch.zeros_like(x), safe / safe.norm(dim=-1, keepdim=True))


def _bank_distances(generated: Tensor, bank: Tensor, metric: str, workspace: int) -> Tensor:
    """All [N,M] distances, a chunk of bank rows at a time; the backward recomputes the chunks one by one."""
    count, pixels = generated.shape
    row_bytes = _TEMPORARIES * pixels * generated.element_size() * (1 if metric == "cosine" else count)
    size = min(max(workspace // max(row_bytes, 1), 1), bank.shape[0])
    chunks = [bank[start : start + size] for start in range(0, bank.shape[0], size)]
    if len(chunks) == 1:
        return _chunk_distances(generated, bank, metric)
    plain = not (torch.is_grad_enabled() and generated.requires_grad)
    if plain or torch._C._are_functorch_transforms_active():  # functorch takes no checkpoints
        return torch.cat([_chunk_distances(generated, chunk, metric) for chunk in chunks], 1)
    return torch.cat(
        [
            checkpoint(_chunk_distances, generated, chunk, metric, use_reentrant=False, preserve_rng_state=False)
            for chunk in chunks
        ],
        1,
    )


def diversity_reference(
    generated: Tensor, bank: Tensor, mode: str, metric: str, temperature: float, workspace: int
) -> Tensor:
    """The definition: D(g_i, bank) of [N,P] images and an [M,P] bank, in float32 (float64 for float64)."""
    generated = generated.to(result_dtype(generated, bank))
    if mode == "nearest":  # search without a graph, then differentiate the one distance that won
        with torch.no_grad():
            nearest = _bank_distances(generated.detach(), bank, metric, workspace).argmin(1)
        return _paired_distances(generated, bank[nearest], metric)
    distances = _bank_distances(generated, bank, metric, workspace)
    if mode == "mean":
        return distances.mean(1)
    least = distances.detach().amin(1, keepdim=True)  # exponents of small differences, so that they round little
    powers = torch.exp((least - distances) / temperature)
    return least[:, 0] - temperature * powers.mean(1).log()


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
    workspace_mib: int = 256,
) -> Tensor:
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
        bank: ``[M, ...]`` training images of the same trailing shape, M >= 1. It gets no gradient, by design.
        mode: how the distances to the bank become one, see above.
        margin: None, or the distance > 0 beyond which an image costs nothing.
        metric: the distance, see above.
        temperature: softness of ``"softmin"`` in units of the distance, > 0.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` for the ``[N]`` losses.
        workspace_mib: bound of the temporaries, >= 1: the bank is read in chunks whose ``[N, rows, ...]``
            differences fit in it (one bank row at a time where even that is too large). The backward recomputes
            them, and ``"nearest"`` differentiates the winning distances only. The ``[N, M]`` distances come on top.

    Returns:
        float32 (float64 for float64 inputs). The gradient is 0 where an element equals the bank's (l1), for zero
        images (cosine), and beyond the margin; of equally near images the first gets it.

    Raises:
        TypeError: an argument is no floating-point tensor. ValueError: shapes, devices or options do not fit, the
            bank is empty or requires a gradient, or ``"mean"`` of an empty batch.

    Source: Imagen's "maximise the difference between generated and training-set images"; the nearest neighbour as the
    test for memorised images; margin as in Yang et al., "Diversity-sensitive conditional GANs", ICLR 2019.

    Example:
        >>> diversity_loss(torch.full((1, 4), 0.5), torch.tensor([[0.0] * 4, [1.5] * 4])).item()
        -0.5
    """
    check_tensor("generated", generated)
    check_tensor("bank", bank)
    if generated.ndim < 1 or generated.shape[1:] != bank.shape[1:] or bank.ndim != generated.ndim:
        raise ValueError(
            f"bank: expected [M, ...] with the trailing shape of generated, {tuple(generated.shape)}, "
            f"got {tuple(bank.shape)}"
        )
    check_same_device("generated", generated, "bank", bank)
    if bank.shape[0] == 0 or bank[0].numel() == 0:
        raise ValueError(f"bank: expected at least one image of at least one element, got {tuple(bank.shape)}")
    if bank.requires_grad:
        raise ValueError("bank: no gradient is provided for it; pass bank.detach()")
    check_choice("mode", mode, MODES)
    check_choice("metric", metric, METRICS)
    temperature = check_number("temperature", temperature, 0, open_low=True)
    workspace = int(check_workspace(workspace_mib, 1, open_low=False) * 2**20)
    check_reduction(reduction)
    if margin is not None:
        margin = check_number("margin", margin, 0, open_low=True)
    size = bank[0].numel()  # of an image: 1 where generated is [N]
    distance = diversity_reference(
        generated.reshape(-1, size), bank.reshape(-1, size), mode, metric, temperature, workspace
    )
    return reduce(-distance if margin is None else (-distance + margin).relu(), reduction)


class DiversityLoss(Loss):
    """Module form of :func:`diversity_loss`."""

    fn = staticmethod(diversity_loss)
