"""Tables and pictures from the result files: `python -m benchmarks.plot` (`--check` only compares the texts).

Writes the figures of README.md, benchmarks/REPORT.md, and where matplotlib is installed the pictures in
benchmarks/results/<device>/.
"""

from __future__ import annotations

import importlib.util
import sys

from benchmarks.harness.measure import ROOT
from benchmarks.report import pages, tables


def outdated() -> list[str]:
    """The files whose tables are not what the result files say."""
    texts = {name: (ROOT / name).read_text(encoding="utf8") for name in pages.SECTIONS}
    return [name for name, text in texts.items() if pages.written(name, text) != text]


def main(argv: list[str] | None = None) -> int:
    if "--check" in (sys.argv[1:] if argv is None else argv):
        for name in outdated():
            print(f"{name} is not what the result files say: run `python -m benchmarks.plot`")
        return int(bool(outdated()))
    if importlib.util.find_spec("matplotlib") is None:
        print("no pictures, for matplotlib is not installed")
    else:
        from benchmarks.report import pictures

        for drawn in pictures.draw_all():
            print(f"drew {drawn.relative_to(ROOT)}")
    for name in pages.SECTIONS:  # after the pictures, which they show
        path = ROOT / name
        path.write_text(pages.written(name, path.read_text(encoding="utf8")), encoding="utf8")
    for line in tables.unexplained():
        print(f"lost and not explained in benchmarks/report/explanations.py: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
