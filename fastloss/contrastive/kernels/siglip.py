"""Triton kernel of the sigmoid loss (see contrastive/siglip.py for its definition).

A program makes one tile of logits with `tl.dot`, and from e = exp(-|x|) and one division both

    log(1 + e^x) = max(x, 0) + 2 atanh(t), t = e / (2 + e) <= 1/3      atanh(t) / t by a polynomial in t^2, to 2e-8
    sigmoid(x)   = (x < 0 ? e : 1) / (1 + e)

It leaves the tile's row sums of both, and H_ij = +-w_i sigmoid(x_ij) r_i c_j in the embeddings' dtype in a block of
`workspace_mib` at most, which two library products turn into v, accumulated in float32; w is row_weight, r_i = scale
c(image_i), c_j = c(text_j). 3 U = 6 M N D FLOP; U alone where no gradient is wanted. Beyond the products an element of
H moves three times, written once and read twice, through the L2 cache or memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.device_math import _softplus, number_in
from ...core.kernels.launch import AotCase, odd_number, on_device
from ...core.kernels.matmul import add_product, embeddings
from ..options import Form
from ..save_plan import IMAGE, SCALE_AND_BIAS, TEXT
from ..siglip import Grads, Inputs, Needs, Saved
from .arguments import Area, Columns, Operands, Rows, products_block_in, sizes_in
from .blocking import block_plan
from .embedding_gradients import gradients_from_sums, scaled
from .logit_matrix import HALF_TILE, LogitMatrix, Workspace
from .logit_tile import PRODUCTS, products, tile_of_program
from .norms import Prepared, prepare
from .tile_configs import DESCRIPTORS, best_tile


class PairRows(NamedTuple):
    """Vectors of the images."""

    row_scale: Tensor  # [M] float32
    row_weight: Tensor  # [M] float32
    row_ids: Tensor | None  # [M] int64
    row_shares: Tensor | None  # [M] float32


class PairColumns(NamedTuple):
    """Vectors of the texts."""

    column_scale: Tensor | None  # [N] float32
    column_ids: Tensor | None  # [N] int64
    column_shares: Tensor | None  # [N] float32


class PairBlock(NamedTuple):
    """A block of the pairs, cut into tiles."""

    row: int  # the first
    column: int  # the first
    end_row: int
    row_tiles: int
    column_tiles: int
    slot_rows: int  # elements from the row sums of one column of tiles to those of the next
    pitch: int  # elements from one row of H to the next

    def odd(self) -> PairBlock:
        names = ("end_row", "row_tiles", "column_tiles", "slot_rows")
        return self._replace(**{name: odd_number(getattr(self, name)) for name in names})


@triton.jit
def pair_block_in(odd):
    return PairBlock(
        odd.row, odd.column, number_in(odd.end_row), number_in(odd.row_tiles), number_in(odd.column_tiles),
        number_in(odd.slot_rows), odd.pitch,
    )  # fmt: skip


class Sums(NamedTuple):
    """What a pass over all pairs fills, each where it has rows; all float32."""

    rows: Tensor  # [2, M]: the sums of the losses of each row, and of their slopes
    image: Tensor  # [M, D]: H text
    text: Tensor  # [N, D]: H^T image


@triton.jit
def _pair_losses(s, row, column, row_inside, column_inside, rows, columns, POSITIVES: tl.constexpr):
    """The loss of each pair and its slope: (0, 0) of one that does not count."""
    allowed = row_inside[:, None] & column_inside[None, :]
    positive = (row[:, None] == column[None, :]) & POSITIVES
    if rows.row_ids is not None:
        row_id = tl.load(rows.row_ids + row, mask=row_inside, other=0)
        column_id = tl.load(columns.column_ids + column, mask=column_inside, other=0)
        allowed &= (row_id[:, None] != column_id[None, :]) | positive
    loss, slope = _softplus(tl.where(allowed, tl.where(positive, -s, s), float("-inf")))
    return loss, tl.where(positive, -slope, slope)


@triton.jit
def _shared_losses(s, row, column, row_inside, column_inside, rows, columns, SOFT_LABELS: tl.constexpr):
    """The same where pairs of equal ids are the positives, which have shares."""
    row_id = tl.load(rows.row_ids + row, mask=row_inside, other=0)
    column_id = tl.load(columns.column_ids + column, mask=column_inside, other=0)
    row_share = tl.load(rows.row_shares + row, mask=row_inside, other=0.0)
    column_share = tl.load(columns.column_shares + column, mask=column_inside, other=0.0)
    positive = row_id[:, None] == column_id[None, :]
    inside = row_inside[:, None] & column_inside[None, :]
    x = tl.where(inside, tl.where(positive, -s, s), float("-inf"))
    loss, slope = _softplus(x)
    share = tl.where(positive & inside, row_share[:, None] + column_share[None, :], 1.0)
    if SOFT_LABELS:  # the rest of a positive's share is that of a negative
        rest = 1.0 - share
        loss -= rest * tl.where(positive & inside & (rest != 0.0), x, 0.0)
        return loss, tl.where(positive, rest - slope, slope)
    return loss * share, tl.where(positive, -(slope * share), slope)


@triton.jit
def _siglip_kernel(
    image,  # see Operands; H may take the place of the products
    text,
    rows,  # PairRows
    columns,  # PairColumns
    bias_ptr,  # (1,)
    fp16_scale_ptr,  # (1,): a power of two that H is multiplied by, or None
    slots_ptr,  # (2, column tiles, block rows) float32: the tiles' row sums of losses and slopes
    grad_block_ptr,  # H (block rows, pitch), or None
    sizes,  # Sizes
    block,  # PairBlock
    POSITIVES: tl.constexpr,
    SOFT_LABELS: tl.constexpr,
    TILE: tl.constexpr,  # TileConstants
):
    BM: tl.constexpr = TILE.rows
    BN: tl.constexpr = TILE.columns
    OPERANDS: tl.constexpr = TILE.operands
    if OPERANDS == PRODUCTS:
        text = products_block_in(text)
    sizes, block = sizes_in(sizes), pair_block_in(block)
    row_tile, column_tile = tile_of_program(block)
    row0, column0 = block.row + row_tile * BM, block.column + column_tile * BN
    row, column = row0 + tl.arange(0, BM), column0 + tl.arange(0, BN)
    row_inside, column_inside = row < block.end_row, column < sizes.columns
    acc = products(Operands(image, text), row0, column0, sizes, TILE)
    scale = tl.load(rows.row_scale + row, mask=row_inside, other=0.0)
    if columns.column_scale is not None:
        column_scale = tl.load(columns.column_scale + column, mask=column_inside, other=0.0)
        acc *= column_scale[None, :]
    s = acc * scale[:, None] + tl.load(bias_ptr)
    if rows.row_shares is not None:
        loss, slope = _shared_losses(s, row, column, row_inside, column_inside, rows, columns, SOFT_LABELS)
    elif rows.row_ids is not None:
        loss, slope = _pair_losses(s, row, column, row_inside, column_inside, rows, columns, POSITIVES)
    else:  # most tiles have neither positives nor an edge
        special = (row0 + BM > block.end_row) | (column0 + BN > sizes.columns)
        if POSITIVES:
            special |= (row0 < column0 + BN) & (column0 < row0 + BM)
        if special:
            loss, slope = _pair_losses(s, row, column, row_inside, column_inside, rows, columns, POSITIVES)
        else:
            loss, slope = _softplus(s)
    slot = slots_ptr + column_tile * block.slot_rows + (row - block.row)
    tl.store(slot, tl.sum(loss, 1), mask=row_inside)
    if grad_block_ptr is not None:
        tl.store(slot + block.column_tiles * block.slot_rows, tl.sum(slope, 1), mask=row_inside)
        row_factor = scale * tl.load(rows.row_weight + row, mask=row_inside, other=0.0)
        if fp16_scale_ptr is not None:
            row_factor *= tl.load(fp16_scale_ptr)
        h = slope * row_factor[:, None]
        if columns.column_scale is not None:
            h *= column_scale[None, :]
        corner = (row0 - block.row).to(tl.int64) * block.pitch + (column0 - block.column)
        to = grad_block_ptr + corner + tl.arange(0, BM)[:, None] * block.pitch + tl.arange(0, BN)[None, :]
        tl.store(to, h.to(grad_block_ptr.dtype.element_ty), mask=row_inside[:, None])


def _fp16_scale(row_weight: Tensor, row_scale: Tensor, column_scale: Tensor | None) -> Tensor:
    """A power of two (1,) that takes the largest possible |H| near 2^14: float16's range would lose the small ones."""
    bound = (row_weight * row_scale).abs().amax()
    if column_scale is not None:
        bound = bound * column_scale.abs().amax()
    power = torch.floor(14.0 - torch.log2(bound))
    return torch.exp2(torch.where(power.isfinite(), power, 0.0).clamp(-60.0, 60.0)).reshape(1)


