"""Where a run stands: a bar on a terminal with tqdm, else a line per item with the time it will still take."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    def __init__(self, total: int) -> None:
        self.total, self.at, self.begun = total, 0, time.monotonic()
        self.bar: Any = None
        try:
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit="row", dynamic_ncols=True) if sys.stderr.isatty() else None
        except ImportError:
            pass

    def start(self, name: str) -> None:
        if self.bar is not None:
            self.bar.set_description(name)
        spent = time.monotonic() - self.begun
        whole = f" of about {_clock(spent / self.at * self.total)}" if self.at else ""
        self.say(f"[{self.at + 1}/{self.total}, {_clock(spent)}{whole}] {name}")

    def done(self) -> None:
        self.at += 1
        if self.bar is not None:
            self.bar.update(1)

    def say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
