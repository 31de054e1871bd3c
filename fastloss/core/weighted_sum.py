"""sum_k weights[k] values[k] of a few numbers on a GPU, in one launch each way.

In torch each weight is a launch, forward and backward; here they go to the kernel as numbers. For Triton alone.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .op import Op


class Inputs(NamedTuple):
    values: Tensor  # [K] float32
    weights: list[float]  # K


class Grads(NamedTuple):
    values: Tensor


def weighted_sum_reference(x: Inputs) -> Tensor:
    each = zip(x.weights, x.values.unbind(), strict=True)
    return sum((weight * value for weight, value in each), start=x.values.new_zeros(()))


def _weighted_sum_fwd(x: Inputs) -> Tensor:
    return x.values.new_empty(())


def _weighted_sum_bwd(grad: Tensor, x: Inputs) -> Grads:
    return Grads(grad.new_empty(len(x.weights)))


weighted_sum = Op(
    "weighted_sum",
    fwd=_weighted_sum_fwd,
    bwd=_weighted_sum_bwd,
    reference=weighted_sum_reference,
    grads=Grads._fields,
    triton="core.kernels.scaled_sum",
)
