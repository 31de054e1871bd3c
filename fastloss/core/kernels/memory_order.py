"""Walking tensors in memory order: runs, layouts, broadcasts, the width of offsets."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import REDUCE_PROGRAMS, STREAM_BLOCK

_INT32_SPAN = 2**31 - REDUCE_PROGRAMS * STREAM_BLOCK


def runs(tensor: Tensor, model: Tensor) -> list[tuple[int, int]]:
    """The (size, stride) runs of `tensor`, innermost first, when it is walked in the memory order of `model`.

    ``[(numel, 1)]`` says that both lie alike in memory, ``[(numel, 0)]`` that one element stands for all.
    """
    merged: list[tuple[int, int]] = []
    dims = (d for d in zip(model.stride(), tensor.shape, tensor.stride(), strict=True) if d[1] != 1)
    for _, size, stride in sorted(dims, key=lambda d: d[0]):
        if merged and stride == merged[-1][0] * merged[-1][1]:
            merged[-1] = (merged[-1][0] * size, merged[-1][1])
        else:
            merged.append((size, stride))
    return merged or [(1, 1)]


def dense(tensor: Tensor) -> Tensor:
    """`tensor` itself where its elements fill their memory without gaps, in any order; else a copy that does."""
    return tensor if runs(tensor, tensor) == [(tensor.numel(), 1)] else tensor.clone()


def laid_out_as(tensor: Tensor, model: Tensor) -> Tensor:
    """`tensor` in the memory order of the dense `model`, copied only if it lies differently."""
    if runs(tensor, model) == [(model.numel(), 1)]:
        return tensor
    return torch.empty_like(model, dtype=tensor.dtype).copy_(tensor)


class Broadcast(NamedTuple):
    """A tensor that a kernel reads in the memory order of another: three runs of elements, each with its stride.

    Where both lie alike in memory there is nothing but the pointer; of no tensor, not even that. (Triton 3.6 cannot ask
    whether a named tuple with None in it is None.)
    """

    ptr: Tensor | None
    inner: int | None = None  # elements of the innermost run
    middle: int | None = None
    inner_stride: int | None = None
    middle_stride: int | None = None
    outer_stride: int | None = None


def broadcast_args(tensor: Tensor | None, model: Tensor) -> Broadcast:
    """`tensor`, or none, as a kernel argument, to be read in the memory order of `model`.

    Three runs cover every broadcast over up to two separate axes, e.g. [N,1,H,W] or [1,C,1,1]; beyond, it is copied.
    """
    if tensor is None:
        return Broadcast(None)
    found = runs(tensor, model)
    if found == [(model.numel(), 1)]:
        return Broadcast(tensor)
    if len(found) > 3:
        return Broadcast(laid_out_as(tensor, model))
    (inner, inner_stride), (middle, middle_stride), (_, outer_stride) = [*found, (1, 0), (1, 0)][:3]
    return Broadcast(tensor, inner, middle, inner_stride, middle_stride, outer_stride)


def needs_int64(*tensors: Tensor | None) -> bool:
    """Whether an offset into one of the tensors, or one block past the last, does not fit 32 bits."""
    spans = (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in tensors if t is not None)
    return max(spans) >= _INT32_SPAN


@triton.jit
def broadcast_offsets(offsets, tensor):
    """Where in a `Broadcast` that is not laid out alike the elements lie."""
    rest = offsets // tensor.inner
    inner = (offsets % tensor.inner) * tensor.inner_stride
    return inner + (rest % tensor.middle) * tensor.middle_stride + (rest // tensor.middle) * tensor.outer_stride


@triton.jit
def load_broadcast(tensor, offsets, mask):
    """Elements of a `Broadcast`, as float32."""
    if tensor.inner is not None:
        offsets = broadcast_offsets(offsets, tensor)
    return tl.load(tensor.ptr + offsets, mask=mask, other=0.0).to(tl.float32)
