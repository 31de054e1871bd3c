"""What the kernel files share: walking tensors in memory order, launch sizes, and the cases the compile checks run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

# 2048 elements on 128 threads: two (16 bit) or four (32 bit) 128-bit loads per tensor in flight in every thread.
STREAM_BLOCK = 2048
STREAM_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}  # the default of enable_fp_fusion changes in triton 3.10
# Programs of a reduction: eight per multiprocessor of a 132-SM device. Fixed, so that a sum has the same order on all.
REDUCE_PROGRAMS = 1056
_INT32_SPAN = 2**31 - REDUCE_PROGRAMS * STREAM_BLOCK


@dataclass
class AotCase:
    """One launcher call that the ahead-of-time check makes, with tensors on the meta device.

    `vector` and `matrix` name the kernels that must have 128-bit global accesses, or matrix instructions; `spills` are
    bytes of stack that a device was measured to be faster with.
    """

    label: str
    launch: Callable[..., Any]
    args: tuple
    vector: tuple[str, ...] = ()
    matrix: tuple[str, ...] = ()
    spills: int = 0


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


def broadcast_args(tensor: Tensor, model: Tensor) -> tuple:
    """Kernel arguments for reading `tensor` in the memory order of `model`: the tensor and, unless both lie alike,
    (inner, middle, s_inner, s_middle, s_outer) for :func:`broadcast_offsets`.

    Three runs cover every broadcast over up to two separate axes, e.g. [N,1,H,W] or [1,C,1,1]; beyond, it is copied.
    """
    found = runs(tensor, model)
    if found == [(model.numel(), 1)]:
        return (tensor,)
    if len(found) > 3:
        return (laid_out_as(tensor, model),)
    (inner, s_inner), (middle, s_middle), (_, s_outer) = [*found, (1, 0), (1, 0)][:3]
    return tensor, inner, middle, s_inner, s_middle, s_outer


def needs_int64(*tensors: Tensor | None) -> bool:
    """Whether an offset into one of the tensors, or one block past the last, does not fit 32 bits."""
    spans = (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in tensors if t is not None)
    return max(spans) >= _INT32_SPAN


def stream_grid(count: int, reduce: bool) -> tuple[int]:
    """Programs for `count` elements: one per block, or a bounded number that strides over the blocks."""
    blocks = triton.cdiv(count, STREAM_BLOCK)
    return (min(blocks, REDUCE_PROGRAMS) if reduce else blocks,)


def total(partials: Tensor) -> Tensor:
    """The second stage of a sum: fixed order, hence deterministic."""
    return partials.sum() if partials.numel() > 1 else partials.reshape(())


def registers(most: int) -> dict[str, int]:
    """The option that lets ptxas use this many: by itself it may spill a little at round numbers of its own choice."""
    if triton.knobs.runtime.interpret or driver.active.get_current_target().backend != "cuda":
        return {}
    return {"maxnreg": most}


def warp_size() -> int:
    """Lanes of a warp of the current device; of the interpreter as many as NVIDIA's."""
    return 32 if triton.knobs.runtime.interpret else driver.active.get_current_target().warp_size


def vector_block(element_size: int) -> int:
    """Elements that give each lane of a program with STREAM_OPTIONS 16 bytes."""
    return 16 // element_size * STREAM_OPTIONS["num_warps"] * warp_size()


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make that the tensor's, where it is another."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


@triton.jit
def broadcast_offsets(offsets, args):
    """Where the elements lie in a tensor given by `broadcast_args`."""
    rest = offsets // args[1]
    return (offsets % args[1]) * args[3] + (rest % args[2]) * args[4] + (rest // args[2]) * args[5]


@triton.jit
def load_broadcast(tensor, offsets, mask):
    """Elements of a tensor given by `broadcast_args`, as float32."""
    if len(tensor) > 1:
        offsets = broadcast_offsets(offsets, tensor)
    return tl.load(tensor[0] + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def sign(x):
    """-1, 0 or 1; 0 for NaN, as torch.sign has it."""
    one = ((x.to(tl.int32, bitcast=True) & -2147483648) | 0x3F800000).to(tl.float32, bitcast=True)
    # three instructions, where two comparisons make five; `> 0` of a difference becomes a comparison of its two terms,
    # made for all elements of a lane at once and packed into bits
    least = tl.full((), 1, tl.int32).to(tl.float32, bitcast=True)  # a literal as small would be float64
    return tl.where(tl.abs(x) >= least, one, 0.0)


@triton.jit
def weighted(x, weight):
    """A value times its weight: 0 where that is 0, which excludes even NaN."""
    return tl.where(weight != 0, x * weight, 0.0)


@triton.jit
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr = 0):
    """Sums that nothing has been added to: of ROWS elements, or of ROWS by COLS."""
    sums = ()
    for _ in tl.static_range(COUNT):
        if COLS == 0:
            none = tl.zeros((ROWS,), tl.float32)
        else:
            none = tl.zeros((ROWS, COLS), tl.float32)
        sums = sums + (none,)  # type: ignore[assignment]
    return sums


@triton.jit
def added(sums, terms):
    """A tuple of sums, a term added to each."""
    new = ()
    for i in tl.static_range(len(sums)):
        new = new + (sums[i] + terms[i],)  # type: ignore[assignment]
    return new
