"""The distance of an image from a whole bank: the soft-min or the mean of its distances, of which few are stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import Op, result_dtype
from .distances import Bank, mean_distance, moved, of_chunks, softmin_distance

KEPT = 2**23  # bytes of distances that the CPU kernels keep for the backward at most


class Inputs(NamedTuple):
    """Of the op. The kernels read the bank in tiles, in the backward once more."""

    generated: Tensor  # [N, P], float32 or float64
    bank: Tensor  # [M, P], floating point or uint8, M and P >= 1
    mode: str  # "softmin", or "mean", which for l2 and cosine is closed form: see `declines`
    metric: str  # "l1", "l2" or "cosine"
    temperature: float  # of the soft-min
    scale: float  # a row of the bank is scale * row + shift
    shift: float
    workspace_mib: float  # bound of the temporaries
    keep: bool  # of the soft-min: the distances, for a backward that need not make them again


class Saved(NamedTuple):
    """-t log(sum_j exp(-d_j / t) / M) = least - t log(powers / M); empty for the mean, the last without `keep` too."""

    least: Tensor  # [N]
    powers: Tensor  # [N]: sum_j exp((least - d_j) / t)
    distances: Tensor  # [N, M]: negative where two rows are so near that a product of them loses digits


class Grads(NamedTuple):
    generated: Tensor  # [N, P]


class Needs(NamedTuple):
    generated: bool


def bank_distance_reference(x: Inputs) -> Tensor:
    """The definition, a chunk of the bank at a time."""
    generated = x.generated.to(result_dtype(x.generated, x.bank))
    bank, workspace = Bank(x.bank, x.scale, x.shift), int(x.workspace_mib * 2**20)
    if x.mode == "mean":
        return mean_distance(generated, bank, x.metric, workspace)
    return softmin_distance(generated, bank, x.metric, x.temperature, workspace)


def _bank_distance_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    count = x.generated.shape[0]
    kept = count if x.mode == "softmin" else 0
    pairs = (count, x.bank.shape[0]) if x.keep and x.mode == "softmin" else (0, 0)
    new = x.generated.new_empty
    return new(count), Saved(new(kept), new(kept), new(pairs))


def _bank_distance_bwd(grad: Tensor, x: Inputs, saved: Saved, needs: Needs) -> Grads:
    return Grads(torch.empty_like(x.generated) if needs.generated else x.generated.new_empty(0))


bank_distance = Op(
    "bank_distance",
    fwd=_bank_distance_fwd,
    bwd=_bank_distance_bwd,
    reference=bank_distance_reference,
    grads=Grads._fields,
    outputs=("distance", *Saved._fields),
    triton="diversity.kernels.bank_distance",
)


def distance_from_bank(
    generated: Tensor, bank: Bank, mode: str, metric: str, temperature: float, workspace: int
) -> Tensor:
    """[N], of [N,P] and a bank in any strides and on any device. Means of l2 and cosine need no distances, only means
    over the bank, which PyTorch operators make as fast as memory gives them."""
    generated = generated.to(result_dtype(generated, bank.rows))
    x = Inputs(generated, bank.rows, mode, metric, temperature, bank.scale, bank.shift, workspace / 2**20, False)
    if mode == "mean" and metric != "l1":
        return bank_distance_reference(x)
    backend = bank_distance.backend(*x)
    few = 4 * generated.shape[0] * bank.rows.shape[0] <= min(KEPT, workspace // 4)
    needed = generated.requires_grad and torch.is_grad_enabled()
    x = x._replace(keep=backend == "cpp" and mode == "softmin" and few and needed)
    if backend == "reference" or (bank.rows.ndim == 2 and bank.rows.device == generated.device):
        return bank_distance(*x, backend=backend)
    spans = bank.spans(workspace // 2)
    found = of_chunks(_of_rows, generated, spans, x._replace(workspace_mib=workspace / 2**21))
    return merged(found, [count / bank.rows.shape[0] for _, count in spans], mode, temperature)


def _of_rows(generated: Tensor, span: tuple[int, int], x: Inputs) -> Tensor:
    """By the kernels, of some rows of the bank, which come to the device of the images and again in the backward."""
    rows = moved(Bank(x.bank, x.scale, x.shift).part(*span).rows, generated.device)
    return bank_distance(*x._replace(generated=generated, bank=rows))


def merged(distances: Sequence[Tensor], shares: Sequence[float], mode: str, temperature: float) -> Tensor:
    """[N]: the distance from a bank, of those from its parts [N] and their shares of its rows."""

    def mean(of_parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([each * share for each, share in zip(of_parts, shares, strict=True)]).sum(0)

    if mode == "mean":
        return mean(distances)
    every = torch.stack(list(distances))
    least = every.detach().amin(0)
    origin = torch.where(least.isinf(), torch.zeros_like(least), least)
    return origin - temperature * mean(torch.exp((origin - every) / temperature).unbind()).log()