def _scales(image: Tensor, text: Tensor, scale: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Of rows and columns."""
    if not normalize:
        return scale.expand(image.shape[0]).contiguous(), None
    row, column = (scale.new_empty(x.shape[0]) for x in (image, text))
    prepare(image, text, scale, 1.0, None, Prepared(row, column, None))
    return row, column


def _pass(x: Inputs, row_weight: Tensor, needs: int) -> tuple[Tensor, Saved]:
    """Row losses, and the float32 gradients that `needs` asks for, each row's loss counting by its weight."""
    (m, dim), n, row_weight = x.image.shape, x.text.shape[0], row_weight.contiguous()
    new_float32 = x.scale.new_empty
    sums = Sums(
        rows=new_float32(2, m),
        image=new_float32(m if needs & (IMAGE | SCALE_AND_BIAS) else 0, dim),
        text=new_float32(n if needs & TEXT else 0, dim),
    )
    dot = new_float32(m if needs & SCALE_AND_BIAS else 0)
    if not (m and n):
        for t in (*sums, dot):
            t.zero_()
    else:
        image, text = embeddings(x.image), embeddings(x.text)
        row_scale, column_scale = _scales(image, text, x.scale, x.normalize)
        rows, columns = Rows(row_scale, None, x.image_ids, None), Columns(column_scale, None, x.text_ids)
        call = LogitMatrix(image, text, rows, columns, Form(), 0.0)
        fp16_scale = None
        if needs and image.dtype == torch.float16:
            fp16_scale = _fp16_scale(row_weight, row_scale, column_scale)
        _fill(call, x, row_weight, fp16_scale, sums, needs)
        rescaled = x.normalize or fp16_scale is not None
        if needs & (IMAGE | SCALE_AND_BIAS) and (rescaled or needs & SCALE_AND_BIAS):
            grad = sums.image if needs & IMAGE and rescaled else None
            image_dot = dot if needs & SCALE_AND_BIAS else None
            gradients_from_sums(sums.image, call.query, grad, None, image_dot, fp16_scale, x.normalize)
        if needs & TEXT and rescaled:
            gradients_from_sums(sums.text, call.key, sums.text, None, None, fp16_scale, x.normalize)
    losses, slopes = sums.rows
    scale_grad, bias_grad = new_float32(0), new_float32(0)
    if needs & SCALE_AND_BIAS:
        scale_grad, bias_grad = (dot.sum() / x.scale).reshape(1), (slopes * row_weight).sum().reshape(1)
    return losses, Saved(sums.image[: m if needs & IMAGE else 0], sums.text, scale_grad, bias_grad)


def _fill(call: LogitMatrix, x: Inputs, row_weight: Tensor, fp16_scale: Tensor | None, sums: Sums, needs: int) -> None:
    """Fills `sums`, a block of the pairs at a time."""
    dim, bias = sums.image.shape[1], x.bias
    if call.rows.row_ids is not None:  # 64-bit ids of a large tile's columns spill on sm_80
        call.tile = best_tile(call.query.device, call.products, 1, 1, dim)[0]
    m, n, tile = call.sizes.rows, call.sizes.columns, call.tile
    # loss and slope are alive at once: four warps hold half of a 128 x 128 tile's without spills, and two programs of
    # half tiles overlap; told that it has all registers, ptxas hoists more of float16's than there are
    tile = replace(tile, registers=None)
    if tile.operands == DESCRIPTORS and tile.columns > HALF_TILE:
        tile = call.tile = replace(tile, columns=HALF_TILE, stages=tile.stages + 1)
    block_rows, block_columns = block_plan(m, n, int(x.workspace_mib * 2**20) // call.query.element_size(), tile)
    block_rows = min(block_rows, m)
    slots = bias.new_empty(2, triton.cdiv(block_columns, tile.columns), block_rows)
    grad_block = call.query.new_empty(block_rows, block_columns) if needs else None
    memory = bias.new_empty((block_rows, block_columns) if call.by_library else 0) if grad_block is None else grad_block
    shares = [None if t is None else t.contiguous() for t in (x.image_shares, x.text_shares)]
    rows = PairRows(call.rows.row_scale, row_weight, call.rows.row_ids, shares[0])
    columns = PairColumns(call.columns.column_scale, call.columns.column_ids, shares[1])
    for row, column in itertools.product(range(0, m, block_rows), range(0, n, block_columns)):
        area = Area(row, min(row + block_rows, m), column, min(column + block_columns, n))
        tiles = triton.cdiv(area.end_row - row, tile.rows), triton.cdiv(area.end_column - column, tile.columns)
        block = PairBlock(row, column, area.end_row, *tiles, block_rows, block_columns)
        operands = call.operands()
        if call.by_library:
            operands = call.make_products(Workspace(memory, block_columns), area)
        _siglip_kernel[(block.row_tiles * block.column_tiles,)](
            *operands, rows, columns, bias, fp16_scale, slots, grad_block, call.sizes.odd(), block.odd(),
            not x.negative_only, x.soft_labels, tile.constants, **tile.options,
        )  # fmt: skip
        _add_row_sums(sums.rows[: 2 if needs else 1], slots, block)
        if grad_block is None:
            continue
        h = grad_block[: area.end_row - row, : area.end_column - column]
        if sums.image.shape[0]:
            texts = call.key[column : area.end_column, :dim]
            add_product(sums.image[row : area.end_row], h, texts, column == 0)
        if sums.text.shape[0]:
            images = call.query[row : area.end_row, :dim]
            add_product(sums.text[column : area.end_column], h.T, images, row == 0)


def _add_row_sums(sums: Tensor, slots: Tensor, block: PairBlock) -> None:
    """Add the row sums that the tiles of a block left in `slots` to `sums` [1 or 2, M]."""
    shape = (2, block.column_tiles, block.slot_rows)
    of_tiles = slots.view(-1)[: math.prod(shape)].view(shape)[: sums.shape[0], :, : block.end_row - block.row]
    of_rows = sums[:, block.row : block.end_row]
    of_rows.copy_(of_tiles.sum(1)) if block.column == 0 else of_rows.add_(of_tiles.sum(1))


def siglip_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    with on_device(x.image):
        if x.row_weight is None:
            losses, saved = _pass(x, x.scale.expand(x.image.shape[0]), 0)
            return losses.clone(), saved
        losses, saved = _pass(x, x.row_weight, x.needs)
        return (losses * x.row_weight).sum(), saved


def siglip_bwd(grad: Tensor, x: Inputs, saved: Saved, needs: Needs) -> Grads:
    with on_device(x.image):
        if x.row_weight is None:
            bits = IMAGE * needs.image + TEXT * needs.text + SCALE_AND_BIAS * (needs.scale or needs.bias)
            _, saved = _pass(x, grad, bits)
            grad = torch.ones_like(grad[0]) if grad.shape[0] else grad.new_ones(())
        return Grads(
            image=scaled(saved.image_grad, grad, x.image, needs.image),
            text=scaled(saved.text_grad, grad, x.text, needs.text),
            scale=scaled(saved.scale_grad, grad, x.scale, needs.scale),
            bias=scaled(saved.bias_grad, grad, x.bias, needs.bias),
        )


def aot_cases() -> Iterator[AotCase]:
    """Every dtype, with and without what is optional, D of common encoders, small, odd and very large batches."""
    calls = [("", (4096, 4096, dim)) for dim in (64, 77, 512, 768, 1152)]
    calls += [
        ("cosine ids", (4096, 4096, 512)),
        ("shares", (4096, 16384, 768)),
        ("cosine soft shares", (333, 777, 512)),
    ]
    calls += [("negative", (200, 300, 512)), ("", (2**20, 2**20, 768))]
    for dtype, (form, (rows, columns, dim)) in itertools.product((torch.float32, torch.bfloat16, torch.float16), calls):
        image, text = (torch.empty(size, dim, dtype=dtype, device="meta") for size in (rows, columns))
        row, column, one = (torch.empty(size, device="meta") for size in (rows, columns, 1))
        given = "ids" in form or "shares" in form
        row_ids, column_ids = (row.long(), column.long()) if given else (None, None)
        row_shares, column_shares = (row, column) if "shares" in form else (None, None)
        cosine, negative = "cosine" in form, "negative" in form
        label = f"{form} {str(dtype).removeprefix('torch.')} {rows}x{columns}x{dim}".strip()
        matrix = ("_siglip_kernel",) if dtype != torch.float32 else ()
        workspace_mib = 2.0**18 if rows == 2**20 else 256.0  # a few launches, not thousands
        for needs in (0, IMAGE + TEXT + SCALE_AND_BIAS):
            x = Inputs(
                image, text, one, one, row_ids, column_ids, row_shares, column_shares, row, cosine, negative,
                "soft" in form, needs, workspace_mib,
            )  # fmt: skip
            yield AotCase(f"{label} needs {needs}", siglip_fwd, (x,), (), matrix)
