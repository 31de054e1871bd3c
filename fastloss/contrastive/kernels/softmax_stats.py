"""Launchers of the statistics of the softmax losses and of their gradients (see ops/softmax_stats.py).

The logits s_ij = r_i c_j <q_i, k_j> + b_j are made tile by tile and never stored: online_softmax.py sums their
exponentials, logit_gradients.py makes their gradient G a block at a time, which library products turn into those of
query and key. The derivation: docs/design/contrastive.md
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...core.kernels.launch import AotCase, on_device
from ...core.kernels.matmul import add_product, embeddings
from ..ops.softmax_stats import Grads, Inputs, Needs, Saved
from ..options import Form
from ..save_plan import exponentials
from .arguments import Area, BackwardInputs, BackwardResults, Columns, Rows
from .blocking import block_plan, chunk_plan
from .embedding_gradients import EmbeddingGradient
from .logit_matrix import LogitMatrix
from .passes import chunk_memory, fp16_scale_of, make_block, make_gradients, make_statistics, new_exps, saved_exps
from .tile_configs import SPILLED

_EMPTY = float("-inf")


def _call(x: Inputs, backward: bool) -> LogitMatrix:
    rows = Rows(x.row_scale, x.targets, x.row_ids, x.logit_limit, x.pair_spans)
    columns = Columns(x.column_scale, x.bias, x.column_ids, x.pair_words)
    saves_exps = x.save == "exps"
    return LogitMatrix(x.query, x.key, rows, columns, x.form, x.hardness, backward, saves_exps, x.workspace_mib)


def softmax_stats_fwd(x: Inputs) -> Saved:
    with on_device(x.query):
        if x.save == "weighted_keys":
            return _with_weighted_keys(x)
        rows, columns = x.query.shape[0], x.key.shape[0]
        call = _call(x, backward=False)
        stats = x.row_scale.new_empty((call.directions, call.states, rows))
        weighted_keys, elements, pitch = x.row_scale.new_empty(0, rows, x.query.shape[1]), 0, 0
        if x.save == "exps":
            elements, pitch = exponentials(rows, columns, x.query.element_size())
        logits = new_exps(x.query if x.save == "exps" else x.row_scale, elements)
        if rows == 0 or columns == 0:
            stats.zero_()[:, :2] = _EMPTY
            stats[:, 2 + 2 * x.moments :] = _EMPTY
            return Saved(stats, logits, weighted_keys)
        make_statistics(call, stats, saved_exps(logits, rows, pitch))
        return Saved(stats, logits, weighted_keys)


def _with_weighted_keys(x: Inputs) -> Saved:
    """Statistics, and for each row the sum of the keys by the softmax of its logits, a chunk of rows at a time."""
    (m, dim), n = x.query.shape, x.key.shape[0]
    query, key = embeddings(x.query), embeddings(x.key)
    columns = Columns(x.column_scale, x.bias, x.column_ids, x.pair_words)
    stats, weighted_keys = x.row_scale.new_empty((1, 2, m)), x.row_scale.new_empty((1, m, dim))
    no_logits = x.row_scale.new_empty(0)
    if m == 0 or n == 0:
        return Saved(stats.fill_(_EMPTY), no_logits, weighted_keys.zero_())
    ones = torch.ones_like(stats)
    one_each = ones[0, 0]  # [M]
    targets = torch.arange(m, device=query.device) if x.diagonal else x.targets  # a chunk of rows knows no diagonal
    rows = Rows(x.row_scale, targets, x.row_ids, x.logit_limit, x.pair_spans)
    if query.dtype == torch.float32:  # the sums are those before the rows' own scale, for which products have no place
        query, rows = query * x.row_scale[:, None], rows._replace(row_scale=one_each)
    form = Form(are_negatives=x.are_negatives)
    chunk = chunk_plan(m, n, query.element_size(), x.workspace_mib)
    memory, fp16_scale = query.new_empty(chunk.elements), None
    if query.dtype == torch.float16:
        of_ones = LogitMatrix(query, key, Rows(one_each, None, None, None), columns, form, 0.0)
        fp16_scale = fp16_scale_of(ones, of_ones)
    for start in range(0, m, chunk.rows):
        part = slice(start, min(start + chunk.rows, m))
        count = part.stop - start
        call = LogitMatrix(query[part], key, rows.part(part), columns, form, 0.0, False, True)
        part_stats = stats.new_empty((1, 2, count))
        saved, grad_block, products = chunk_memory(call, memory, count, chunk.pitch)
        make_statistics(call, part_stats, saved, products)
        stats[:, :, part] = part_stats
        call.rows = call.rows._replace(row_scale=one_each[:count])
        inputs = BackwardInputs(part_stats, ones, fp16_scale, *saved, None)
        results, area = BackwardResults(grad_block, None), Area(0, count, 0, n)
        block = make_block(call, results, inputs, area, chunk.pitch, products is not None)
        add_product(weighted_keys[0, part], block, key[:, :dim], True)
    if fp16_scale is not None:
        weighted_keys /= fp16_scale
    return Saved(stats, no_logits, weighted_keys)


def softmax_stats_bwd(grad: Tensor, x: Inputs, saved: Saved, needs: Needs) -> Grads:
    (m, dim), n = x.query.shape, x.key.shape[0]
    with on_device(x.query):
        if x.save == "weighted_keys":
            return _from_weighted_keys(grad, x, saved, needs)
        call = _call(x, backward=True)
        pitch = exponentials(m, n, x.query.element_size()).pitch
        exps = saved_exps(saved.logits, m, pitch)
        elements = int(x.workspace_mib * 2**20) // x.query.element_size() - saved.logits.numel()
        block_size = block_plan(max(m, 1), max(n, 1), elements, call.tile, x.self_similarity)
        fp16_scale = fp16_scale_of(grad, call) if x.query.dtype == torch.float16 and m else None
        block_rows, block_columns = block_size
        q = EmbeddingGradient(
            call.query, dim, call.rows.row_scale, (needs.query, needs.row_scale), min(block_rows, m),
            block_columns >= n, fp16_scale,
        )  # fmt: skip
        k = EmbeddingGradient(
            call.key, dim, call.columns.column_scale, (needs.key, needs.column_scale), n, block_rows >= m, fp16_scale
        )
        bias_grad = x.row_scale.new_zeros(n if needs.bias else 0)
        out = Grads(q.grad, k.grad, q.dot, k.dot, bias_grad)
        if m == 0 or n == 0:
            for t in out:
                t.zero_()
            return out
        inputs = BackwardInputs(saved.stats, grad.contiguous(), fp16_scale, *exps, None)
        make_gradients(call, inputs, block_size, q, k, bias_grad)
    return out


def _from_weighted_keys(grad: Tensor, x: Inputs, saved: Saved, needs: Needs) -> Grads:
    weighted_keys, grad_lse, empty = saved.weighted_keys[0], grad[0, 0], x.row_scale.new_empty(0)
    query_grad = x.query.new_empty(x.query.shape if needs.query else 0)
    if needs.query:
        torch.mul(weighted_keys, (grad_lse * x.row_scale)[:, None], out=query_grad)
    row_scale_grad = (weighted_keys * x.query).sum(1) * grad_lse if needs.row_scale else empty
    return Grads(query_grad, x.key.new_empty(0), row_scale_grad, empty, empty)


def _aot_call(
    dtype: torch.dtype, shape: tuple[int, int, int], form: Form, save: str, options: tuple[str, ...], hardness: float
) -> tuple[tuple, tuple]:
    """Arguments of the two launchers on the meta device; `options` names the optional vectors that are there."""
    rows, columns, dim = shape
    meta = torch.device("meta")
    query, key = (torch.empty((size, dim), dtype=dtype, device=meta) for size in (rows, columns))
    vectors: dict[str, Any] = {
        name: torch.empty(size, device=meta) if name in options else None
        for name, size in {"column_scale": columns, "bias": columns, "logit_limit": rows}.items()
    }
    vectors |= {
        name: torch.empty(size, dtype=torch.int64, device=meta) if name.split("_")[-1] in options else None
        for name, size in {"targets": rows, "row_ids": rows, "column_ids": columns}.items()
    }
    if "pairs" in options:
        sizes = {"pair_spans": (rows, torch.int64), "pair_words": (8 * rows, torch.int32)}
        vectors |= {name: torch.empty((n, 2), dtype=dtype, device=meta) for name, (n, dtype) in sizes.items()}
    x = Inputs(
        query, key, torch.empty(rows, device=meta), **vectors, **form._asdict(), hardness=hardness,
        workspace_mib=rows * columns / 2**17, save=save,  # one block of gradients, and exponentials
    )  # fmt: skip
    states = 2 + 2 * form.moments + 2 * (hardness > 0)
    stats = torch.empty((1 + form.symmetric, states, rows), device=meta)
    needs = Needs(True, True, True, "column_scale" in options, "bias" in options)
    elements = exponentials(rows, columns, query.element_size()).elements if save == "exps" else 0
    exps = torch.empty(elements, dtype=dtype, device=meta)
    return (x,), (stats, x, Saved(stats, exps, torch.empty(0, device=meta)), needs)


def aot_cases() -> Iterator[AotCase]:
    """Every tile of the table once at least, every option once at least, sizes that no block divides."""
    fp16, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
    square, small = (4096, 4096, 512), (200, 200, 77)
    clip, diagonal, own = Form(diagonal=True, symmetric=True), Form(diagonal=True), Form(self_similarity=True)
    scales, targets = ("column_scale",), ("targets",)
    bank = ("column_scale", "bias", "targets", "ids")
    calls: list[tuple[torch.dtype, tuple[int, int, int], Form, str, tuple[str, ...], float]] = [
        (bf16, square, clip, "", scales, 0.0),
        (bf16, square, clip, "", (), 0.0),  # what clip_loss asks for, whose rows come normalised
        (fp16, (4099, 4099, 77), clip, "", scales, 0.0),
        (bf16, (4096, 4096, 16), clip, "", scales, 0.0),
        (bf16, small, clip, "", scales, 0.0),
        (fp32, square, clip, "", scales, 0.0),
        (fp32, small, clip, "", scales, 0.0),
        (bf16, (2**20, 2**20, 768), Form(), "", bank, 0.0),
        (bf16, (4096, 65536, 768), diagonal._replace(moments=True), "", ("column_scale", "targets"), 0.5),
        (fp16, square, clip, "", ("logit_limit", "bias"), 0.0),
        (bf16, square, clip._replace(moments=True), "", ("column_scale", "ids"), 0.5),
        (fp32, square, clip._replace(moments=True), "", ("column_scale", "logit_limit"), 0.5),
        (bf16, square, clip, "", ("column_scale", "bias", "ids"), 0.0),
        (fp32, square, diagonal._replace(moments=True), "", ("bias", "ids", "logit_limit"), 0.0),
        (bf16, square, clip, "exps", scales, 0.0),
        (bf16, square, clip, "exps", (), 0.0),
        (bf16, (4096, 4096, 16), clip, "exps", (), 0.0),
        (bf16, small, clip, "exps", scales, 0.0),
        (fp16, square, diagonal, "exps", scales, 0.0),
        (bf16, (256, 65536, 512), Form(), "exps", bank, 0.0),
        (bf16, square, clip, "exps", ("column_scale", "bias", "ids"), 0.0),
        (bf16, square, own, "exps", targets, 0.0),
        (bf16, square, own, "", targets, 0.0),
        (fp32, (4099, 4099, 77), own, "", ("targets", "ids"), 0.0),
        (fp16, square, own._replace(moments=True), "", ("targets", "ids", "logit_limit"), 0.5),
        (bf16, square, clip, "exps", (*scales, "pairs"), 0.0),
        (bf16, square, clip, "", (*scales, "pairs"), 0.0),
        (bf16, square, diagonal._replace(are_negatives=True), "exps", ("column_scale", "targets", "pairs"), 0.0),
        (fp16, square, diagonal._replace(are_negatives=True), "", (*bank, "logit_limit", "pairs"), 0.0),
        (bf16, small, clip._replace(moments=True), "", ("column_scale", "ids", "pairs"), 0.5),
        (fp32, (4099, 4099, 77), clip, "", ("column_scale", "pairs"), 0.0),
    ]
    for dtype, shape, form, save, options, hardness in calls:
        forward, backward = _aot_call(dtype, shape, form, save, options, hardness)
        flags = [name for name, value in form._asdict().items() if value]
        words = (str(dtype).removeprefix("torch."), *flags, save, *options, f"beta {hardness}", str(shape))
        sides = (("forward", softmax_stats_fwd, forward, "fwd"), ("backward", softmax_stats_bwd, backward, "bwd"))
        for name, launch, args, end in sides:
            kernels = (f"_softmax_stats_{end}_kernel",) * (dtype != fp32 and not (end == "bwd" and save == "exps"))
            spills = SPILLED if end == "fwd" and form == clip and save == "exps" else 0
            yield AotCase(" ".join((name, *words)), launch, args, (), kernels, spills)
