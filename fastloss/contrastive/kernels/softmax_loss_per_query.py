"""Triton kernels of the plain loss with negatives [M, K, D] of each query's own (see ops/softmax_loss_per_query.py).

The negatives are read once by the kernels of softmax_stats_per_query, the losses and the slopes g_i = d out / d n_i
come from those of softmax_loss; one more kernel (pair_gradients.py) reads a row's t, query and key and makes what is
one vector per row: their gradients.

Bytes: the negatives once, at s each; their gradient costs 2 s more (s where nothing is normalised), as there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ...core.kernels.launch import AotCase, on_device
from ..ops import softmax_stats_per_query as stats_op
from ..ops.softmax_loss_per_query import Grads, Inputs, Needs, Saved
from ..save_plan import KEY, NEGATIVES, QUERY, SCALE
from .embedding_gradients import scaled_pair
from .norms import Prepared, prepare
from .pair_gradients import PairGradients, pair_gradients
from .row_losses import LossForm, row_losses
from .softmax_stats_per_query import HALF_AND_SINGLE, softmax_stats_per_query_bwd, softmax_stats_per_query_fwd


def _loss_form(x: Inputs) -> tuple[LossForm, float]:
    """What the kernel of the losses is compiled for, and what each row's loss counts in the result."""
    part = 1.0 / x.query.shape[0] if x.reduction == "mean" and x.query.shape[0] else 1.0
    return LossForm(x.include_positive, 1, x.reduction == "none"), part


def softmax_loss_per_query_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    query, key, (rows, dim) = x.query.contiguous(), x.key.contiguous(), x.query.shape
    row_weight = None if x.row_weight is None else x.row_weight.contiguous()
    new_float32 = query.new_empty(0, dtype=torch.float32).new_empty
    loss, positive, row_scale = (new_float32(rows) for _ in range(3))
    grads = (
        new_float32((rows if x.needs & QUERY else 0, dim)),
        new_float32((rows if x.needs & KEY else 0, dim)),
        new_float32(rows if x.needs & SCALE else 0),
    )
    with on_device(query):
        if rows:
            key_norms = new_float32(rows) if x.normalize else None
            prepare(query, key, x.scale, x.fixed_scale, None, Prepared(row_scale, key_norms, positive))
        save = "logits" if x.needs & NEGATIVES else "weighted_keys" if x.needs else ""
        inputs = stats_op.Inputs(query, x.negatives, x.mask, row_scale, None, x.normalize, False, 0.0, save)
        of_negatives = softmax_stats_per_query_fwd(inputs)
        if rows:
            stats_grad = new_float32((2, rows)) if x.needs & (QUERY | KEY | SCALE) else None
            row_losses(of_negatives.stats, positive, row_weight, *_loss_form(x), loss, stats_grad)
            if stats_grad is not None:
                needed = PairGradients(*(grad if grad.shape[0] else None for grad in grads))
                pair_gradients(stats_grad, of_negatives.weighted_keys, query, key, row_scale, needed, x.normalize)
        out = loss if x.reduction == "none" else getattr(loss, x.reduction)()
    stats = new_float32((4, 0))
    if x.needs & NEGATIVES:
        stats = torch.cat((of_negatives.stats, positive[None], row_scale[None]))
    return out, Saved(stats, of_negatives.logits, of_negatives.inverse_norms, *grads)


def softmax_loss_per_query_bwd(grad: Tensor, x: Inputs, saved: Saved, needs: Needs) -> Grads:
    none = grad.new_empty(0)
    with on_device(x.query):
        saved_grads, embedded = (saved.query_grad, saved.key_grad), (x.query, x.key)
        query_grad, key_grad = scaled_pair(saved_grads, grad, embedded, (needs.query, needs.key))
        return Grads(
            query=query_grad,
            key=key_grad,
            negatives=_negatives_grad(grad, x, saved) if needs.negatives else x.negatives.new_empty(0),
            scale=none if not needs.scale or x.scale is None
            else ((saved.scale_grad * grad).sum() / x.scale).reshape(x.scale.shape),
        )  # fmt: skip


def _negatives_grad(grad: Tensor, x: Inputs, saved: Saved) -> Tensor:
    """The negatives' gradient, from their logits and the gradients of their log-sum-exps."""
    stats, rows = saved.stats, x.query.shape[0]
    positive, row_scale = stats[2], stats[3]
    stats_grad = grad.new_zeros((2, rows))
    if rows:
        row_weight = None if x.row_weight is None else x.row_weight.contiguous()
        row_losses(stats, positive, row_weight, *_loss_form(x), None, stats_grad, grad.contiguous())
    stats_grad[1].zero_()
    inputs = stats_op.Inputs(x.query, x.negatives, x.mask, row_scale, None, x.normalize, False, 0.0, "logits")
    of_negatives = stats_op.Saved(stats, grad.new_empty(0), saved.logits, saved.inverse_norms)
    needs = stats_op.Needs(query=False, negatives=True, row_scale=False)
    return softmax_stats_per_query_bwd(stats_grad, inputs, of_negatives, needs).negatives


def _both_ways(x: Inputs) -> None:
    out, saved = softmax_loss_per_query_fwd(x)
    softmax_loss_per_query_bwd(torch.empty_like(out), x, saved, Needs(True, True, True, True))


def aot_cases() -> Iterator[AotCase]:
    """Every dtype, cosine or not, frozen negatives or not; the kernels of the negatives have their own cases."""
    sizes = ((64, 1024, 512), (8, 33, 77), (4, 16, 8192))
    for dtype, (rows, count, dim), normalize in itertools.product(HALF_AND_SINGLE, sizes, (True, False)):
        query, key = (torch.empty(rows, dim, dtype=dtype, device="meta") for _ in range(2))
        negatives, scale = query.new_empty(rows, count, dim), torch.empty(1, device="meta")
        row_weight = torch.empty(rows, device="meta") if normalize else None
        reduction, label = "sum" if normalize else "none", f"{str(dtype).removeprefix('torch.')} {rows, count, dim}"
        frozen = Inputs(
            query, key, negatives, None, scale, row_weight, 1.0, True, normalize, reduction, QUERY + KEY + SCALE
        )
        yield AotCase(
            f"frozen {normalize} {label}", softmax_loss_per_query_fwd, (frozen,),
            ("_pair_gradients_kernel",) if dim % 8 == 0 else (),
        )  # fmt: skip
        x = frozen._replace(needs=QUERY + KEY + SCALE + NEGATIVES)
        yield AotCase(f"both {normalize} {label}", _both_ways, (x,))
