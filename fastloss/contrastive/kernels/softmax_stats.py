"""Triton kernels of the softmax contrastive op (see ops/softmax_stats.py for its definition).

The logits s_ij = r_i c_j <q_i, k_j> + b_j are made tile by tile with `tl.dot` and never stored. A row's or a column's
state is

    best     max of s over its allowed entries
    mass     sum of e^s / 2^reference, reference = ceil(best / log 2)
    total, count                  with MOMENTS: sum and number of the allowed s
    hard, soft                    with HARD: sums of e^((1 + beta) (s - best)) and of e^(beta (s - best))

The derivation: docs/design/contrastive.md
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...core.kernels.launch import AotCase, on_device
from ...core.kernels.matmul import add_product, embeddings
from ..ops.softmax_stats import Grads, Inputs, Needs, Saved
from ..save_plan import kept_exponentials
from .blocking import block_plan, chunk_plan
from .embedding_gradients import EmbeddingGradient
from .logit_matrix import LogitMatrix
from .passes import chunk_memory, half_range, kept, make_block, make_gradients, make_statistics, new_stash
from .tile_configs import SPILLED

_EMPTY = float("-inf")


def _vectors(x: Inputs) -> tuple[tuple, tuple]:
    """Those of rows and of columns, as the kernels take them."""
    return (x.row_scale, x.excluded, x.row_ids, x.ceiling), (x.column_scale, x.bias, x.column_ids)


def softmax_stats_fwd(x: Inputs) -> Saved:
    with on_device(x.query):
        rows, columns = _vectors(x)
        elements, pitch = kept_exponentials(x.query, x.key, x.ceiling, x.kind, x.hardness, x.workspace_mib)
        call = LogitMatrix(x.query, x.key, rows, columns, x.kind, x.hardness, False, elements > 0, x.workspace_mib)
        count = x.query.shape[0]
        stats = x.row_scale.new_empty((call.directions, call.states, count))
        stash = new_stash(x.query, elements)
        if x.keep:
            return make_pulls(x.query, x.key, rows, columns, x.kind, x.workspace_mib)
        pulls = x.row_scale.new_empty(0, count, x.query.shape[1])
        if count == 0 or x.key.shape[0] == 0:
            stats.zero_()[:, :2] = _EMPTY
            stats[:, 2 + 2 * call.moments :] = _EMPTY
            return Saved(stats, stash, pulls)
        make_statistics(call, stats, kept(stash, count, pitch))
        return Saved(stats, stash, pulls)


def make_pulls(query: Tensor, key: Tensor, rows: tuple, columns: tuple, kind: str, workspace_mib: float) -> Saved:
    """Statistics, no stash, and the pull of each row's log-sum-exp on it, a chunk of rows at a time."""
    (m, width), n = query.shape, key.shape[0]
    query, key = embeddings(query), embeddings(key)
    stats, pulls = rows[0].new_empty((1, 2, m)), rows[0].new_empty((1, m, width))
    if m == 0 or n == 0:
        return Saved(stats.fill_(_EMPTY), query.new_empty(0), pulls.zero_())
    ones = torch.ones_like(stats)
    rows = (rows[0], torch.arange(m, device=query.device) if "diagonal" in kind else rows[1], *rows[2:])
    if query.dtype == torch.float32:  # the pulls are those before the rows' own scale, for which products have no place
        query, rows = query * rows[0][:, None], (ones[0, 0], *rows[1:])
    height, size, pitch = chunk_plan(m, n, query.element_size(), workspace_mib)
    stash, factor = query.new_empty(size), None
    if query.dtype == torch.float16:
        factor = half_range(
            ones, LogitMatrix(query, key, (torch.ones_like(rows[0]), None, None, None), columns, "", 0.0)
        )
    for start in range(0, m, height):
        part = slice(start, min(start + height, m))
        count, some = part.stop - start, tuple(None if v is None else v[part] for v in rows)
        call = LogitMatrix(query[part], key, some, columns, "", 0.0, False, True)
        made, (keep, work, room) = stats.new_empty((1, 2, count)), chunk_memory(call, stash, count, pitch)
        make_statistics(call, made, keep, room)
        stats[:, :, part] = made
        call.rows = (ones[0, 0, :count], *call.rows[1:])
        given = (made, ones, factor, *keep, None)
        block = make_block(call, work, None, given, (0, 0, count, n), pitch, room is not None)
        add_product(pulls[0, part], block, key[:, :width], True)
    if factor is not None:
        pulls /= factor
    return Saved(stats, query.new_empty(0), pulls)


