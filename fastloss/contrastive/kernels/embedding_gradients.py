"""The gradients of embeddings, and of their scales, from float32 sums over blocks of G."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.device_math import number_in
from ...core.kernels.launch import STREAM_BLOCK, STREAM_OPTIONS, odd_number

SUM_ROWS, SUM_DIM = 8, 256  # embeddings of a program, numbers of each at a time


class SumSizes(NamedTuple):
    rows: int  # an odd_number
    dim: int
    pitch: int  # elements from one embedding to the next


@triton.jit
def _gradients_from_sums_kernel(
    sum_ptr,  # (rows, D) float32, contiguous: a gradient times the fp16 scale
    x_ptr,  # (rows, D), rows `pitch` apart: the embeddings it belongs to
    grad_ptr,  # (rows, D) contiguous: the gradient, or None
    scale_ptr,  # (rows,): scale of the embeddings, or None
    dot_ptr,  # (rows,): its gradient, or None; without a scale <x, gradient>
    fp16_scale_ptr,  # (1,) or None
    sizes,  # SumSizes
    NORMALIZE: tl.constexpr,  # the gradient has no part along x, as that of x / |x|
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < number_in(sizes.rows)
    line = row.to(tl.int64)[:, None]
    dot = tl.zeros((ROWS,), tl.float32)
    inverse_scale = 1.0
    if fp16_scale_ptr is not None:
        inverse_scale = 1.0 / tl.load(fp16_scale_ptr)
    square = tl.zeros((ROWS,), tl.float32)
    if NORMALIZE or dot_ptr is not None:
        for start in range(0, sizes.dim, DIM):
            inner = start + tl.arange(0, DIM)[None, :]
            mask = inside[:, None] & (inner < sizes.dim)
            x = tl.load(x_ptr + line * sizes.pitch + inner, mask=mask, other=0.0).to(tl.float32)
            dot += tl.sum(x * (tl.load(sum_ptr + line * sizes.dim + inner, mask=mask, other=0.0) * inverse_scale), 1)
            square += tl.sum(x * x, 1)
    if grad_ptr is not None:
        along = tl.where(square > 0.0, dot / square, 0.0)
        for start in range(0, sizes.dim, DIM):
            inner = start + tl.arange(0, DIM)[None, :]
            mask = inside[:, None] & (inner < sizes.dim)
            value = tl.load(sum_ptr + line * sizes.dim + inner, mask=mask, other=0.0) * inverse_scale
            if NORMALIZE:
                x = tl.load(x_ptr + line * sizes.pitch + inner, mask=mask, other=0.0).to(tl.float32)
                value -= along[:, None] * x
            tl.store(grad_ptr + line * sizes.dim + inner, value.to(grad_ptr.dtype.element_ty), mask=mask)
    if dot_ptr is not None:
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + row, mask=inside, other=1.0)
            dot = tl.where(scale == 0, 0.0, dot / tl.where(scale == 0, 1.0, scale))
        tl.store(dot_ptr + row, dot, mask=inside)


class Scaled(NamedTuple):
    """A gradient to be multiplied."""

    x: Tensor  # [count] float32
    out: Tensor  # [count]
    size: int  # as it is: a multiple of 16 is read and written in vectors


@triton.jit
def _multiply_part(part, factor, program, BLOCK: tl.constexpr):
    start = program.to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK)
    inside = index < part.size - start
    x = tl.load(part.x + start + index, mask=inside)
    tl.store(part.out + start + index, (x * factor).to(part.out.dtype.element_ty), mask=inside)


@triton.jit
def _multiply_kernel(
    first,  # Scaled
    second,  # Scaled or None
    factor_ptr,  # (1,)
    BLOCK: tl.constexpr,
):
    program, factor = tl.program_id(0), tl.load(factor_ptr)
    if second is None:
        _multiply_part(first, factor, program, BLOCK)
    else:
        blocks = tl.cdiv(first.size, BLOCK)
        if program < blocks:
            _multiply_part(first, factor, program, BLOCK)
        else:
            _multiply_part(second, factor, program - blocks, BLOCK)


def gradients_from_sums(
    sums: Tensor, x: Tensor, grad: Tensor | None, scale: Tensor | None, dot: Tensor | None, fp16_scale: Tensor | None,
    normalize: bool = False,
) -> None:  # fmt: skip
    """Fill the gradients of embeddings `x` and of their scales from `sums`, float32 and times `fp16_scale`.

    With `normalize` the sums are gradients of the directions x / |x|. `dot` is the scales' gradient, or <x, gradient>
    where none is given.
    """
    rows, dim = sums.shape
    _gradients_from_sums_kernel[(triton.cdiv(rows, SUM_ROWS),)](
        sums, x, grad, scale, dot, fp16_scale, SumSizes(odd_number(rows), dim, x.stride(0)), normalize, SUM_ROWS,
        SUM_DIM, **STREAM_OPTIONS,
    )  # fmt: skip


def scaled(saved_grad: Tensor, grad: Tensor, like: Tensor, needed: bool) -> Tensor:
    """A gradient that the forward has made in float32, times the upstream one, in the dtype of `like`."""
    if not needed or grad.numel() != 1 or saved_grad.numel() < STREAM_BLOCK:
        return scaled_by_torch(saved_grad, grad, like, needed)
    out = like.new_empty(like.shape)
    _multiply(Scaled(saved_grad, out, saved_grad.numel()), None, grad)
    return out


def scaled_by_torch(saved_grad: Tensor, grad: Tensor, like: Tensor, needed: bool) -> Tensor:
    """The same where there are few numbers: no kernel has to be compiled for it."""
    return torch.mul(saved_grad, grad, out=like.new_empty(like.shape)) if needed else like.new_empty(0)


def scaled_pair(
    saved: tuple[Tensor, Tensor], grad: Tensor, like: tuple[Tensor, Tensor], needed: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """The same of queries and keys, where both are needed in one launch; an upstream [M] is row by row."""
    if grad.ndim or not all(needed) or not all(s.numel() for s in saved):
        row_grad = grad[:, None] if grad.ndim else grad
        query, key = (scaled(s, row_grad, x, n) for s, x, n in zip(saved, like, needed, strict=True))
        return query, key
    first, second = (Scaled(s, x.new_empty(x.shape), s.numel()) for s, x in zip(saved, like, strict=True))
    _multiply(first, second, grad)
    return first.out, second.out


def _multiply(first: Scaled, second: Scaled | None, factor: Tensor) -> None:
    blocks = sum(triton.cdiv(part.size, STREAM_BLOCK) for part in (first, second) if part is not None)
    _multiply_kernel[(blocks,)](first, second, factor, STREAM_BLOCK, **STREAM_OPTIONS)


class EmbeddingGradient:
    """The gradient of queries or keys, summed over blocks of G, and that of their scales (or of the one scale of all
    logits, where none is given)."""

    def __init__(
        self, x: Tensor, dim: int, scale: Tensor | None, needs: tuple[bool, bool], block_rows: int, one_product: bool,
        fp16_scale: Tensor | None, normalize: bool = False,
    ) -> None:  # fmt: skip
        self.x, self.scale, self.fp16_scale, self.normalize = x, scale, fp16_scale, normalize
        self.block_rows = block_rows
        rows, (needs_x, needs_scale) = x.shape[0], needs
        self.grad = x.new_empty((rows, dim) if needs_x else 0)
        self.dot = x.new_empty(rows if needs_scale else 0, dtype=torch.float32)
        self.needed = needs_x or needs_scale
        # sums in the gradient itself, where it is float32 or one rounded product is all
        exact = x.dtype == torch.float32 or (one_product and not needs_scale and not normalize)
        self.direct = needs_x and fp16_scale is None and exact
        self.has_output = self.needed and (needs_scale or normalize or not self.direct)
        sum_rows = block_rows if self.needed else 0
        self.sums = self.grad if self.direct else x.new_empty((sum_rows, dim), dtype=torch.float32)

    def part(self, start: int, stop: int) -> Tensor:
        """The sums of these rows, which are those of one block when sums are held for one only."""
        return self.sums[start:stop] if self.direct or self.block_rows == self.x.shape[0] else self.sums[: stop - start]

    def from_sums(self, start: int, stop: int) -> None:
        """Make the gradients of these rows from their sums, which are complete."""
        if not self.has_output:
            return
        grad = self.grad[start:stop] if self.grad.numel() and (self.normalize or not self.direct) else None
        dot = self.dot[start:stop] if self.dot.numel() else None
        scale = None if dot is None or self.scale is None else self.scale[start:stop]
        gradients_from_sums(
            self.part(start, stop), self.x[start:stop], grad, scale, dot, self.fp16_scale, self.normalize
        )
