"""Distances of generated images from the rows of a bank, in PyTorch operators, a chunk of the bank at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..core import full_precision
from ..core.traced import number

METRICS = ("l1", "l2", "cosine")
_CACHED = 2**21  # bytes of temporaries at a time, where they are to stay in a CPU's cache
_TEMPORARIES = 4  # tensors of a chunk's size that live at once: difference, distance and their gradients


class Bank(NamedTuple):
    """Rows to keep away from: scale * rows + shift. They may lie on another device than what they are compared with."""

    rows: Tensor  # [M, P] or [M, ...], floating point or uint8
    scale: float
    shift: float

    def part(self, start: int, count: int) -> Bank:
        """Of [count, P]; elements that do not lie in a row's order are copied, of this part alone."""
        return self._replace(rows=self.rows[start : start + count].flatten(1))

    def at(self, index: Tensor) -> Bank:
        """The rows [N, P] of these numbers."""
        return self._replace(rows=self.rows[index.to(self.rows.device)].flatten(1))

    def pieces(self, like: Tensor, size: int) -> Iterator[Bank]:
        """Parts on the device of `like`, each of at most `size` bytes, or one row."""
        for start, count in self.spans(size):
            part = self.part(start, count)
            yield part._replace(rows=moved(part.rows, like.device))

    def spans(self, size: int) -> list[tuple[int, int]]:
        """(first row, number of rows) of the parts of at most `size` bytes, or one row."""
        rows = self.rows.shape[0]
        count = min(max(size // (self.rows[0].numel() * self.rows.element_size()), 1), rows)
        return [(start, min(count, rows - start)) for start in range(0, rows, count)]

    def values(self, like: Tensor) -> Tensor:
        """In the dtype and on the device of `like`."""
        rows = moved(self.rows, like.device).to(like.dtype)
        if self.rows.dtype != torch.uint8 and self.scale == 1 and self.shift == 0:
            return rows
        return rows * number(self.scale, rows) + number(self.shift, rows)


def moved(rows: Tensor, device: torch.device) -> Tensor:
    """On a device, in its own dtype, which is the smallest. A copy to the CPU is waited for, as it will be read."""
    return rows if rows.device == device else rows.to(device, non_blocking=device.type != "cpu")


def chunk_distances(generated: Tensor, bank: Bank, metric: str) -> Tensor:
    """[N,P] against [m,P]: the [N,m] distances."""
    rows = bank.values(generated)
    if metric == "cosine":
        with full_precision(generated):
            return 1 - _unit(generated) @ _unit(rows).T
    d = generated[:, None] - rows
    return (d.abs() if metric == "l1" else d * d).mean(-1)


def paired_distances(generated: Tensor, bank: Bank, metric: str) -> Tensor:
    """[N,P] against its own rows [N,P]: the [N] distances, by direct differences."""
    rows = bank.values(generated)
    if metric == "cosine":
        return 1 - (_unit(generated) * _unit(rows)).sum(-1)
    d = generated - rows
    return (d.abs() if metric == "l1" else d * d).mean(-1)


def _unit(x: Tensor) -> Tensor:
    """Rows of length 1; a zero row stays zero and gets a zero gradient."""
    if not x.requires_grad and not torch._C._are_functorch_transforms_active():
        norm = x.norm(dim=-1, keepdim=True)
        return x * torch.where(norm == 0, norm, 1 / norm)
    zero = x.detach().norm(dim=-1, keepdim=True) == 0
    safe = torch.where(zero, torch.ones_like(x), x)
    return torch.where(zero, torch.zeros_like(x), safe / safe.norm(dim=-1, keepdim=True))


def mean_distance(generated: Tensor, bank: Bank, metric: str, workspace: int) -> Tensor:
    """[N]: the mean of the distances to the bank's rows. l2 and cosine need no distances, only means over the bank."""
    count = bank.rows.shape[0]
    if metric == "l1":
        parts = chunks(generated, bank, metric, workspace)
        return _total(of_chunks(_sum_of_distances, generated, parts, metric)) / count
    most = min(workspace, _CACHED) if generated.device.type == "cpu" else workspace
    parts = chunks(generated[:1], bank, metric, most)
    if metric == "cosine":  # 1 - mean <u, v> = 1 - <u, mean v>
        mean = _total(_unit(chunk.values(generated)).sum(0) for chunk in parts) / count
        return 1 - (_unit(generated) * mean).sum(-1)
    mean = _total(chunk.values(generated).sum(0) for chunk in parts) / count
    spread = _total(((chunk.values(generated) - mean) ** 2).sum(0) for chunk in parts) / count
    return ((generated - mean) ** 2).mean(-1) + spread.mean()


def softmin_distance(generated: Tensor, bank: Bank, metric: str, temperature: float, workspace: int) -> Tensor:
    """[N]: -t log(mean exp(-d / t)), from the least distance to each chunk and a sum of powers relative to it."""
    found = of_chunks(_powers, generated, chunks(generated, bank, metric, workspace), metric, temperature)
    least, powers = (torch.stack(parts) for parts in zip(*found, strict=True))
    total = least.amin(0)
    weights = torch.where(powers == 0, torch.zeros_like(powers), torch.exp((total - least) / temperature))
    return total - temperature * ((weights * powers).sum(0) / bank.rows.shape[0]).log()


def _total(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def _sum_of_distances(generated: Tensor, bank: Bank, metric: str) -> Tensor:
    return chunk_distances(generated, bank, metric).sum(1)


def _powers(generated: Tensor, bank: Bank, metric: str, temperature: float) -> tuple[Tensor, Tensor]:
    """(least distance, sum of exp((least - d) / t)) of a chunk: exponents of small differences, which round little."""
    distances = chunk_distances(generated, bank, metric)
    least = distances.detach().amin(1)
    origin = torch.where(least.isinf(), torch.zeros_like(least), least)
    return least, torch.exp((origin[:, None] - distances) / temperature).sum(1)


def of_chunks(function: Callable[..., Any], generated: Tensor, parts: Sequence[Any], *more: Any) -> list[Any]:
    """`function` of the images and each part of the bank; the backward recomputes the parts one by one."""
    plain = len(parts) == 1 or not (torch.is_grad_enabled() and generated.requires_grad)
    if plain or torch._C._are_functorch_transforms_active():  # functorch takes no checkpoints
        return [function(generated, part, *more) for part in parts]
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    return [checkpoint(function, generated, part, *more, **options) for part in parts]


def search_dtype(generated: Tensor, metric: str) -> torch.dtype:
    """float64 for products: torch.set_float32_matmul_precision may have float32 ones rounded, and another row win."""
    exact = metric == "cosine" and generated.device.type in ("cpu", "cuda")
    return torch.float64 if exact else generated.dtype


def nearest_row(generated: Tensor, bank: Bank, metric: str, workspace: int) -> Tensor:
    """[N]: the first of the nearest rows of each image, a NaN counting as nearest. No [N,M] distances are kept."""
    first, best, index = 0, None, None
    with torch.no_grad():
        generated = generated.detach().to(search_dtype(generated, metric))
        for chunk in chunks(generated, bank, metric, workspace):
            least, at = chunk_distances(generated, chunk, metric).min(1)
            if best is None or index is None:
                best, index = least, at
            else:
                nearer = (least < best) | (least.isnan() & ~best.isnan())
                best, index = torch.where(nearer, least, best), torch.where(nearer, at + first, index)
            first += chunk.rows.shape[0]
    assert index is not None
    return index


def chunks(generated: Tensor, bank: Bank, metric: str, workspace: int) -> list[Bank]:
    """Parts of the bank whose temporaries fit the workspace, in bytes; of one row at least."""
    count, pixels = generated.shape
    row_elements = pixels + count if metric == "cosine" else pixels * count
    row_bytes = _TEMPORARIES * row_elements * generated.element_size()
    size = min(max(workspace // max(row_bytes, 1), 1), bank.rows.shape[0])
    return [bank.part(start, size) for start in range(0, bank.rows.shape[0], size)]
