"""An op that returns sum_k factors[k] * sums[k] of another op, in one, to save launches on a GPU.

    scaled_sum = ScaledSum(op, ...)     where the loss defines its op
    scaled_sum(*inputs, factors)        sum_k factors[k] * (the op's sums of the k-th kind, e.g. along axis k)

It is for Triton alone. In torch each factor would be one more launch, forward and backward; here they go to the kernels
as numbers, and one tiny launch after the op's kernel adds up. The kernels' module has for it

    <name>_total_fwd(x: Inputs, factors: list[float]) -> Tensor
    <name>_total_bwd(grad: Tensor, x: Inputs, needs: Needs, factors: list[float]) -> Grads

of which the forward ends with `total_of` in core/kernels/scaled_sum.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .op import Op
from .structs import flattened
from .traced import with_parameter


class ScaledSum(Op):
    """See above. `fwd`, `bwd` and `reference` are the op's own; the last dimension of its sums is their kind."""

    def __init__(self, op: Op, *, fwd: Callable, bwd: Callable, reference: Callable, triton: str) -> None:
        fwd, bwd, reference = flattened(fwd), flattened(bwd), flattened(reference)

        def total_fwd(*args: Any) -> Tensor:
            return fwd(*args[:-1]).new_empty(())

        def total_bwd(*args: Any) -> Any:
            return bwd(*args[:-1])

        def total_reference(*args: Any) -> Tensor:
            *inputs, factors = args
            sums = reference(*inputs).reshape(-1, len(factors)).sum(0)
            return sum(factor * one for factor, one in zip(factors, sums.unbind(), strict=True))

        super().__init__(
            f"{op.name}_total",
            fwd=with_parameter(fwd, "factors", list[float], total_fwd, Tensor),
            bwd=with_parameter(bwd, "factors", list[float], total_bwd),
            reference=total_reference,
            grads=op.grads,
            triton=triton,
        )
