"""What a contrastive loss across many GPUs would cost, by arithmetic: `python -m benchmarks.timeline [--ranks 8 64]`.

Not a measurement. Each way to exchange the columns is laid out as events on two resources of a rank, its GPU and its
link: an event begins when its resource is free and what it needs has ended. Assumptions: CLUSTER. `--write` puts the
table into docs/large-batch.md.

    gather    all columns at once, then the products; their gradients are summed at once
    chunked   the same in pieces, the next piece on its way while this one is computed
    ring      W blocks of columns go around, each while the one before is computed
"""

from __future__ import annotations

import argparse
import itertools
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ELEMENT, GRADIENT = 2, 4  # bytes of an embedding's element as it travels, and of its gradient
FORWARD, BACKWARD = 1, 3  # products of b x B x D: the logits; the logits again, and both gradients
TILE, MULTIPROCESSORS = 128, 132
MEMORY = 1 << 30  # that a chunked exchange may take
VIT_B_FLOP, VIT_B_RATE = 0.123e12, 400e12  # of an image's training step, and FLOP/s
MARKS = "<!-- timeline: written by python -m benchmarks.timeline --write -->", "<!-- end of timeline -->"
DOCUMENT = pathlib.Path(__file__).parents[1] / "docs" / "large-batch.md"
RANKS, ROWS, WIDTHS = (8, 64, 1024), (1024, 8192), (768,)


