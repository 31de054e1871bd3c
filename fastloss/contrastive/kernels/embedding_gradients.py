"""The gradients of embeddings from the sums that blocks of logits left, and of their scales."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.launch import STREAM_BLOCK, STREAM_OPTIONS

FINISH_BLOCK = (8, 256)


@triton.jit
def _contrastive_finish_kernel(
    sum_ptr,  # (rows, D) float32, contiguous: a gradient times the factor
    x_ptr,  # (rows, D), rows `pitch` apart: the embeddings it belongs to
    grad_ptr,  # (rows, D) contiguous: the gradient, or None
    scale_ptr,  # (rows,): scale of the embeddings, or None
    dot_ptr,  # (rows,): its gradient, or None; without a scale <x, gradient>
    factor_ptr,  # (1,) or None
    sizes,  # rows, D, pitch
    NORMALIZE: tl.constexpr,  # the gradient has no part along x, as that of x / |x|
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < sizes[0]
    line = row.to(tl.int64)[:, None]
    dot = tl.zeros((ROWS,), tl.float32)
    factor = 1.0
    if factor_ptr is not None:
        factor = 1.0 / tl.load(factor_ptr)
    square = tl.zeros((ROWS,), tl.float32)
    if NORMALIZE or dot_ptr is not None:
        for start in range(0, sizes[1], WIDTH):
            inner = start + tl.arange(0, WIDTH)[None, :]
            mask = inside[:, None] & (inner < sizes[1])
            x = tl.load(x_ptr + line * sizes[2] + inner, mask=mask, other=0.0).to(tl.float32)
            dot += tl.sum(x * (tl.load(sum_ptr + line * sizes[1] + inner, mask=mask, other=0.0) * factor), 1)
            square += tl.sum(x * x, 1)
    if grad_ptr is not None:
        along = tl.where(square > 0.0, dot / square, 0.0)
        for start in range(0, sizes[1], WIDTH):
            inner = start + tl.arange(0, WIDTH)[None, :]
            mask = inside[:, None] & (inner < sizes[1])
            value = tl.load(sum_ptr + line * sizes[1] + inner, mask=mask, other=0.0) * factor
            if NORMALIZE:
                x = tl.load(x_ptr + line * sizes[2] + inner, mask=mask, other=0.0).to(tl.float32)
                value -= along[:, None] * x
            tl.store(grad_ptr + line * sizes[1] + inner, value.to(grad_ptr.dtype.element_ty), mask=mask)
    if dot_ptr is not None:
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + row, mask=inside, other=1.0)
            dot = tl.where(scale == 0, 0.0, dot / tl.where(scale == 0, 1.0, scale))
        tl.store(dot_ptr + row, dot, mask=inside)


@triton.jit
def _contrastive_scale_kernel(
    made_ptr,  # (count,) float32
    grad_ptr,  # (1,)
    to_ptr,  # (count,)
    count,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK)
    inside = index < count - start
    made = tl.load(made_ptr + start + index, mask=inside)
    tl.store(to_ptr + start + index, (made * tl.load(grad_ptr)).to(to_ptr.dtype.element_ty), mask=inside)


def finish(
    sums: Tensor, x: Tensor, grad: Tensor | None, scale: Tensor | None, dot: Tensor | None, factor: Tensor | None,
    normalize: bool = False,
) -> None:  # fmt: skip
    """The gradients of embeddings `x` (of their lengths' directions only, with `normalize`) and scales from `sums`."""
    _contrastive_finish_kernel[(triton.cdiv(sums.shape[0], FINISH_BLOCK[0]),)](
        sums, x, grad, scale, dot, factor, (*sums.shape, x.stride(0)), normalize, *FINISH_BLOCK, **STREAM_OPTIONS
    )


def scaled(made: Tensor, grad: Tensor, like: Tensor, needed: bool) -> Tensor:
    """`made`, which the forward has made in float32, times the upstream gradient, in the dtype of `like`."""
    if not needed:
        return like.new_empty(0)
    out = like.new_empty(like.shape)
    if grad.numel() != 1 or made.numel() < STREAM_BLOCK:
        return torch.mul(made, grad, out=out)
    count = made.numel()
    _contrastive_scale_kernel[(triton.cdiv(count, STREAM_BLOCK),)](
        made, grad, out, count, STREAM_BLOCK, **STREAM_OPTIONS
    )
    return out


class EmbeddingGradient:
    """The gradient of one of the embeddings, made of blocks, and of its scale (or all scales, where none is given)."""

    def __init__(
        self, x: Tensor, width: int, scale: Tensor | None, needs: tuple[bool, bool], height: int, single: bool,
        factor: Tensor | None, normalize: bool = False,
    ) -> None:  # fmt: skip
        self.x, self.scale, self.factor, self.height, self.normalize = x, scale, factor, height, normalize
        rows, (needs_x, needs_scale) = x.shape[0], needs
        self.grad = x.new_empty((rows, width) if needs_x else 0)
        self.dot = x.new_empty(rows if needs_scale else 0, dtype=torch.float32)
        self.needed = needs_x or needs_scale
        # sums in the gradient itself, where it is float32 or one rounded product is all
        once = single and not needs_scale and not normalize
        self.direct = needs_x and factor is None and (x.dtype == torch.float32 or once)
        self.finishes = self.needed and (needs_scale or normalize or not self.direct)
        kept = height if self.needed else 0
        self.sums = self.grad if self.direct else x.new_empty((kept, width), dtype=torch.float32)

    def part(self, start: int, stop: int) -> Tensor:
        """The sums of these rows, which are those of one block when sums are kept for one only."""
        return self.sums[start:stop] if self.direct or self.height == self.x.shape[0] else self.sums[: stop - start]

    def finish(self, start: int, stop: int) -> None:
        if not self.finishes:
            return
        grad = self.grad[start:stop] if self.grad.numel() and (self.normalize or not self.direct) else None
        dot = self.dot[start:stop] if self.dot.numel() else None
        scale = None if dot is None or self.scale is None else self.scale[start:stop]
        finish(self.part(start, stop), self.x[start:stop], grad, scale, dot, self.factor, self.normalize)
