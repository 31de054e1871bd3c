"""Launchers of the plain softmax losses (see ops/softmax_loss.py). The kernels over tiles of logits are those of the
statistics (online_softmax.py, logit_gradients.py); three small ones make what is one number or one vector per row:

    norms.py                the scales r_i = scale fixed_scale c(query_i) and c(key_j), the positives' logits p_i
    row_losses.py           the losses from p and the log-sum-exps n, and what the kernel of G takes: d out / d n and
                            d out / d p_i = -sum of d out / d n_i over the directions, as the loss depends on n - p
    embedding_gradients.py  the embeddings' gradients, v - <v, x> x / |x|^2 in their dtype, from the sums v

A forward that makes the gradients ("grads") does all of this a chunk of rows at a time. A chunk has as many rows as the
workspace holds exponentials of; G then takes their place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...core.kernels.launch import AotCase, on_device
from ...core.kernels.matmul import add_product, embeddings
from ..ops.softmax_loss import Grads, Inputs, Needs, Saved
from ..options import Form
from ..save_plan import KEY, QUERY, SCALE, aligned, exponentials, save_of_loss
from .arguments import Area, BackwardInputs, BackwardResults, Columns, Rows
from .blocking import block_plan, chunk_plan
from .embedding_gradients import EmbeddingGradient, gradients_from_sums, scaled_pair
from .logit_matrix import LogitMatrix
from .norms import Prepared, prepare
from .passes import chunk_memory, fp16_scale_of, make_block, make_gradients, make_statistics, new_exps, saved_exps
from .row_losses import LossForm, row_losses
from .tile_configs import SPILLED


class SoftmaxLoss:
    """One call's operands: padded embeddings, their scales, the positives, weights."""

    def __init__(self, x: Inputs, scales: Tensor, positive: Tensor) -> None:
        self.query, self.key, self.dim = embeddings(x.query), embeddings(x.key), x.query.shape[1]
        self.m, self.n = x.query.shape[0], x.key.shape[0]
        self.whole = slice(0, self.m)
        self.targets = None if x.targets is None else x.targets.contiguous()
        self.row_weight = None if x.row_weight is None else x.row_weight.contiguous()
        self.form = Form(diagonal=x.targets is None, symmetric=x.symmetric)
        self.normalize, self.directions = x.normalize, 1 + x.symmetric
        self.loss_form = LossForm(x.include_positive, self.directions, x.reduction == "none")
        self.part = 1.0 / self.m if x.reduction == "mean" and self.m else 1.0  # of each row in the loss
        self.row_scale, self.positive = scales[: self.m], positive
        self.column_scale = scales[aligned(self.m) :] if x.normalize else None

    def prepare(self, scale: Tensor | None, fixed_scale: float) -> None:
        out = Prepared(self.row_scale, self.column_scale, self.positive)
        prepare(self.query, self.key, scale, fixed_scale, self.targets, out)

    def call(
        self, part: slice, form: Form, targets: Tensor | None, backward: bool, saves_exps: bool,
        workspace_mib: float = 0.0,
    ) -> LogitMatrix:  # fmt: skip
        rows = Rows(self.row_scale[part], None if targets is None else targets[part], None, None)
        columns = Columns(self.column_scale, None, None)
        return LogitMatrix(self.query[part], self.key, rows, columns, form, 0.0, backward, saves_exps, workspace_mib)

    def losses(
        self, part: slice, stats: Tensor, grad: Tensor | None, loss: Tensor | None, stats_grad: Tensor | None = None,
        positive_grad: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Losses of these rows and, where they are given, the gradients that the kernel of G takes."""
        row_losses(
            stats, self.positive[part], None if self.row_weight is None else self.row_weight[part], self.loss_form,
            self.part, None if loss is None else loss[part], stats_grad, grad, positive_grad,
        )  # fmt: skip


def _make_grads(problem: SoftmaxLoss, loss: Tensor, grads: Grads, workspace_mib: float) -> None:
    """Losses and gradients of one direction, chunk by chunk: fills `loss` and `grads`, those that are not empty."""
    query, m, n, dim = problem.query, problem.m, problem.n, problem.dim
    chunk = chunk_plan(m, n, query.element_size(), workspace_mib)
    memory, fp16_scale = query.new_empty(chunk.elements), None
    form, targets = problem.form, problem.targets
    if targets is None and chunk.rows < m:  # a chunk knows no diagonal
        form, targets = Form(), torch.arange(m, device=query.device)
    if query.dtype == torch.float16:
        bound = loss.new_full((1, 2, m), problem.part)
        if problem.row_weight is not None:
            bound = bound * problem.row_weight
        fp16_scale = fp16_scale_of(bound, problem.call(problem.whole, form, targets, False, True))
    rescaled = problem.normalize or fp16_scale is not None
    for start in range(0, m, chunk.rows):
        part = slice(start, min(start + chunk.rows, m))
        count = part.stop - start
        call = problem.call(part, form, targets, False, True)
        saved, grad_block, products = chunk_memory(call, memory, count, chunk.pitch)
        stats, stats_grad = (loss.new_empty((1, 2, count)) for _ in range(2))
        positive_grad = loss.new_empty(count)
        make_statistics(call, stats, saved, products)
        problem.losses(part, stats, None, loss, stats_grad, positive_grad)
        inputs = BackwardInputs(stats, stats_grad, fp16_scale, *saved, positive_grad)
        results, area = BackwardResults(grad_block, None), Area(0, count, 0, n)
        block = make_block(call, results, inputs, area, chunk.pitch, products is not None)
        if grads.query.shape[0] or grads.scale.shape[0]:
            sums = grads.query[part] if grads.query.shape[0] else loss.new_empty((count, dim))
            add_product(sums, block, problem.key[:, :dim], True)
            dot = grads.scale[part] if grads.scale.shape[0] else None
            if rescaled or dot is not None:
                gradients_from_sums(sums, call.query, sums, None, dot, fp16_scale, problem.normalize)
        if grads.key.shape[0]:
            add_product(grads.key, block.T, call.query[:, :dim], start == 0)
    if grads.key.shape[0] and rescaled:
        gradients_from_sums(grads.key, problem.key, grads.key, None, None, fp16_scale, problem.normalize)


def softmax_loss_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    (m, dim), n = x.query.shape, x.key.shape[0]
    with on_device(x.query):
        new_float32 = x.query.new_empty(0, dtype=torch.float32).new_empty
        makes_grads, saves = x.save == "grads", x.save == "exps"
        loss, stats = new_float32(m), new_float32((2 * (1 + x.symmetric) + 1, m))
        start = aligned(m) if x.normalize else m
        scales = new_float32(start + n * x.normalize)
        if saves and start > m:  # never written, but saved, and torch's opcheck compares whole results
            scales[m:start].zero_()
        positive = stats[-1] if saves else new_float32(m)  # stats[-1] of one direction may be unaligned
        grads = Grads(
            query=new_float32((m if makes_grads and x.needs & QUERY else 0, dim)),
            key=new_float32((n if makes_grads and x.needs & KEY else 0, dim)),
            scale=new_float32(m if makes_grads and x.needs & SCALE else 0),
        )
        if saves:
            elements, pitch = exponentials(x.saved_rows, n, x.query.element_size())
            logits = new_exps(x.query, elements)
        else:
            pitch, logits = 0, new_float32((x.saved_rows, n))
        if m and n:
            problem = SoftmaxLoss(x, scales, positive)
            problem.prepare(x.scale, x.fixed_scale)
            if makes_grads:
                _make_grads(problem, loss, grads, x.workspace_mib)
            else:
                saves_exps = saves and x.saved_rows > 0
                call = problem.call(problem.whole, problem.form, problem.targets, False, saves_exps, x.workspace_mib)
                make_statistics(call, stats[:-1].view(1 + x.symmetric, 2, m), saved_exps(logits, m, pitch))
                problem.losses(problem.whole, stats, None, loss)
        else:
            for t in (loss, *grads):
                t.zero_()
        out = loss if x.reduction == "none" else getattr(loss, x.reduction)()
        if not saves:
            stats, scales = new_float32((0, m)), new_float32(0)
        return out, Saved(stats, scales, logits, *grads)


def softmax_loss_bwd(grad: Tensor, x: Inputs, saved: Saved, needs: Needs) -> Grads:
    m, n = x.query.shape[0], x.key.shape[0]
    none = grad.new_empty(0)
    with on_device(x.query):
        if m == 0 or n == 0:
            return Grads(
                query=x.query.new_zeros(x.query.shape if needs.query else 0),
                key=x.key.new_zeros(x.key.shape if needs.key else 0),
                scale=torch.zeros_like(x.scale) if needs.scale and x.scale is not None else none,
            )
        if x.save == "grads":
            saved_grads, embedded = (saved.query_grad, saved.key_grad), (x.query, x.key)
            query_grad, key_grad = scaled_pair(saved_grads, grad, embedded, (needs.query, needs.key))
            dot = saved.scale_grad * grad if needs.scale else none
        else:
            problem = SoftmaxLoss(x, saved.inverse_norms, saved.stats[-1])
            query_grad, key_grad, dot = _grads_from_stats(problem, grad.contiguous(), saved, x.workspace_mib, needs)
        if not needs.scale or x.scale is None:
            return Grads(query_grad, key_grad, none)
        return Grads(query_grad, key_grad, (dot.sum() / x.scale).reshape(x.scale.shape))


def _grads_from_stats(problem: SoftmaxLoss, grad: Tensor, saved: Saved, workspace_mib: float, needs: Needs) -> Grads:
    """The gradients of query and key from the statistics, and those of the scale times it, by rows."""
    stats, logits = saved.stats[:-1], saved.logits
    m, n, query = problem.m, problem.n, problem.query
    call = problem.call(problem.whole, problem.form, problem.targets, True, logits.numel() > 0)
    stats_grad, positive_grad = torch.empty_like(stats), stats.new_empty(m)
    problem.losses(problem.whole, stats, grad, None, stats_grad, positive_grad)
    elements = int(workspace_mib * 2**20) // query.element_size() - logits.numel()
    block_size = block_plan(m, n, elements, call.tile)
    block_rows, block_columns = block_size
    by_direction = stats_grad.view(problem.directions, 2, m)
    fp16_scale = fp16_scale_of(by_direction, call) if query.dtype == torch.float16 else None
    q = EmbeddingGradient(
        query, problem.dim, None, (needs.query, needs.scale), min(block_rows, m), block_columns >= n, fp16_scale,
        problem.normalize,
    )  # fmt: skip
    k = EmbeddingGradient(
        problem.key, problem.dim, None, (needs.key, False), n, block_rows >= m, fp16_scale, problem.normalize
    )
    exps = saved_exps(logits, m, exponentials(m, n, query.element_size()).pitch)
    inputs = BackwardInputs(stats, by_direction, fp16_scale, *exps, positive_grad)
    make_gradients(call, inputs, block_size, q, k, stats.new_empty(0))
    return Grads(q.grad, k.grad, q.dot)


def _both_ways(x: Inputs) -> None:
    out, saved = softmax_loss_fwd(x)
    softmax_loss_bwd(torch.empty_like(out), x, saved, Needs(True, True, True))


def aot_cases() -> Iterator[AotCase]:
    """Every dtype, both directions and one, cosine or not, with targets and weights or not; small, odd, long."""
    calls: list[tuple[torch.dtype, tuple[int, int, int], bool, bool, str]] = [
        (torch.bfloat16, (8192, 8192, 768), True, True, "mean"),
        (torch.bfloat16, (512, 512, 768), True, False, "mean"),
        (torch.float16, (4099, 4099, 77), True, True, "none"),
        (torch.float32, (1024, 1024, 512), True, True, "sum"),
        (torch.bfloat16, (4096, 65536, 512), False, True, "mean"),
        (torch.bfloat16, (300, 300, 512), False, False, "sum"),
        (torch.float16, (4096, 4096, 512), False, True, "mean"),
        (torch.float32, (4099, 5000, 77), False, True, "none"),
    ]
    for dtype, (rows, columns, dim), symmetric, normalize, reduction in calls:
        query, key = (torch.empty(size, dim, dtype=dtype, device="meta") for size in (rows, columns))
        scale, row_weight = (torch.empty(size, device="meta") for size in (1, rows))
        targets = row_weight.long() if rows < columns else None
        matrix = ("_softmax_stats_fwd_kernel",) if dtype != torch.float32 else ()
        for needs in (0, QUERY + KEY + SCALE):
            save, saved_rows = save_of_loss("triton", query, key, symmetric, reduction, needs, 256.0)
            x = Inputs(
                query, key, scale, row_weight if reduction == "sum" else None, targets, 1.0, True, symmetric, normalize,
                reduction, needs, save, saved_rows, 256.0,
            )  # fmt: skip
            words = (str(dtype).removeprefix("torch."), (rows, columns, dim), reduction)
            label = " ".join(map(str, (*words, *["symmetric"] * symmetric, *["cosine"] * normalize, f"needs {needs}")))
            spills = SPILLED if symmetric and dtype == torch.bfloat16 else 0
            yield AotCase(f"forward {label}", softmax_loss_fwd, (x,), (), matrix, spills)
            if needs:
                yield AotCase(f"backward {label}", _both_ways, (x,), spills=spills)
