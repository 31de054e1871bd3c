"""Triton kernel of the sigmoid loss (see contrastive/siglip.py for its definition).

A program makes one tile of logits with `tl.dot`, and from e = exp(-|x|) and one division both

    log(1 + e^x) = max(x, 0) + 2 atanh(t), t = e / (2 + e) <= 1/3      atanh(t) / t by a polynomial in t^2, to 2e-8
    sigmoid(x)   = (x < 0 ? e : 1) / (1 + e)

It leaves the tile's row sums of both, and H_ij = +-share_i sigmoid(x_ij) r_i c_j in the embeddings' dtype in a block of
`workspace_mib` at most, which two library products turn into v, accumulated in float32; r_i = scale c(image_i), c_j =
c(text_j). 3 U = 6 M N D FLOP; U alone where no gradient is wanted. Beyond the
products an element of H moves three times, written once and read twice, through the L2 cache or memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.device_math import _softplus
from ...core.kernels.launch import AotCase, on_device
from ...core.kernels.matmul import add_product, embeddings
from ..save_plan import IMAGE, NUMBERS, TEXT
from ..siglip import Grads, Inputs, Needs, Saved
from .blocking import block_plan
from .embedding_gradients import finish, scaled
from .logit_matrix import HALF_TILE, LogitMatrix
from .logit_tile import products
from .norms import prepare
from .passes import GROUP
from .tile_configs import DESCRIPTORS, best_tile


@triton.jit
def _both_signs(s, row, column, inside, across, rows, columns, POSITIVES: tl.constexpr):
    """The loss of each pair and its slope: (0, 0) of one that does not count."""
    keep = inside[:, None] & across[None, :]
    positive = (row[:, None] == column[None, :]) & POSITIVES
    if rows[2] is not None:
        row_id = tl.load(rows[2] + row, mask=inside, other=0)
        column_id = tl.load(columns[1] + column, mask=across, other=0)
        keep &= (row_id[:, None] != column_id[None, :]) | positive
    loss, slope = _softplus(tl.where(keep, tl.where(positive, -s, s), float("-inf")))
    return loss, tl.where(positive, -slope, slope)


@triton.jit
def _siglip_kernel(
    image,  # (M, D), text (N, D), or their products, which H may replace: see logit_tile.py
    text,
    rows,  # row_scale, share, row_ids: (M,), the last or None
    columns,  # column_scale, column_ids: (N,) or None
    bias_ptr,  # (1,)
    factor_ptr,  # (1,), of H, or None
    slots_ptr,  # (2, column blocks, block rows) float32: the tiles' row sums of losses and slopes
    work_ptr,  # H (block rows, pitch), or None
    sizes,  # M, N, D
    block,  # first row, first column, end of the rows, row blocks, column blocks, block rows, pitch
    POSITIVES: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,  # row blocks walked together, so that the caches serve the texts of a group
):
    program = tl.program_id(0)
    first = program // (GROUP * block[4]) * GROUP
    height = tl.minimum(block[3] - first, GROUP)
    rest = program % (GROUP * block[4])
    row_block, column_block = first + rest % height, rest // height
    row0, column0 = block[0] + row_block * TILE[0], block[1] + column_block * TILE[1]
    row, column = row0 + tl.arange(0, TILE[0]), column0 + tl.arange(0, TILE[1])
    inside, across = row < block[2], column < sizes[1]
    acc = products((image, text), row0, column0, sizes, TILE)
    scale = tl.load(rows[0] + row, mask=inside, other=0.0)
    if columns[0] is not None:
        column_scale = tl.load(columns[0] + column, mask=across, other=0.0)
        acc *= column_scale[None, :]
    s = acc * scale[:, None] + tl.load(bias_ptr)
    if rows[2] is not None:
        loss, slope = _both_signs(s, row, column, inside, across, rows, columns, POSITIVES)
    else:  # most tiles have neither positives nor an edge
        special = (row0 + TILE[0] > block[2]) | (column0 + TILE[1] > sizes[1])
        if POSITIVES:
            special |= (row0 < column0 + TILE[1]) & (column0 < row0 + TILE[0])
        if special:
            loss, slope = _both_signs(s, row, column, inside, across, rows, columns, POSITIVES)
        else:
            loss, slope = _softplus(s)
    slot = slots_ptr + column_block * block[5] + (row - block[0])
    tl.store(slot, tl.sum(loss, 1), mask=inside)
    if work_ptr is not None:
        tl.store(slot + block[4] * block[5], tl.sum(slope, 1), mask=inside)
        pull = scale * tl.load(rows[1] + row, mask=inside, other=0.0)
        if factor_ptr is not None:
            pull *= tl.load(factor_ptr)
        h = slope * pull[:, None]
        if columns[0] is not None:
            h *= column_scale[None, :]
        corner = (row0 - block[0]).to(tl.int64) * block[6] + (column0 - block[1])
        to = work_ptr + corner + tl.arange(0, TILE[0])[:, None] * block[6] + tl.arange(0, TILE[1])[None, :]
        tl.store(to, h.to(work_ptr.dtype.element_ty), mask=inside[:, None])


def _half_range(share: Tensor, row_scale: Tensor, column_scale: Tensor | None) -> Tensor:
    """A power of two (1,) that takes the largest possible |H| near 2^14: float16's range would lose the small ones."""
    bound = (share * row_scale).abs().amax()
    if column_scale is not None:
        bound = bound * column_scale.abs().amax()
    power = torch.floor(14.0 - torch.log2(bound))
    return torch.exp2(torch.where(power.isfinite(), power, 0.0).clamp(-60.0, 60.0)).reshape(1)