def softmax_stats_bwd(grad: Tensor, x: Inputs, saved: Saved, needs: Needs) -> Grads:
    (m, width), n = x.query.shape, x.key.shape[0]
    with on_device(x.query):
        if x.keep:
            return _from_pulls(grad, x, saved, needs)
        rows, columns = _vectors(x)
        _, pitch = kept_exponentials(x.query, x.key, x.ceiling, x.kind, x.hardness, x.workspace_mib)
        call = LogitMatrix(x.query, x.key, rows, columns, x.kind, x.hardness, True, pitch > 0)
        elements = int(x.workspace_mib * 2**20) // x.query.element_size() - saved.stash.numel()
        high, wide = block_plan(max(m, 1), max(n, 1), elements, call.tile, call.upper)
        factor = half_range(grad, call) if x.query.dtype == torch.float16 and m else None
        q = EmbeddingGradient(
            call.query, width, call.rows[0], (needs.query, needs.row_scale), min(high, m), wide >= n, factor
        )
        k = EmbeddingGradient(call.key, width, call.columns[0], (needs.key, needs.column_scale), n, high >= m, factor)
        bias_grad = x.row_scale.new_zeros(n if needs.bias else 0)
        out = Grads(q.grad, k.grad, q.dot, k.dot, bias_grad)
        if m == 0 or n == 0:
            for each in out:
                each.zero_()
            return out
        given = (saved.stats, grad.contiguous(), factor, *kept(saved.stash, m, pitch), None)
        make_gradients(call, given, (high, wide), q, k, bias_grad)
    return out


def _from_pulls(grad: Tensor, x: Inputs, saved: Saved, needs: Needs) -> Grads:
    pull, upstream, empty = saved.pulls[0], grad[0, 0], x.row_scale.new_empty(0)
    query_grad = x.query.new_empty(x.query.shape if needs.query else 0)
    if needs.query:
        torch.mul(pull, (upstream * x.row_scale)[:, None], out=query_grad)
    dot = (pull * x.query).sum(1) * upstream if needs.row_scale else empty
    return Grads(query_grad, x.key.new_empty(0), dot, empty, empty)


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
    workspace_mib = rows * columns / 2**17  # one block of gradients, and a stash
    x = Inputs(
        query, key, torch.empty(rows, device=meta), vectors["column_scale"], vectors["bias"], ids["excluded"],
        ids["row_ids"], ids["column_ids"], vectors["ceiling"], kind, hardness, workspace_mib,
    )  # fmt: skip
    count = 2 + 2 * ("moments" in kind) + 2 * (hardness > 0)
    stats = torch.empty((1 + ("symmetric" in kind), count, rows), device=meta)
    needs = Needs(True, True, True, "column_scale" in extras, "bias" in extras)
    elements, _ = kept_exponentials(query, key, vectors["ceiling"], kind, hardness, workspace_mib)
    stash = torch.empty(elements, dtype=dtype, device=meta)
    return (x,), (stats, x, Saved(stats, stash, torch.empty(0, device=meta)), needs)


def aot_cases() -> Iterator[AotCase]:
    """Every tile of the table once at least, every option once at least, sizes that no block divides."""
    half, brain, full = torch.float16, torch.bfloat16, torch.float32
    clip, square, small = "diagonal+symmetric", (4096, 4096, 512), (200, 200, 77)
    scaled = ("column_scale",)
    calls: list[tuple[torch.dtype, tuple[int, int, int], str, tuple[str, ...], float]] = [
        (brain, square, clip, scaled, 0.0),
        (half, (4099, 4099, 77), clip, scaled, 0.0),
        (brain, (4096, 4096, 16), clip, scaled, 0.0),
        (brain, small, clip, scaled, 0.0),
        (full, square, clip, scaled, 0.0),
        (full, small, clip, scaled, 0.0),
        (brain, (2**20, 2**20, 768), "", ("column_scale", "bias", "excluded", "ids"), 0.0),
        (brain, (4096, 65536, 768), "diagonal+moments", ("column_scale", "excluded"), 0.5),
        (half, square, clip, ("ceiling", "bias"), 0.0),
        (brain, square, "diagonal+symmetric+moments", ("column_scale", "ids"), 0.5),
        (full, square, "diagonal+symmetric+moments", ("column_scale", "ceiling"), 0.5),
        (brain, square, clip, ("column_scale", "bias", "ids"), 0.0),
        (full, square, "diagonal+moments", ("bias", "ids", "ceiling"), 0.0),
        (brain, square, clip + "+stash", scaled, 0.0),
        (brain, small, clip + "+stash", scaled, 0.0),
        (half, square, "diagonal+stash", scaled, 0.0),
        (brain, (256, 65536, 512), "stash", ("column_scale", "bias", "excluded", "ids"), 0.0),
        (brain, square, clip + "+stash", ("column_scale", "bias", "ids"), 0.0),
        (brain, square, "upper+stash", ("excluded",), 0.0),
        (brain, square, "upper", ("excluded",), 0.0),
        (full, (4099, 4099, 77), "upper", ("excluded", "ids"), 0.0),
        (half, square, "upper+moments", ("excluded", "ids", "ceiling"), 0.5),
    ]
    for dtype, shape, kind, extras, hardness in calls:
        forward, backward = _aot_call(dtype, shape, kind, extras, hardness)
        words = (str(dtype).removeprefix("torch."), kind, *extras, f"beta {hardness}", str(shape))
        sides = (("forward", softmax_stats_fwd, forward, "fwd"), ("backward", softmax_stats_bwd, backward, "bwd"))
        for name, launch, given, end in sides:
            kernels = (f"_contrastive_{end}_kernel",) * (dtype != full and not (end == "bwd" and "stash" in kind))
            spills = SPILLED if end == "fwd" and kind == clip + "+stash" else 0
            yield AotCase(" ".join((name, *words)), launch, given, (), kernels, spills)