@dataclass(frozen=True)
class Cluster:
    """H100s or H200s in nodes of eight."""

    node: int = 8
    inside: float = 450e9  # bytes per second of a GPU's link inside a node
    outside: float = 50e9  # and between nodes
    share: float = 0.8  # of these that is reached
    inside_latency: float = 12e-6
    outside_latency: float = 25e-6
    launch: float = 8e-6
    host: float = 40e-6  # of Python for a hop or a chunk
    rate: float = 620e12  # FLOP/s of a large bfloat16 block

    def products(self, rows: int, columns: int, width: int, units: int) -> float:
        """Seconds of `units` products, tiles in whole waves."""
        tiles = math.ceil(rows / TILE) * math.ceil(columns / TILE)
        waves = math.ceil(tiles / MULTIPROCESSORS)
        rate = self.rate * tiles / (waves * MULTIPROCESSORS)
        return max(self.launch * units, units * 2 * rows * columns * width / rate) + self.launch

    def hop(self, ranks: int, count: float) -> float:
        """Seconds for so many bytes to the next rank."""
        alone = ranks <= self.node
        rate, latency = (self.inside, self.inside_latency) if alone else (self.outside, self.outside_latency)
        return max(latency + count / (rate * self.share), self.host)

    def collective(self, ranks: int, count: float) -> float:
        """Seconds of an all-gather or a reduce-scatter of so many bytes in all."""
        nodes = max(1, ranks // self.node)
        latency = 20e-6 + ((nodes - 1) * 3e-6 if nodes < 16 else 12e-6 * (nodes - 1).bit_length())
        rate = self.inside if nodes == 1 else min(self.inside, self.node * self.outside)
        return latency + (ranks - 1) / ranks * count / (rate * self.share)


CLUSTER = Cluster()


class Timeline:
    """Events of a rank, in the order in which they are queued."""

    def __init__(self) -> None:
        self.free = {"gpu": 0.0, "link": 0.0}

    def add(self, resource: str, seconds: float, *after: float) -> float:
        """When the event ends that begins when its resource is free and all of `after` has passed."""
        self.free[resource] = max(self.free[resource], *after, 0.0) + seconds
        return self.free[resource]


def gather(ranks: int, rows: int, width: int, cluster: Cluster = CLUSTER) -> float:
    """Seconds of a forward and backward."""
    return chunked(ranks, rows, width, 1, cluster)


def chunked(ranks: int, rows: int, width: int, chunks: int, cluster: Cluster = CLUSTER) -> float:
    columns, line = ranks * rows // chunks, Timeline()
    elements = columns * width
    compute = lambda units: cluster.products(rows, columns, width, units) + (cluster.host if chunks > 1 else 0.0)  # noqa: E731
    done = 0.0
    for _ in range(chunks):
        here = line.add("link", cluster.collective(ranks, elements * ELEMENT))
        done = line.add("gpu", compute(FORWARD), here)
    done = line.add("link", cluster.collective(ranks, 4 * ranks * rows), done)  # log-sum-exps, before the gradients
    kept = chunks == 1  # what was gathered in one piece is still there
    computed = line.free["gpu"]
    here = done if kept else line.add("link", cluster.collective(ranks, elements * ELEMENT), done)
    for chunk in range(chunks):
        computed = line.add("gpu", compute(BACKWARD), here, done)
        if chunk + 1 < chunks:
            here = line.add("link", cluster.collective(ranks, elements * ELEMENT))
        line.add("link", cluster.collective(ranks, elements * GRADIENT), computed)
    return max(line.free.values())


def ring(ranks: int, rows: int, width: int, cluster: Cluster = CLUSTER) -> float:
    """Forward and backward; in the backward each block takes its gradient along, and home at the end."""
    elements, line = rows * width, Timeline()
    for units, size in ((FORWARD, ELEMENT), (BACKWARD, ELEMENT + GRADIENT)):
        lap(line, ranks, cluster.products(rows, rows, width, units), cluster.hop(ranks, elements * size))
        line.add("link", cluster.hop(ranks, 4 * rows if units == FORWARD else elements * GRADIENT), *line.free.values())
        line.free = dict.fromkeys(line.free, max(line.free.values()))
    return max(line.free.values())


def lap(line: Timeline, ranks: int, compute: float, hop: float) -> float:
    """One way around: a block is computed while the next one comes. `compute` + (W - 1) max(`compute`, `hop`)."""
    here = start = max(line.free.values())
    for block in range(ranks):
        line.add("gpu", compute, here)
        if block + 1 < ranks:
            here = line.add("link", hop, start)
    return line.free["gpu"] - start


def best_chunks(ranks: int, rows: int, width: int) -> int:
    """Of those that keep within MEMORY the number of chunks that takes least."""
    fit = [
        c
        for c in (2**k for k in range(1, 11))
        if rows * ranks % c == 0 and _chunk_bytes(ranks, rows, width, c) <= MEMORY
    ]
    return min(fit or [1024], key=lambda c: chunked(ranks, rows, width, c))


def _chunk_bytes(ranks: int, rows: int, width: int, chunks: int) -> float:
    """Two chunks, of each its columns and their gradient."""
    return 2 * ranks * rows / chunks * width * (ELEMENT + GRADIENT)


def table(ranks: Sequence[int] = RANKS, rows: Sequence[int] = ROWS, widths: Sequence[int] = WIDTHS) -> list[str]:
    """In Markdown."""
    heads = (
        "GPUs", "rows each", "width", "batch", "products alone, ms", "gather, ms", "chunked, ms (chunks)", "ring, ms",
        "arrives at a GPU, GB", "memory, GiB: gather", "chunked", "of a ViT-B step",
    )  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", f"|{'--:|' * len(heads)}"]
    for world, each, width in itertools.product(ranks, rows, widths):
        batch, count = world * each, best_chunks(world, each, width)
        products = (FORWARD + BACKWARD) * 2 * each * batch * width / CLUSTER.rate
        one, pieces = gather(world, each, width), chunked(world, each, width, count)
        arrives = (world - 1) * each * width * (ELEMENT + GRADIENT) / 1e9
        share = one / (one + each * VIT_B_FLOP / VIT_B_RATE)
        memory = batch * width * (ELEMENT + GRADIENT) / 2**30, _chunk_bytes(world, each, width, count) / 2**30
        cells = (
            f"{world:,}", f"{each:,}", str(width), f"{batch:,}", _ms(products), _ms(one), f"{_ms(pieces)} ({count})",
            _ms(ring(world, each, width)), f"{arrives:.2g}", f"{memory[0]:.2g}", f"{memory[1]:.2g}", f"{share:.1%}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g}"


def written(text: str, lines: Sequence[str]) -> str:
    """A document with the lines between its marks."""
    start, end = MARKS
    before, rest = text.split(start)
    return "\n".join([before + start, *lines, end + rest.split(end)[1]])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.timeline", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    numbers: Callable[[str, Sequence[int]], object] = lambda name, default: parser.add_argument(  # noqa: E731
        name, nargs="+", type=int, default=default
    )
    numbers("--ranks", RANKS), numbers("--rows", ROWS), numbers("--width", WIDTHS)
    parser.add_argument("--write", action="store_true", help="the default table, into docs/large-batch.md")
    args = parser.parse_args(argv)
    least = min(*args.ranks, *args.rows, *args.width)
    if least < 1:
        parser.error(f"expected whole numbers of at least 1, got {least}")
    if args.write:
        DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf8"), table()), encoding="utf8")
        return 0
    print("\n".join(table(args.ranks, args.rows, args.width)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
