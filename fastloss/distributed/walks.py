"""How embeddings come to a rank piece by piece, and their gradients go back.

Chunks   an all-gather of so many rows of every rank a piece, the next one in flight while this one is computed;
         the gradients of a piece are reduced and scattered while the next one is computed
Ring     whole blocks, each rank's handed on to the rank before it; a block's gradient follows it one hop behind,
         takes up what each rank adds, and goes home in the end

for piece in walk.pieces():         a list of stretches of rows, this rank's own first
    walk.give(gradients)            where there are any: one for each stretch of the piece
walk.gradient()                     of this rank's own rows, by all ranks
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .agreement import named

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name since torch 2.14
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
send_and_receive = dist.batch_isend_irecv
GRADIENT_TAG = 1


class Stretch(NamedTuple):
    """Rows of the rank `hop` ranks ahead, the first of which is its row `start`."""

    hop: int
    start: int
    rows: Tensor  # [n, D]


class Walk(ABC):
    """What both ways have. `counts`: of the ranks around, this one first. Rows travel in the dtype `wire`."""

    def __init__(self, rows: Tensor, counts: Sequence[int], wire: torch.dtype, group: Any) -> None:
        self.rows, self.counts, self.group = rows, list(counts), group
        self.sent, self.size, self.rank = rows.to(wire).contiguous(), group.size(), group.rank()
        double = rows.dtype == torch.float64
        self.home = rows.new_zeros(rows.shape, dtype=torch.float64 if double else torch.float32)
        self.pending: list[Any] = []

    @abstractmethod
    def pieces(self) -> Iterator[list[Stretch]]: ...

    @abstractmethod
    def give(self, grads: Sequence[Tensor]) -> None: ...

    @abstractmethod
    def gradient(self) -> Tensor: ...

    def _done(self, works: Sequence[Any], operation: str) -> None:
        with named(operation, self.group):
            for work in works:
                work.wait()


class Chunks(Walk):
    def __init__(self, rows: Tensor, counts: Sequence[int], wire: torch.dtype, group: Any, each: int) -> None:
        super().__init__(rows, counts, wire, group)
        self.each, self.most = each, max(self.counts)
        self.piece: list[Stretch] = []
        self.reduced: tuple[int, Tensor] | None = None

    def pieces(self) -> Iterator[list[Stretch]]:
        coming = self._start(0)
        self.piece = [Stretch(0, 0, self.rows)]
        yield self.piece
        for start in range(0, self.most if self.size > 1 else 0, self.each):
            everyone, work = coming
            self._done([work], "the gathering of a piece of rows")
            if start + self.each < self.most:
                coming = self._start(start + self.each)
            self.piece = []
            for hop in range(1, self.size):
                block = everyone[(self.rank + hop) % self.size][: max(self.counts[hop] - start, 0)]
                self.piece.append(Stretch(hop, start, block.to(self.rows.dtype)))
            yield self.piece

    def _start(self, start: int) -> tuple[Tensor, Any]:
        rows = min(self.each, self.most - start)
        mine = self.sent[start : start + rows]
        if mine.shape[0] < rows:
            mine = torch.cat((mine, mine.new_zeros(rows - mine.shape[0], mine.shape[1])))
        everyone = mine.new_empty(self.size * rows, mine.shape[1])
        with named("the gathering of a piece of rows", self.group):
            work = all_gather(everyone, mine.contiguous(), group=self.group, async_op=True)
        return everyone.view(self.size, rows, -1), work

    def give(self, grads: Sequence[Tensor]) -> None:
        start = self.piece[0].start
        if self.piece[0].hop == 0:
            self.home += grads[0]
            return
        self._take()
        rows = min(self.each, self.most - start)
        blocks = self.home.new_zeros(self.size, rows, self.home.shape[1])
        for stretch, grad in zip(self.piece, grads, strict=True):
            blocks[(self.rank + stretch.hop) % self.size, : grad.shape[0]] = grad
        mine = self.home.new_empty(rows, self.home.shape[1])
        with named("the reduction of the gradients of a piece", self.group):
            whole = blocks.view(self.size * rows, -1)
            self.pending = [reduce_scatter(mine, whole, group=self.group, async_op=True)]
        self.reduced = start, mine

    def _take(self) -> None:
        if self.reduced is None:
            return
        self._done(self.pending, "the reduction of the gradients of a piece")
        start, mine = self.reduced
        to = self.home[start : start + mine.shape[0]]
        to += mine[: to.shape[0]]
        self.reduced = None

    def gradient(self) -> Tensor:
        self._take()
        return self.home


class Ring(Walk):
    def __init__(self, rows: Tensor, counts: Sequence[int], wire: torch.dtype, group: Any, half: bool) -> None:
        super().__init__(rows, counts, wire, group)
        self.hops = self.size // 2 if half else self.size - 1
        self.hop = 0
        self.incoming: Tensor | None = None

    def pieces(self) -> Iterator[list[Stretch]]:
        held = self.sent
        for hop in range(self.hops + 1):
            self.hop = hop
            works, coming = [], held
            if hop < self.hops:
                coming = held.new_empty(self.counts[hop + 1], held.shape[1])
                works = self._exchange(held, -1, coming, 1, 0, "a hop of rows around the ring")
            yield [Stretch(hop, 0, self.rows if hop == 0 else held.to(self.rows.dtype))]
            self._done(works, "a hop of rows around the ring")
            held = coming

    def give(self, grads: Sequence[Tensor]) -> None:
        (grad,) = grads
        if self.hop == 0:
            self.home += grad
            return
        sent = grad.to(self.home.dtype)
        if self.incoming is not None:
            self._done(self.pending, "a hop of gradients around the ring")
            sent = sent + self.incoming
        last = self.hop == self.hops
        ahead = 0 if last else self.hop + 1  # whose gradient comes
        to, of = (self.hops, -self.hops) if last else (-1, 1)
        self.incoming = sent.new_empty(self.counts[ahead], sent.shape[1])
        self.pending = self._exchange(
            sent.contiguous(), to, self.incoming, of, GRADIENT_TAG, "a hop of gradients around the ring"
        )
        self.in_flight = sent  # until it is waited for

    def gradient(self) -> Tensor:
        if self.incoming is not None:
            self._done(self.pending, "a hop of gradients around the ring")
            self.home += self.incoming
            self.incoming = None
        return self.home

    def _exchange(self, sent: Tensor, to: int, coming: Tensor, of: int, tag: int, operation: str) -> list[Any]:
        """Send to the rank `to` ahead and receive from the one `of` ahead; what has no rows does not travel."""
        ends = ((dist.isend, sent, to), (dist.irecv, coming, of))
        ops = [
            dist.P2POp(op, t, group=self.group, group_peer=(self.rank + hop) % self.size, tag=tag)
            for op, t, hop in ends
            if t.numel()
        ]
        with named(operation, self.group):
            return send_and_receive(ops) if ops else []
