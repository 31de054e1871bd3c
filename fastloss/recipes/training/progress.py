"""One progress bar for a run, on rank 0."""

from __future__ import annotations

import contextlib
import sys
from typing import Any


def progress_bar(shown: bool, steps: int, done: int) -> Any:
    """A context with `update(count)` and `set_postfix_str(text)`: tqdm's bar, or nothing."""
    if shown:
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            pause = 0.5 if sys.stderr.isatty() else 10  # a log file needs no line per step
            return tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, mininterval=pause)
    return contextlib.nullcontext(_NoBar())


class _NoBar:
    def update(self, count: int) -> None:
        """Nothing is shown."""

    def set_postfix_str(self, text: str) -> None:
        """Nothing is shown."""
