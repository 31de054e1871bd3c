"""Matrix products of a library, for kernels that leave them to it: padded operands, float32 sums."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def embeddings(x: Tensor) -> Tensor:
    """`x` contiguous, aligned, and its rows padded with zeros to a multiple of 16 elements.

    One row of any stride is contiguous to torch; the copy engine wants that stride to be a multiple of 16 bytes too.
    """
    if x.shape[1] % 16:
        return F.pad(x, (0, -x.shape[1] % 16))
    x = x.contiguous()
    dense = x.data_ptr() % 16 == 0 and x.stride() == (x.shape[1], 1)
    return x if dense else x.clone(memory_format=torch.contiguous_format)


def add_product(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """out (+)= a @ b; float32 sums of half-precision products."""
    if not a.is_cuda:  # the interpreter
        a, b = a.to(out.dtype), b.to(out.dtype)
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out) if first else out.addmm_(a, b)
    elif first:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
