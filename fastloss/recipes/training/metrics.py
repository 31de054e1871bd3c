"""Metrics of a run: a CSV row per step and TensorBoard, without making the device wait for the host at each step."""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor


class Metrics:
    """Collects a tensor of losses per step; `flush` fetches all of them at once and writes their rows. Without a
    folder, on a rank that writes nothing, it only sees that they are finite.

    `validated` are the figures of a validation; they stand as `val_NAME` in the row of their step, and other rows have
    nothing there.

    The throughput of a row is the mean over the rows flushed with it: between two flushes the host runs ahead of the
    device, so a time per step would mean nothing there.
    """

    def __init__(
        self, folder: Path | None, names: list[str], step: int, tensorboard: bool = True, validated: Sequence[str] = ()
    ) -> None:
        self.columns = ["step", "loss", *names, "learning_rate", "samples_per_second"]
        self.validated = list(validated)
        self._none = [""] * len(self.validated)
        self._last: tuple[int, list[Any]] = (0, [])  # where the last row starts, and the row
        self._waiting: list[tuple[int, Tensor, float, int]] = []
        self._file: TextIO | None = None
        self._board: Any = None
        if folder is not None:
            path = folder / "metrics.csv"
            _keep_rows(path, [*self.columns, *(f"val_{name}" for name in self.validated)], step)
            self._file = open(path, "a", newline="")  # noqa: SIM115, closed in close()
            self._board = _board(folder, step) if tensorboard else None
        self._since = time.perf_counter()
        self.latest: dict[str, float] = {}

    def add(self, step: int, losses: Tensor, learning_rate: float, samples: int) -> None:
        self._waiting.append((step, losses, learning_rate, samples))

    def flush(self) -> None:
        """Write the rows that wait. Raises where a loss is no longer finite."""
        if not self._waiting:
            return
        values = torch.stack([losses for _, losses, _, _ in self._waiting]).cpu().tolist()
        speed = sum(samples for *_, samples in self._waiting) / max(time.perf_counter() - self._since, 1e-9)
        if self._file is not None:
            for (step, _, learning_rate, _), row in zip(self._waiting, values, strict=True):
                words = [step, *(f"{v:.7g}" for v in row), f"{learning_rate:.6g}", f"{speed:.1f}"]
                self._last = self._file.tell(), words
                csv.writer(self._file).writerow([*words, *self._none])
            self._file.flush()
        step, _, learning_rate, _ = self._waiting[-1]
        self.latest = dict(zip(self.columns[1:], [*values[-1], learning_rate, speed], strict=True))
        self.board(step, {f"train/{name}": value for name, value in self.latest.items()})
        bad = next((i for i, row in enumerate(values) if not math.isfinite(row[0])), None)
        steps = [step for step, *_ in self._waiting]
        self._waiting.clear()
        self._since = time.perf_counter()
        if bad is not None:
            raise FloatingPointError(f"the loss is {values[bad][0]} at step {steps[bad]}; try a lower --learning-rate")

    def add_validation(self, figures: dict[str, float]) -> None:
        """Write the figures into the last row; call it after a flush."""
        at, row = self._last
        if row and self._file is not None:
            self._file.truncate(at)  # opened to append: what is written next stands there
            values = (figures.get(name) for name in self.validated)
            csv.writer(self._file).writerow([*row, *("" if value is None else f"{value:.7g}" for value in values)])
            self._file.flush()
        self.board(
            int(row[0]) if row else 0, {f"val/{name}": figures[name] for name in self.validated if name in figures}
        )

    def board(self, step: int, values: dict[str, Any]) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def pause(self) -> None:
        """Leave out the time until now (a validation, a checkpoint) from the throughput; call it after a flush."""
        self._since = time.perf_counter()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> dict[str, list[float]]:
    """The columns by name; NaN where a row has nothing."""
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    return {name: [float(row[i] or "nan") for row in rows[1:]] for i, name in enumerate(rows[0])}


def _keep_rows(path: Path, columns: list[str], step: int) -> None:
    """Start the file, or drop the rows that a resumed run will write again."""
    rows: list[list[str]] = []
    if step > 0 and path.exists():
        with open(path, newline="") as file:
            names, *found = list(csv.reader(file)) or [[]]
        found = [row for row in found if len(row) == len(names) and int(row[0]) <= step]
        by_name = [dict(zip(names, row, strict=True)) for row in found]  # an older version wrote fewer columns
        rows = [[row.get(name, "") for name in columns] for row in by_name]
    temporary = path.with_name(f".{path.name}")
    with open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    os.replace(temporary, path)


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None  # metrics.csv has the same figures
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
