"""Random numbers for the rows of a global batch that follow from seed, step and place alone.

A generator's numbers for a row depend on all that is drawn with it, so on how many ranks share the batch. These are a
hash of seed, step, stream, place in the global batch and place in the row, in torch's operations: the same on any
number of ranks and after any resume, without drawing those of other ranks. Source of the mixing: Steele, Lea, Flood,
"Fast splittable pseudorandom number generators", OOPSLA 2014 (SplitMix64); of counters in place of a state: Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64


class RowNoise(NamedTuple):
    """Noise for some rows of a global batch."""

    key: Tensor  # int64 scalar, of seed and step
    rows: Tensor  # (b,) int64: places in the global batch

    @staticmethod
    def of(seed: int, step: int, rows: Tensor) -> RowNoise:
        digest = hashlib.blake2b(f"{seed} {step}".encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "big", signed=True)
        return RowNoise(torch.tensor(key, dtype=torch.int64, device=rows.device), rows)

    def uniform(self, stream: int, *shape: int) -> Tensor:
        """(b, *shape) float32 in (0, 1), odd multiples of 2^-24; another `stream`, other numbers."""
        size = math.prod(shape)
        row = _mixed(self.key + self.rows * _signed(_GOLDEN) + _signed(stream * _SECOND))
        place = torch.arange(1, size + 1, device=self.rows.device) * _signed(_GOLDEN)
        bits = _mixed(row[:, None] + place)
        return ((bits >> 41) & 0x7FFFFF).float().add(0.5).mul(2.0**-23).view(-1, *shape)

    def normal(self, stream: int, *shape: int) -> Tensor:
        """(b, *shape) of N(0, 1), by Box and Muller's transform."""
        one, two = self.uniform(stream, 2, *shape).unbind(1)
        return (-2 * one.log()).sqrt() * (2 * math.pi * two).cos()


class RowDropout(nn.Dropout):
    """`nn.Dropout` whose mask is of `noise`, where there is one. Each of a model has a `stream` of its own."""

    def __init__(self, p: float = 0.5, stream: int = 0) -> None:
        super().__init__(p)
        self.stream = stream

    def forward(self, x: Tensor, noise: RowNoise | None = None) -> Tensor:
        """`x` (b, ...), its rows those of the noise."""
        if noise is None or not self.training or self.p == 0:
            return super().forward(x)
        kept = noise.uniform(self.stream, *x.shape[1:]) >= self.p
        return x * (kept.to(x.dtype) / (1 - self.p))


def _signed(number: int) -> int:
    """The int64 that has the bits of the number's lowest 64."""
    number %= 2**64
    return number - 2**64 if number >= 2**63 else number


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finalizer; int64 wraps around as its uint64 does."""
    x = (x ^ _shifted(x, 30)) * _signed(_FIRST)
    x = (x ^ _shifted(x, 27)) * _signed(_SECOND)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """A shift to the right that fills with zeros."""
    return (x >> by) & (2 ** (64 - by) - 1)
