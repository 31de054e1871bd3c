"""Triton kernels of the softmax contrastive op (see losses/contrastive_softmax.py for its definition).

The logits s_ij = r_i c_j <q_i, k_j> + b_j are made tile by tile with `tl.dot` and never stored. A row's or a column's
state is

    best     max of s over its allowed entries
    mass     sum of e^s / 2^reference, reference = ceil(best / log 2): a whole number, so that the powers between
             references are exact, and each exponential costs one fused multiply-add and one exp2
    total, count                  with MOMENTS: sum and number of the allowed s
    hard, soft                    with HARD: mass at (1 + beta) s and at beta s, references ceil((1 + beta) best), ..

Forward: program (group, split) walks the tiles of its row blocks (group, group + groups, ..) and, within each, of its
column blocks (split, split + splits, ..). A row's state stays in registers along the walk and goes to slot `split`; the
columns' states are merged into slot splits + group, which it alone writes. A second kernel merges the slots in
order: no atomics. A symmetric tile needs one exponential per element: the columns' sums are those of the rows'
exponentials e, c_j = sum_i e_ij 2^(ref_i - t) with t the tile's largest reference, exact unless the tile's spread of
references is so wide that e could underflow where a column needs it. Such tiles take a second exponential.

Backward: a block of G_ij r_i c_j (of `workspace_mib` at most) is made in the embeddings' dtype from the same tiles, and
two library products turn it into d query and d key, accumulated in float32 over the blocks. With p = e^(s - lse_i) the
symmetric form again needs one exponential: G = p (g_i + h_j e^(lse_i - lse_j)), the power an outer product; where the
log-sum-exps of a tile lie too far apart for that, two. Then d r_i = <q_i, dq_i> / r_i and d c_j = <k_j, dk_j> / c_j.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..losses.contrastive_softmax import kept_exponentials
from .common import STREAM_OPTIONS, AotCase, on_device
from .contrastive_grads import _contrastive_bwd_kernel, _contrastive_finish_kernel
from .contrastive_states import _contrastive_fwd_kernel, _contrastive_merge_kernel
from .contrastive_table import TF32, Tile, best_tile, products_kind, walk_plan

MERGE_BLOCK = 32  # rows per program of the merging kernel
FINISH_BLOCK = (8, 256)
STRIPS, LOWEST = 16, 1024  # blocks of rows of a triangle, a fraction 1 / STRIPS of which lies below it; least rows
GROUP = 8
_EMPTY = float("-inf")


def _embeddings(x: Tensor) -> Tensor:
    """`x` contiguous, aligned, and its rows padded with zeros to a multiple of 16 elements."""
    if x.shape[1] % 16:
        return F.pad(x, (0, -x.shape[1] % 16))
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


class _Call:
    """What both directions give their kernels: operands, vectors, form, tile."""

    def __init__(
        self, query: Tensor, key: Tensor, rows: tuple, columns: tuple, kind: str, hardness: float,
        backward: bool = False, keeps: bool = False,
    ) -> None:  # fmt: skip
        self.query, self.key = _embeddings(query), _embeddings(key)
        self.rows: tuple[Any, ...] = tuple(None if v is None else v.contiguous() for v in rows)
        self.columns: tuple[Any, ...] = tuple(None if v is None else v.contiguous() for v in columns)
        if self.rows[2] is None or self.columns[2] is None:  # ids count only in pairs
            self.rows, self.columns = (*self.rows[:2], None, self.rows[3]), (*self.columns[:2], None)
        self.upper, self.moments = "upper" in kind, "moments" in kind
        self.symmetric, self.directions = self.upper or "symmetric" in kind, 1 + ("symmetric" in kind)
        self.form = (2 if self.upper else int("diagonal" in kind), self.symmetric, self.moments)
        self.beta = hardness if hardness > 0 else None
        self.states = 2 + 2 * self.moments + 2 * (hardness > 0)
        self.sizes = (query.shape[0], key.shape[0], self.query.shape[1])
        self.products = products_kind(query.dtype)
        ids, limited, biased = (v is not None for v in (*self.rows[2:], self.columns[1]))
        options = ids + limited + biased + self.moments
        hard = hardness > 0
        if hard or options > (0 if self.symmetric else 2):
            burden = 3 if hard and self.symmetric else 2
        elif keeps and self.symmetric and query.dtype == torch.float32:
            burden = 2
        else:
            burden = int(options > 0 or backward or (keeps and self.symmetric))
        self.tile, self.programs = best_tile(query.device, self.products, *self.sizes, burden)
        self.options = self.tile.options

    def operands(self) -> tuple:
        if not self.tile.descriptors:
            return self.query, self.key
        blocks = (self.tile.rows, self.tile.columns)
        pairs = zip((self.query, self.key), blocks, strict=True)
        return tuple(TensorDescriptor.from_tensor(x, [block, self.tile.width]) for x, block in pairs)

    @property
    def precision(self) -> str:
        return "tf32" if self.products == TF32 else "ieee"


def contrastive_fwd(
    query: Tensor, key: Tensor, row_scale: Tensor, column_scale: Tensor | None, bias: Tensor | None,
    excluded: Tensor | None, row_ids: Tensor | None, column_ids: Tensor | None, ceiling: Tensor | None, kind: str,
    hardness: float, workspace_mib: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with on_device(query):
        rows, columns = (row_scale, excluded, row_ids, ceiling), (column_scale, bias, column_ids)
        elements, pitch = kept_exponentials(query, key, ceiling, kind, hardness, workspace_mib)
        call = _Call(query, key, rows, columns, kind, hardness, False, elements > 0)
        count = query.shape[0]
        stats = row_scale.new_empty((call.directions, call.states, count))
        stash = query.new_empty(elements)
        pulls = row_scale.new_empty(0, count, query.shape[1])  # softmax_statistics asks for none here
        if count == 0 or key.shape[0] == 0:
            stats.zero_()[:, :2] = _EMPTY
            stats[:, 2 + 2 * call.moments :] = _EMPTY
            return stats, stash, pulls
        tile = call.tile
        plan = walk_plan(triton.cdiv(count, tile.rows), triton.cdiv(key.shape[0], tile.columns), call.programs)
        groups, splits = plan
        keep = kept(stash, count, pitch)
        slots = row_scale.new_empty((splits + groups * call.symmetric, call.states, count))
        _contrastive_fwd_kernel[(groups * splits,)](
            call.operands(), call.rows, call.columns, slots, keep, call.sizes, plan, call.beta, call.form, call.precision, tile.constants, **call.options,
        )  # fmt: skip
        upper, most = ((tile.rows, tile.columns), groups + splits) if call.upper else (None, max(plan))
        _contrastive_merge_kernel[(triton.cdiv(count, MERGE_BLOCK), call.directions)](
            slots, stats, count, plan, call.beta, call.moments, upper, triton.next_power_of_2(most), MERGE_BLOCK,
            **STREAM_OPTIONS,
        )  # fmt: skip
        return stats, stash, pulls


def kept(stash: Tensor, rows: int, pitch: int) -> tuple[Tensor, Tensor, int] | tuple[None, None, None]:
    """The exponentials, their references and the pitch of `stash`, as the kernels take them."""
    if not stash.numel():
        return None, None, None
    return stash[: rows * pitch], stash[rows * pitch :].view(torch.float32), pitch


def block_plan(rows: int, columns: int, elements: int, tile: Tile, upper: bool = False) -> tuple[int, int]:
    """(rows, columns) of the blocks of G that `elements` hold, whole tiles of columns: square where not all fits.

    Each block reads and writes the gradients' sums once, so that a square has the least of that per product. `upper`:
    blocks begin at the diagonal, below which they have the more in vain the higher they are.
    """
    if upper and rows > LOWEST:
        rows = _even(rows, max(LOWEST, rows // STRIPS), max(tile.rows, tile.columns))
    padded = triton.cdiv(columns, tile.columns) * tile.columns
    if rows * padded <= elements:
        return rows, padded
    wide = min(padded, max(math.isqrt(elements), elements // rows)) // tile.columns * tile.columns
    wide = _even(columns, max(wide, tile.columns), tile.columns)
    high = elements // wide
    return min(rows, _even(rows, high // tile.rows * tile.rows, tile.rows) if high >= tile.rows else max(high, 1)), wide


def _even(total: int, most: int, unit: int) -> int:
    """The size, at most `most` and a multiple of `unit`, of the fewest pieces of `total`, alike in size."""
    pieces = triton.cdiv(total, most)
    return triton.cdiv(triton.cdiv(total, pieces), unit) * unit


def _add_product(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """out (+)= a @ b; float32 sums of half-precision products."""
    if not a.is_cuda:  # the interpreter
        a, b = a.to(out.dtype), b.to(out.dtype)
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out) if first else out.addmm_(a, b)
    elif first:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def _half_range(grad: Tensor, call: _Call) -> Tensor:
    """A power of two (1,) that takes the largest |G| r c near 2^14: float16's range would lose the small ones."""
    weight = [1.0, 0.0] + [1.0, 0.0] * call.moments + ([1.0 + call.beta, call.beta] if call.beta else [])
    pulls = torch.stack([w * grad[:, i].abs() for i, w in enumerate(weight) if w]).sum(0)
    largest = call.rows[0].abs().amax()
    across = 1.0 if call.columns[0] is None else call.columns[0].abs().amax()
    bound = (pulls[0] * call.rows[0].abs()).amax() * across
    if call.symmetric:
        bound = bound + pulls[-1].amax() * largest * across
    power = torch.floor(14.0 - torch.log2(bound))
    return torch.exp2(torch.where(power.isfinite(), power, 0.0).clamp(-60.0, 60.0)).reshape(1)