def _scales(image: Tensor, text: Tensor, scale: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Of rows and columns."""
    if not normalize:
        return scale.expand(image.shape[0]).contiguous(), None
    row, column = (scale.new_empty(x.shape[0]) for x in (image, text))
    prepare(image, text, scale, 1.0, None, (row, column, None))
    return row, column


def _pass(x: Inputs, share: Tensor, needs: int) -> tuple[Tensor, Saved]:
    """Row losses, and the float32 gradients that `needs` asks for, each row's loss counting by `share`."""
    (m, width), n, share = x.image.shape, x.text.shape[0], share.contiguous()
    made = x.scale.new_empty(2, m)
    to_image = x.scale.new_empty(m if needs & (IMAGE | NUMBERS) else 0, width)
    to_text = x.scale.new_empty(n if needs & TEXT else 0, width)
    dot = x.scale.new_empty(m if needs & NUMBERS else 0)
    if not (m and n):
        for each in (made, to_image, to_text, dot):
            each.zero_()
    else:
        image, text = embeddings(x.image), embeddings(x.text)
        row_scale, column_scale = _scales(image, text, x.scale, x.normalize)
        call = LogitMatrix(image, text, (row_scale, None, x.image_ids, None), (column_scale, None, x.text_ids), "", 0.0)
        factor = None
        if needs and image.dtype == torch.float16:
            factor = _half_range(share, row_scale, column_scale)
        _blocks(call, share, x.bias, factor, (made, to_image, to_text), not x.negative_only, needs, x.workspace_mib)
        if needs & (IMAGE | NUMBERS) and (x.normalize or factor is not None or needs & NUMBERS):
            grad = to_image if needs & IMAGE and (x.normalize or factor is not None) else None
            finish(to_image, call.query, grad, None, dot if needs & NUMBERS else None, factor, x.normalize)
        if needs & TEXT and (x.normalize or factor is not None):
            finish(to_text, call.key, to_text, None, None, factor, x.normalize)
    scale_grad, bias_grad = x.scale.new_empty(0), x.scale.new_empty(0)
    if needs & NUMBERS:
        scale_grad, bias_grad = (dot.sum() / x.scale).reshape(1), (made[1] * share).sum().reshape(1)
    return made[0], Saved(to_image[: m if needs & IMAGE else 0], to_text, scale_grad, bias_grad)


def _blocks(
    call: LogitMatrix,
    share: Tensor,
    bias: Tensor,
    factor: Tensor | None,
    to: tuple[Tensor, Tensor, Tensor],
    positives: bool,
    needs: int,
    workspace_mib: float,
) -> None:
    """Fills `to`: the row sums of losses and slopes, and H times text and image, each where it has rows."""
    made, to_image, to_text = to
    if call.rows[2] is not None:  # 64-bit ids of a large tile's columns spill on sm_80
        call.tile = best_tile(call.query.device, call.products, 1, 1, width=to_image.shape[1])[0]
    (m, n, _), width, tile = call.sizes, to_image.shape[1], call.tile
    # loss and slope are alive at once: four warps hold half of a 128 x 128 tile's without spills, and two programs of
    # half tiles overlap; told that it has all registers, ptxas hoists more of float16's than there are
    tile = replace(tile, registers=None)
    if tile.operands == DESCRIPTORS and tile.columns > HALF_TILE:
        tile = call.tile = replace(tile, columns=HALF_TILE, stages=tile.stages + 1)
    high, wide = block_plan(m, n, int(workspace_mib * 2**20) // call.query.element_size(), tile)
    high = min(high, m)
    slots = made.new_empty(2, triton.cdiv(wide, tile.columns), high)
    work = call.query.new_empty(high, wide) if needs else None
    room = made.new_empty((high, wide) if call.by_library else 0) if work is None else work
    for row, column in itertools.product(range(0, m, high), range(0, n, wide)):
        end, stop = min(row + high, m), min(column + wide, n)
        tiles = triton.cdiv(end - row, tile.rows), triton.cdiv(stop - column, tile.columns)
        operands = call.make_products(room, (row, column, end, stop), wide) if call.by_library else call.operands()
        _siglip_kernel[(tiles[0] * tiles[1],)](
            *operands, (call.rows[0], share, call.rows[2]), (call.columns[0], call.columns[2]), bias, factor, slots,
            work, call.sizes, (row, column, end, *tiles, high, wide), positives, tile.constants, GROUP,
            **tile.options,
        )  # fmt: skip
        kinds = 2 if needs else 1
        part = slots.view(-1)[: 2 * tiles[1] * high].view(2, tiles[1], high)[:kinds, :, : end - row]
        of_rows = made[:kinds, row:end]
        of_rows.copy_(part.sum(1)) if column == 0 else of_rows.add_(part.sum(1))
        if work is None:
            continue
        h = work[: end - row, : stop - column]
        if to_image.shape[0]:
            add_product(to_image[row:end], h, call.key[column:stop, :width], column == 0)
        if to_text.shape[0]:
            add_product(to_text[column:stop], h.T, call.query[row:end, :width], row == 0)


def siglip_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    with on_device(x.image):
        if x.share is None:
            losses, saved = _pass(x, x.scale.expand(x.image.shape[0]), 0)
            return losses.clone(), saved
        losses, saved = _pass(x, x.share, x.needs)
        return (losses * x.share).sum(), saved


def siglip_bwd(grad: Tensor, x: Inputs, saved: Saved, needs: Needs) -> Grads:
    with on_device(x.image):
        if x.share is None:
            bits = IMAGE * needs.image + TEXT * needs.text + NUMBERS * (needs.scale or needs.bias)
            _, saved = _pass(x, grad, bits)
            grad = torch.ones_like(grad[0]) if grad.shape[0] else grad.new_ones(())
        return Grads(
            image=scaled(saved.image_grad, grad, x.image, needs.image),
            text=scaled(saved.text_grad, grad, x.text, needs.text),
            scale=scaled(saved.scale_grad, grad, x.scale, needs.scale),
            bias=scaled(saved.bias_grad, grad, x.bias, needs.bias),
        )


def aot_cases() -> Iterator[AotCase]:
    """Every dtype, with and without what is optional, widths of common encoders, small, odd and very large batches."""
    calls = [("", (4096, 4096, width)) for width in (64, 77, 512, 768, 1152)]
    calls += [("cosine ids", (4096, 4096, 512)), ("negative", (200, 300, 512)), ("", (2**20, 2**20, 768))]
    for dtype, (form, (rows, columns, width)) in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), calls
    ):
        image, text = (torch.empty(size, width, dtype=dtype, device="meta") for size in (rows, columns))
        row, column, one = (torch.empty(size, device="meta") for size in (rows, columns, 1))
        ids = (row.long(), column.long()) if "ids" in form else (None, None)
        cosine, negative = "cosine" in form, "negative" in form
        label = f"{form} {str(dtype).removeprefix('torch.')} {rows}x{columns}x{width}".strip()
        matrix = ("_siglip_kernel",) if dtype != torch.float32 else ()
        for needs in (0, 7):
            x = Inputs(image, text, one, one, ids[0], ids[1], row, cosine, negative, needs, 256.0)
            yield AotCase(f"{label} needs {needs}", siglip_fwd, (x,), (), matrix)
