"""Launchers of the plain softmax losses (see ops/softmax_loss.py). The kernels over tiles of logits are those of the
statistics (online_softmax.py, logit_gradients.py); three small ones make what is one number or one vector per row:

    norms.py                the scales r_i = scale factor c(query_i) and c(key_j), the positives' logits p_i
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
from ..save_plan import KEY, QUERY, SCALE, exponentials, kept_exponentials, triton_saves
from .blocking import block_plan, chunk_plan
from .embedding_gradients import EmbeddingGradient, finish, scaled
from .logit_matrix import LogitMatrix
from .norms import prepare
from .passes import chunk_memory, half_range, kept, make_block, make_gradients, make_statistics, new_stash
from .row_losses import plain_losses
from .tile_configs import SPILLED


class SoftmaxLoss:
    """One call's operands: padded embeddings, their scales, the positives, weights."""

    def __init__(self, x: Inputs, lengths: Tensor, positive: Tensor) -> None:
        self.query, self.key, self.width = embeddings(x.query), embeddings(x.key), x.query.shape[1]
        self.m, self.n = x.query.shape[0], x.key.shape[0]
        self.targets = None if x.targets is None else x.targets.contiguous()
        self.share = None if x.share is None else x.share.contiguous()
        self.normalize, self.include_positive, self.directions = x.normalize, x.include_positive, 1 + x.symmetric
        self.kind = "+".join(["diagonal"] * (x.targets is None) + ["symmetric"] * x.symmetric)
        self.reduction, self.factor = x.reduction, 1.0 / self.m if x.reduction == "mean" and self.m else 1.0
        self.row_scale, self.positive = lengths[: self.m], positive
        self.column_scale = lengths[self.m :] if x.normalize else None

    def prepare(self, scale: Tensor | None, factor: float) -> None:
        prepare(self.query, self.key, scale, factor, self.targets, (self.row_scale, self.column_scale, self.positive))

    def call(
        self, part: slice, kind: str, excluded: Tensor | None, backward: bool, keeps: bool, workspace_mib: float = 0.0
    ) -> LogitMatrix:
        rows = (self.row_scale[part], None if excluded is None else excluded[part], None, None)
        columns = (self.column_scale, None, None)
        return LogitMatrix(self.query[part], self.key, rows, columns, kind, 0.0, backward, keeps, workspace_mib)

    def losses(
        self, part: slice, stats: Tensor, grad: Tensor | None, loss: Tensor | None, pulls: Tensor | None
    ) -> None:
        """Losses of these rows and, where `pulls` is given, what the kernel of G takes."""
        plain_losses(
            stats, self.positive[part], None if self.share is None else self.share[part], self.reduction,
            self.include_positive, None if loss is None else loss[part], pulls, grad, self.directions, self.factor,
        )  # fmt: skip


def _make_grads(plain: SoftmaxLoss, loss: Tensor, made: tuple[Tensor, Tensor, Tensor], workspace_mib: float) -> None:
    """Losses and gradients of one direction, chunk by chunk: `made` are those of query, key and the scale, or empty."""
    of_query, of_key, of_scale = made
    like, width, whole = plain.query, plain.width, slice(0, plain.m)
    height, size, pitch = chunk_plan(plain.m, plain.n, like.element_size(), workspace_mib)
    stash, factor = like.new_empty(size), None
    kind, excluded = plain.kind, plain.targets
    if excluded is None and height < plain.m:  # a chunk knows no diagonal
        kind, excluded = "", torch.arange(plain.m, device=like.device)
    if like.dtype == torch.float16:
        bound = loss.new_full((1, 2, plain.m), plain.factor)
        factor = half_range(
            bound if plain.share is None else bound * plain.share, plain.call(whole, kind, excluded, False, True)
        )
    for start in range(0, plain.m, height):
        part = slice(start, min(start + height, plain.m))
        count = part.stop - start
        call = plain.call(part, kind, excluded, False, True)
        keep, work, room = chunk_memory(call, stash, count, pitch)
        stats, pulls = loss.new_empty((1, 2, count)), loss.new_empty((3, count))
        make_statistics(call, stats, keep, room)
        plain.losses(part, stats, None, loss, pulls)
        given = (stats, pulls, factor, *keep, pulls[2])
        block = make_block(call, work, None, given, (0, 0, count, plain.n), pitch, room is not None)
        if of_query.shape[0] or of_scale.shape[0]:
            v = of_query[part] if of_query.shape[0] else loss.new_empty((count, width))
            add_product(v, block, plain.key[:, :width], True)
            dot = of_scale[part] if of_scale.shape[0] else None
            if plain.normalize or factor is not None or dot is not None:
                finish(v, call.query, v, None, dot, factor, plain.normalize)
        if of_key.shape[0]:
            add_product(of_key, block.T, call.query[:, :width], start == 0)
    if of_key.shape[0] and (plain.normalize or factor is not None):
        finish(of_key, plain.key, of_key, None, None, factor, plain.normalize)


