"""Peak memory of a forward and backward on the CPU: growth of the resident set in a child process.

One child serves a whole run, for importing torch takes longer than most measurements. It may be given a limit: what it
cannot allocate beyond that many MiB raises, as an allocation does on a full device.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from typing import Any

from benchmarks.harness import measure

MARK = "@peak "
# Blocks of 64 KiB and more are mapped, and so given back as soon as they are free: the opposite of prepare_process().
CHILD_ENV = {"MALLOC_MMAP_MAX_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Child:
    """Asks a child process for peaks; one that died or hangs is replaced at the next question."""

    def __init__(self, limit_mib: int = 0, timeout: float = 300.0) -> None:
        self.limit_mib, self.timeout = limit_mib, timeout
        self._known: dict[str, tuple[str, str]] = {}  # question -> answer
        self._process: subprocess.Popen[str] | None = None

    def peak(self, columns: dict[str, Any], provider: str) -> tuple[str, str]:
        """(MiB or empty, why it is empty). The same question is measured once."""
        question = json.dumps(columns | {"provider": provider})
        if question not in self._known:
            self._known[question] = self._ask(question)
        return self._known[question]

    def start(self) -> None:
        """Start it now, where it would later inherit a limit of this process."""
        self._alive()

    def _ask(self, question: str) -> tuple[str, str]:
        process = self._alive()
        assert process.stdin and process.stdout
        try:
            process.stdin.write(question + "\n")
            process.stdin.flush()
            while select.select([process.stdout], [], [], self.timeout)[0]:
                line = process.stdout.readline()
                if not line:
                    break
                if line.startswith(MARK):
                    answer = json.loads(line.removeprefix(MARK))
                    return answer["peak"], answer["why"]
        except (OSError, ValueError):
            pass
        alive = process.poll() is None
        self.close()
        return "", "no answer in time" if alive else "the measuring process was killed, as when memory runs out"

    def _alive(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-m", "benchmarks.harness.memory_child", str(self.limit_mib)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1,
                env=os.environ | CHILD_ENV, cwd=measure.ROOT,
            )  # fmt: skip
        return self._process

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
            self._process = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