class _Side:
    """The gradient of one of the embeddings, made of blocks, and of its scale."""

    def __init__(
        self, x: Tensor, width: int, scale: Tensor | None, needs: tuple[bool, bool], height: int, single: bool,
        factor: Tensor | None,
    ) -> None:  # fmt: skip
        self.x, self.scale, self.factor, self.height = x, scale, factor, height
        rows, (needs_x, needs_scale) = x.shape[0], needs
        self.grad = x.new_empty((rows, width) if needs_x else 0)
        self.dot = x.new_empty(rows if needs_scale else 0, dtype=torch.float32)
        self.needed = needs_x or needs_scale
        # sums in the gradient itself, where it is float32 or one rounded product is all
        self.direct = needs_x and factor is None and (x.dtype == torch.float32 or (single and not needs_scale))
        self.finishes = self.needed and (needs_scale or not self.direct)
        kept = height if self.needed else 0
        self.sums = self.grad if self.direct else x.new_empty((kept, width), dtype=torch.float32)

    def part(self, start: int, stop: int) -> Tensor:
        """The sums of these rows, which are those of one block when sums are kept for one only."""
        return self.sums[start:stop] if self.direct or self.height == self.x.shape[0] else self.sums[: stop - start]

    def finish(self, start: int, stop: int) -> None:
        if not self.finishes:
            return
        x, sums = self.x[start:stop], self.part(start, stop)
        grad = None if self.direct or not self.grad.numel() else self.grad[start:stop]
        scale, dot = None, None
        if self.dot.numel() and self.scale is not None:
            scale, dot = self.scale[start:stop], self.dot[start:stop]
        _contrastive_finish_kernel[(triton.cdiv(stop - start, FINISH_BLOCK[0]),)](
            sums, x, grad, scale, dot, self.factor, (*sums.shape, x.stride(0)), *FINISH_BLOCK, **STREAM_OPTIONS,
        )  # fmt: skip