def softmax_loss_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    (m, width), n = x.query.shape, x.key.shape[0]
    with on_device(x.query):
        single = x.query.new_empty(0, dtype=torch.float32)
        saved = triton_saves(x.symmetric, x.reduction, x.needs)
        grads, again = saved == "grads", saved == "again"
        loss, stats = single.new_empty(m), single.new_empty((2 * (1 + x.symmetric) + 1, m))
        lengths = single.new_empty(m + n * x.normalize)
        made = (
            single.new_empty((m if grads and x.needs & QUERY else 0, width)),
            single.new_empty((n if grads and x.needs & KEY else 0, width)),
            single.new_empty(m if grads and x.needs & SCALE else 0),
        )
        kind = "symmetric" * x.symmetric + "+stash" * again
        elements, pitch = kept_exponentials(x.query, x.key, None, kind, 0.0, x.workspace_mib)
        stash = new_stash(x.query, elements)
        if m and n:
            plain = SoftmaxLoss(x, lengths, stats[-1])
            plain.prepare(x.scale, x.factor)
            if grads:
                _make_grads(plain, loss, made, x.workspace_mib)
            else:
                call = plain.call(slice(0, m), plain.kind, plain.targets, False, elements > 0, x.workspace_mib)
                make_statistics(call, stats[:-1].view(1 + x.symmetric, 2, m), kept(stash, m, pitch))
                plain.losses(slice(0, m), stats, None, loss, None)
        else:
            for each in (loss, *made):
                each.zero_()
        out = loss if x.reduction == "none" else getattr(loss, x.reduction)()
        if not again:
            stats, lengths = single.new_empty((stats.shape[0], 0)), single
        return out, Saved(stats, lengths, stash, *made)


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
        if triton_saves(x.symmetric, x.reduction, x.needs) == "grads":
            rows = grad[:, None] if x.reduction == "none" else grad
            of_query = scaled(saved.query_grad, rows, x.query, needs.query)
            of_key = scaled(saved.key_grad, grad, x.key, needs.key)
            dot = saved.scale_grad * grad if needs.scale else none
        else:
            plain = SoftmaxLoss(x, saved.lengths, saved.stats[-1])
            of_query, of_key, dot = _again(plain, grad.contiguous(), saved, x.workspace_mib, needs)
        if not needs.scale or x.scale is None:
            return Grads(of_query, of_key, none)
        return Grads(of_query, of_key, (dot.sum() / x.scale).reshape(x.scale.shape))


def _again(
    plain: SoftmaxLoss, grad: Tensor, saved: Saved, workspace_mib: float, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query and key from the statistics, and those of the scale times it, by rows."""
    stats, stash = saved.stats[:-1], saved.stash
    m, n, like, whole = plain.m, plain.n, plain.query, slice(0, plain.m)
    call = plain.call(whole, plain.kind, plain.targets, True, stash.numel() > 0)
    pulls = stats.new_empty((stats.shape[0] + 1, m))
    plain.losses(whole, stats, grad, None, pulls)
    elements = int(workspace_mib * 2**20) // like.element_size() - stash.numel()
    high, wide = block_plan(m, n, elements, call.tile)
    upstream = pulls[:-1].view(plain.directions, 2, m)
    factor = half_range(upstream, call) if like.dtype == torch.float16 else None
    q = EmbeddingGradient(
        like, plain.width, None, (needs.query, needs.scale), min(high, m), wide >= n, factor, plain.normalize
    )
    k = EmbeddingGradient(plain.key, plain.width, None, (needs.key, False), n, high >= m, factor, plain.normalize)
    _, pitch = exponentials(m, n, like.element_size())
    given = (stats, upstream, factor, *kept(stash, m, pitch), pulls[-1])
    make_gradients(call, given, (high, wide), q, k, stats.new_empty(0))
    return q.grad, k.grad, q.dot


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
    for dtype, (rows, columns, width), symmetric, normalize, reduction in calls:
        query, key = (torch.empty(size, width, dtype=dtype, device="meta") for size in (rows, columns))
        scale, share = (torch.empty(size, device="meta") for size in (1, rows))
        targets = share.long() if rows < columns else None
        matrix = ("_softmax_stats_fwd_kernel",) if dtype != torch.float32 else ()
        for needs in (0, QUERY + KEY + SCALE):
            x = Inputs(
                query, key, scale, share if reduction == "sum" else None, targets, 1.0, True, symmetric, normalize,
                reduction, needs, 256.0,
            )  # fmt: skip
            words = (str(dtype).removeprefix("torch."), (rows, columns, width), reduction)
            label = " ".join(map(str, (*words, *["symmetric"] * symmetric, *["cosine"] * normalize, f"needs {needs}")))
            spills = SPILLED if symmetric and dtype == torch.bfloat16 else 0
            yield AotCase(f"forward {label}", softmax_loss_fwd, (x,), (), matrix, spills)
            if needs:
                yield AotCase(f"backward {label}", _both_ways, (x,), spills=spills)
