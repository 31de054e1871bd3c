"""Launchers of the plain loss with frozen negatives that all rows share (see ops/softmax_loss_shared.py).

    norms.py            the scales r_i and c(n_j), and the positives' logits: one launch reads the bank once
    weighted_keys.py    states and weighted keys of each split of the negatives: another read of it
    here                from those, row by row: the log-sum-exp, the loss, and the gradients of query and key

Where weighted_keys.py has no tile (float32, float16, long embeddings), the statistics and weighted keys are those of
softmax_stats.py, in blocks of exponentials and a library's products.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.device_math import number_in
from ...core.kernels.launch import AotCase, odd_number, on_device
from ...core.kernels.matmul import embeddings
from ..ops import softmax_stats as stats_op
from ..ops.softmax_loss_shared import Grads, Inputs, Needs, Saved
from ..options import Form
from ..save_plan import KEY, QUERY, SCALE
from .arguments import Columns, Rows
from .embedding_gradients import scaled_by_torch
from .norms import Prepared, prepare
from .online_softmax import _exponent, _log, _rescale
from .pair_gradients import PairGradients, pair_gradients, store_pair_gradients
from .row_losses import LossForm, loss_and_slope, row_losses
from .softmax_stats import softmax_stats_fwd
from .tile_configs import SPILLED
from .weighted_keys import Partials, tile_of, weighted_keys

SPLITS = 8  # whose sums are read at a time
SLOTS = 256  # that the kernel is compiled for, whatever the batch: as many splits as programs, at most


class RowInputs(NamedTuple):
    """What is known of each row beside its negatives."""

    query: Tensor  # [M, D]
    key: Tensor  # [M, D]
    row_scale: Tensor  # [M]
    positive: Tensor  # [M]
    row_weight: Tensor | None  # [M]


class RowForm(NamedTuple):
    """What the kernel is compiled for."""

    include_positive: bool
    normalize: bool
    dim: int  # D, padded to a power of two


@triton.jit
def _finish_kernel(
    partials,  # Partials
    inputs,  # RowInputs
    loss_ptr,  # (M,): row_weight_i loss_i
    out,  # PairGradients
    splits,  # an odd_number
    dim,
    sum_pitch,  # D of the sums
    part,  # what each row's loss counts in the result
    FORM: tl.constexpr,  # RowForm
    SLOTS: tl.constexpr,  # a power of two, at least the number of splits
    SPLITS: tl.constexpr,
):
    INCLUDE_POSITIVE: tl.constexpr = FORM.include_positive
    NORMALIZE: tl.constexpr = FORM.normalize
    DIM: tl.constexpr = FORM.dim
    row, splits, stride = tl.program_id(0), number_in(splits), 2 * tl.cast(partials.pitch, tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    used = slot < splits
    states = partials.states + row
    slot_max = tl.load(states + slot * stride, mask=used, other=float("-inf"))
    slot_sum = tl.load(states + slot * stride + partials.pitch, mask=used, other=0.0)
    row_max = tl.max(slot_max, 0)
    sum_exp = tl.sum(slot_sum * _rescale(slot_max, row_max, _exponent(slot_max)), 0)
    lse = _log(row_max, sum_exp)
    weight = 1.0
    if inputs.row_weight is not None:
        weight = tl.load(inputs.row_weight + row)
    counts = (lse != float("-inf")) & (weight != 0.0)  # what is left out may be NaN
    loss, slope = loss_and_slope(lse, tl.load(inputs.positive + row), counts, INCLUDE_POSITIVE)
    tl.store(loss_ptr + row, tl.where(counts, loss * weight, 0.0))
    grad_lse = tl.where(counts, slope * (weight * part), 0.0)
    columns = tl.arange(0, DIM)
    keys = tl.zeros((DIM,), tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        there = split < splits
        split_max = tl.load(states + split * stride, mask=there, other=float("-inf"))
        share = _rescale(split_max, row_max, _exponent(split_max))
        offset = (split * rows + row)[:, None] * sum_pitch + columns[None, :]
        mask = there[:, None] & (columns < dim)[None, :]
        keys += tl.sum(tl.load(partials.sums + offset, mask=mask, other=0.0) * share[:, None], 0)
    store_pair_gradients(
        grad_lse, keys / sum_exp, row.to(tl.int64), inputs.query, inputs.key, inputs.row_scale, out, dim, NORMALIZE, DIM
    )


def _finish(
    x: Inputs, partials: Partials, inputs: RowInputs, loss: Tensor, out: PairGradients, part: float
) -> None:  # fmt: skip
    (rows, dim), splits = x.query.shape, partials.sums.shape[0]
    form = RowForm(x.include_positive, x.normalize, triton.next_power_of_2(dim))
    _finish_kernel[(rows,)](
        partials, inputs, loss, out, odd_number(splits), dim, partials.sums.shape[2], part, form, SLOTS, SPLITS,
        enable_fp_fusion=True, num_warps=4,
    )  # fmt: skip


def _by_statistics(
    x: Inputs, inputs: RowInputs, rows: Rows, columns: Columns, loss: Tensor, out: PairGradients, part: float
) -> None:
    """The same from the statistics of the rows and, where something is differentiated, their weighted keys."""
    given = stats_op.Inputs(
        query=x.query, key=x.negatives, **rows._asdict(), **columns._asdict(), **Form()._asdict(), hardness=0.0,
        workspace_mib=x.workspace_mib, save="weighted_keys" if x.needs else "",
    )  # fmt: skip
    stats, _, keys = softmax_stats_fwd(given)
    stats_grad = loss.new_empty((2, loss.shape[0])) if x.needs else None
    form = LossForm(x.include_positive, 1, x.reduction == "none")
    row_losses(stats, inputs.positive, inputs.row_weight, form, part, loss, stats_grad)
    if stats_grad is not None:
        pair_gradients(stats_grad, keys, inputs.query, inputs.key, inputs.row_scale, out, x.normalize)


def softmax_loss_shared_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    (m, dim), n = x.query.shape, x.negatives.shape[0]
    new_float32 = x.query.new_empty(0, dtype=torch.float32).new_empty
    loss, positive, row_scale = (new_float32(m) for _ in range(3))
    grads = Saved(
        query_grad=new_float32((m if x.needs & QUERY else 0, dim)),
        key_grad=new_float32((m if x.needs & KEY else 0, dim)),
        scale_grad=new_float32(m if x.needs & SCALE else 0),
    )
    with on_device(x.query):
        if m and n:
            query, key, negatives = embeddings(x.query), embeddings(x.key), embeddings(x.negatives)
            key_scale, negative_scale = (new_float32(size) if x.normalize else None for size in (m, n))
            prepared = Prepared(row_scale, key_scale, positive, negative_scale)
            prepare(query, key, x.scale, x.fixed_scale, None, prepared, negatives if x.normalize else None)
            part = 1.0 / m if x.reduction == "mean" else 1.0
            row_weight, row_ids, column_ids = (
                None if v is None else v.contiguous() for v in (x.row_weight, x.row_ids, x.column_ids)
            )
            rows, columns = Rows(row_scale, None, row_ids, None), Columns(negative_scale, None, column_ids)
            inputs = RowInputs(x.query.contiguous(), x.key.contiguous(), row_scale, positive, row_weight)
            out = PairGradients(*(grad if grad.shape[0] else None for grad in grads))
            found = tile_of(query, int(x.workspace_mib * 2**18)) if x.needs else None
            if found is not None:
                partials = weighted_keys(query, negatives, rows, columns, *found, x.workspace_mib)
                _finish(x, partials, inputs, loss, out, part)
            else:
                _by_statistics(x, inputs, rows, columns, loss, out, part)
        else:
            for t in (loss, *grads):
                t.zero_()
        return loss if x.reduction == "none" else getattr(loss, x.reduction)(), grads


def softmax_loss_shared_bwd(grad: Tensor, x: Inputs, saved: Saved, needs: Needs) -> Grads:
    with on_device(x.query):
        row_grad = grad[:, None] if x.reduction == "none" else grad
        query_grad = scaled_by_torch(saved.query_grad, row_grad, x.query, needs.query)
        key_grad = scaled_by_torch(saved.key_grad, row_grad, x.key, needs.key)
        scale_grad = grad.new_empty(0)
        if needs.scale and x.scale is not None:
            scale_grad = ((saved.scale_grad * grad).sum() / x.scale).reshape(x.scale.shape)
        return Grads(query_grad, key_grad, scale_grad)


def _both_ways(x: Inputs) -> None:
    out, saved = softmax_loss_shared_fwd(x)
    softmax_loss_shared_bwd(torch.empty_like(out), x, saved, Needs(True, True, True))


def aot_cases() -> Iterator[AotCase]:
    """Every tile, cosine or not, some with ids; what has no tile has the kernels of softmax_stats."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    sizes = [(bf16, (256, 65536, dim), False) for dim in (512, 256, 128, 16)]
    sizes += [(bf16, (256, 65536, 512), True), (bf16, (300, 5001, 200), True), (bf16, (64, 4096, 1024), False)]
    sizes += [(fp16, (256, 65536, 512), False), (fp32, (64, 4096, 77), False)]
    for (dtype, (rows, count, dim), has_ids), normalize in itertools.product(sizes, (True, False)):
        query, key = (torch.empty(rows, dim, dtype=dtype, device="meta") for _ in range(2))
        scale, row_weight = torch.empty(1, device="meta"), torch.empty(rows, device="meta") if normalize else None
        row_ids, column_ids = (
            torch.empty(size, dtype=torch.int64, device="meta") if has_ids else None for size in (rows, count)
        )
        x = Inputs(
            query, key, query.new_empty(count, dim), scale, row_weight, row_ids, column_ids, 1.0, True, normalize,
            "sum" if normalize else "none", QUERY + KEY + SCALE, 256.0,
        )  # fmt: skip
        matrix = ("_weighted_keys_kernel", "_softmax_stats_fwd_kernel") if dtype != fp32 else ()
        label = " ".join(
            map(
                str,
                (str(dtype).removeprefix("torch."), (rows, count, dim), *["cosine"] * normalize, *["ids"] * has_ids),
            )
        )
        yield AotCase(label, _both_ways, (x,), (), matrix, SPILLED if dtype == fp16 else 0)