def contrastive_bwd(
    grad: Tensor, query: Tensor, key: Tensor, row_scale: Tensor, column_scale: Tensor | None, bias: Tensor | None,
    excluded: Tensor | None, row_ids: Tensor | None, column_ids: Tensor | None, ceiling: Tensor | None, kind: str,
    hardness: float, workspace_mib: float, keep: bool, stats: Tensor, stash: Tensor, pulls: Tensor, needs_query: bool,
    needs_key: bool, needs_row_scale: bool, needs_column_scale: bool, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (m, width), n = query.shape, key.shape[0]
    with on_device(query):
        rows, columns = (row_scale, excluded, row_ids, ceiling), (column_scale, bias, column_ids)
        _, pitch = kept_exponentials(query, key, ceiling, kind, hardness, workspace_mib)
        call = _Call(query, key, rows, columns, kind, hardness, True, pitch > 0)
        elements = int(workspace_mib * 2**20) // query.element_size() - stash.numel()
        high, wide = block_plan(max(m, 1), max(n, 1), elements, call.tile, call.upper)
        factor = _half_range(grad, call) if query.dtype == torch.float16 and m else None
        needs = ((needs_query, needs_row_scale), (needs_key, needs_column_scale))
        q = _Side(call.query, width, call.rows[0], needs[0], min(high, m), wide >= n, factor)
        k = _Side(call.key, width, call.columns[0], needs[1], n, high >= m, factor)
        bias_grad = row_scale.new_zeros(n if needs_bias else 0)
        out = (q.grad, k.grad, q.dot, k.dot, bias_grad)
        if m == 0 or n == 0:
            for each in out:
                each.zero_()
            return out
        given = (stats, grad.contiguous(), factor, *kept(stash, m, pitch))
        _gradients(call, given, (high, wide), q, k, bias_grad)
    return out


def _gradients(
    call: _Call, given: tuple, blocks: tuple[int, int], q: _Side, k: _Side, bias_grad: Tensor
) -> None:
    """Fill the gradients block by block; `given` is what the kernel takes of the forward and from upstream."""
    (m, n, _), (high, wide), tile = call.sizes, blocks, call.tile
    starts = [(row, row // tile.columns * tile.columns if call.upper else 0) for row in range(0, m, high)]
    work = call.query.new_empty((high, wide)) if q.needed or k.needed else None
    sums = bias_grad.new_empty((triton.cdiv(high, tile.rows), wide)) if bias_grad.numel() else None
    if work is None and sums is None:
        return
    operands = call.operands()
    for row, start, column in ((row, start, column) for row, start in starts for column in range(start, n, wide)):
        end, stop = min(row + high, m), min(column + wide, n)
        tiles = triton.cdiv(end - row, tile.rows), triton.cdiv(stop - column, tile.columns)
        _contrastive_bwd_kernel[(tiles[0] * tiles[1],)](
            operands, call.rows, call.columns, (work, sums), given, call.sizes, (row, column, end, *tiles, wide),
            call.beta, call.form, call.precision, tile.constants, GROUP, **call.options,
        )  # fmt: skip
        if sums is not None:
            bias_grad[column:stop] += sums[: tiles[0], : stop - column].sum(0)
        if work is None:
            continue
        block = work[: end - row, : stop - column]
        if q.needed:
            _add_product(q.part(row, end), block, call.key[column:stop, : q.sums.shape[1]], column == start)
            if stop == n:
                q.finish(row, end)
        if k.needed:
            _add_product(k.part(column, stop), block.T, call.query[row:end, : k.sums.shape[1]], row == 0)
    if k.needed:
        k.finish(0, n)


def _aot_call(
    dtype: torch.dtype, shape: tuple[int, int, int], kind: str, extras: tuple[str, ...] = (), hardness: float = 0.0
) -> tuple[tuple, tuple]:
    """Arguments of the two launchers on the meta device; `extras` names the optional vectors that are given."""
    rows, columns, width = shape
    meta = torch.device("meta")
    query, key = (torch.empty((size, width), dtype=dtype, device=meta) for size in (rows, columns))
    floats = {"column_scale": columns, "bias": columns, "ceiling": rows}
    vectors = {name: torch.empty(size, device=meta) if name in extras else None for name, size in floats.items()}
    whole = {"excluded": rows, "row_ids": rows, "column_ids": columns}
    ids = {
        name: torch.empty(size, dtype=torch.int64, device=meta) if name.split("_")[-1] in extras else None
        for name, size in whole.items()
    }
    given = (query, key, torch.empty(rows, device=meta), vectors["column_scale"], vectors["bias"], ids["excluded"])
    workspace_mib = rows * columns / 2**17  # one block of gradients, and a stash
    forward = (*given, ids["row_ids"], ids["column_ids"], vectors["ceiling"], kind, hardness, workspace_mib, False)
    count = 2 + 2 * ("moments" in kind) + 2 * (hardness > 0)
    stats = torch.empty((1 + ("symmetric" in kind), count, rows), device=meta)
    needs = (True, True, True, "column_scale" in extras, "bias" in extras)
    elements, _ = kept_exponentials(query, key, vectors["ceiling"], kind, hardness, workspace_mib)
    stash = torch.empty(elements, dtype=dtype, device=meta)
    return forward, (stats, *forward, stats, stash, torch.empty(0, device=meta), *needs)


def _with_tf32(launch: Callable[..., Any]) -> Callable[..., Any]:
    """`launch` as it is where the user has switched tf32 on."""

    def launched(*args: Any) -> Any:
        matmul = torch.backends.cuda.matmul
        before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
        try:
            return launch(*args)
        finally:
            matmul.fp32_precision = before

    return launched


def aot_cases() -> Iterator[AotCase]:
    """Every tile of the table once at least, every option once at least, sizes that no block divides."""
    half, brain, full = torch.float16, torch.bfloat16, torch.float32
    clip, square, small = "diagonal+symmetric", (4096, 4096, 512), (200, 200, 77)
    scaled = ("column_scale",)
    calls: list[tuple[torch.dtype, bool, tuple[int, int, int], str, tuple[str, ...], float]] = [
        (brain, False, square, clip, scaled, 0.0),
        (half, False, (4099, 4099, 77), clip, scaled, 0.0),
        (brain, False, (4096, 4096, 16), clip, scaled, 0.0),
        (brain, False, small, clip, scaled, 0.0),
        (full, False, square, clip, scaled, 0.0),
        (full, False, small, clip, scaled, 0.0),
        (full, True, square, clip, scaled, 0.0),
        (full, True, small, clip, scaled, 0.0),
        (brain, False, (2**20, 2**20, 768), "", ("column_scale", "bias", "excluded", "ids"), 0.0),
        (brain, False, (4096, 65536, 768), "diagonal+moments", ("column_scale", "excluded"), 0.5),
        (half, False, square, clip, ("ceiling", "bias"), 0.0),
        (brain, False, square, "diagonal+symmetric+moments", ("column_scale", "ids"), 0.5),
        (full, False, square, "diagonal+symmetric+moments", ("column_scale", "ceiling"), 0.5),
        (brain, False, square, clip, ("column_scale", "bias", "ids"), 0.0),
        (full, False, square, "diagonal+moments", ("bias", "ids", "ceiling"), 0.0),
        (full, True, square, "diagonal+moments", ("column_scale", "ids", "ceiling"), 0.0),
        (brain, False, square, clip + "+stash", scaled, 0.0),
        (brain, False, small, clip + "+stash", scaled, 0.0),
        (full, False, square, clip + "+stash", scaled, 0.0),
        (full, True, (4099, 4099, 77), clip + "+stash", scaled, 0.0),
        (half, False, square, "diagonal+stash", scaled, 0.0),
        (brain, False, (256, 65536, 512), "stash", ("column_scale", "bias", "excluded", "ids"), 0.0),
        (brain, False, square, clip + "+stash", ("column_scale", "bias", "ids"), 0.0),
        (brain, False, square, "upper+stash", ("excluded",), 0.0),
        (brain, False, square, "upper", ("excluded",), 0.0),
        (full, False, (4099, 4099, 77), "upper", ("excluded", "ids"), 0.0),
        (full, True, square, "upper", ("excluded",), 0.0),
        (half, False, square, "upper+moments", ("excluded", "ids", "ceiling"), 0.5),
    ]
    for dtype, tf32, shape, kind, extras, hardness in calls:
        forward, backward = _aot_call(dtype, shape, kind, extras, hardness)
        words = ("tf32" if tf32 else str(dtype).removeprefix("torch."), kind, *extras, f"beta {hardness}", str(shape))
        # without tf32 the float32 products of NVIDIA devices are plain multiply-adds
        matrix = dtype != full or tf32
        sides = (("forward", contrastive_fwd, forward, "fwd"), ("backward", contrastive_bwd, backward, "bwd"))
        for name, launch, given, end in sides:
            rescales = end == "bwd" and "stash" in kind and not {"symmetric", "upper"} & set(kind.split("+"))
            kernels = (f"_contrastive_{end}_kernel",) * (matrix and not rescales)
            yield AotCase(" ".join((name, *words)), _with_tf32(launch) if tf32 else launch, given, (), kernels)
