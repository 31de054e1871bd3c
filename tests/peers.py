"""`python -m tests.peers LIBRARY --tests PATH [-- ARGUMENTS]`: a library's own tests, with its classes and ours.

PATH is a file or folder of a checkout of the library at its installed version: its tests are not in this repository.
The arguments are pytest's.
They run twice, each time in a process of their own: as they are, and with `fastloss.patch(LIBRARY)` before the first of
them is collected. Printed are how many passed, how many of them called a drop-in, how many of these calls went on to
the library's own code and why, and every test that ends otherwise with ours. Exit status 1 if there is one.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(library: str, whose: str, tests: str, arguments: list[str]) -> dict[str, Any]:
    """What the tests' process wrote: outcomes by test, and which drop-ins each called and handed on."""
    with tempfile.TemporaryDirectory() as folder:
        report = os.path.join(folder, "report.json")
        command = [sys.executable, __file__, library, "--tests", tests, "--as", whose, "--report", report, "--"]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [*command, *arguments], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
        )
        if not os.path.exists(report):
            raise SystemExit(f"the tests did not run with {whose}:\n{done.stdout}\n{done.stderr}")
        with open(report) as file:
            return json.load(file)


def compared(library: str, theirs: dict[str, Any], ours: dict[str, Any]) -> tuple[list[str], bool]:
    """The report's lines, and whether every test ends with ours as with theirs."""
    lines = []
    for whose, found in (("theirs", theirs), ("ours", ours)):
        counts = collections.Counter(found["outcomes"].values())
        lines.append(f"{library} with {whose}: " + ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())))
    called = {test for test, names in ours["called"].items() if names}
    passed = sum(ours["outcomes"].get(test) == "passed" for test in called)
    lines.append(f"{len(called)} tests called a drop-in, {passed} of them pass")
    reasons = collections.Counter((name, why) for reasons in ours["handed_on"].values() for name, why in reasons)
    lines += [f"  {n} handed on: {name}: {why}" for (name, why), n in reasons.most_common()]
    other = {
        test: (theirs["outcomes"].get(test, "absent"), ours["outcomes"].get(test, "absent"))
        for test in sorted({*theirs["outcomes"], *ours["outcomes"]})
    }
    other = {test: pair for test, pair in other.items() if pair[0] != pair[1]}
    for test, (before, after) in other.items():
        lines.append(f"  {test}: {before} with theirs, {after} with ours")
        lines += [f"    {line}" for line in ours["messages"].get(test, "").splitlines()]
    return lines, not other


class Outcomes:
    """pytest's plugin of the process that runs the tests."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.messages: dict[str, str] = {}
        self.called: dict[str, list[str]] = collections.defaultdict(list)
        self.handed_on: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
        self.test = ""

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.test = nodeid

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._add(report)

    def pytest_collectreport(self, report: Any) -> None:
        if report.outcome == "failed":
            self._add(report)

    def _add(self, report: Any) -> None:
        self.outcomes[report.nodeid] = report.outcome
        crash = getattr(report.longrepr, "reprcrash", None)
        if report.outcome == "failed":
            self.messages[report.nodeid] = str(crash or report.longrepr)[-2000:]

    def watch(self, common: Any) -> None:
        """Notes which drop-ins a test calls and which of them hand on, from here on."""
        hands_on = common.hands_on

        def watched(name: str, theirs: Any) -> Any:
            def decorate(ours: Any) -> Any:
                drop_in = hands_on(name, theirs)(ours)

                @functools.wraps(ours)
                def noted(*args: Any, **options: Any) -> Any:
                    if name not in self.called[self.test]:
                        self.called[self.test].append(name)
                    return drop_in(*args, **options)

                return noted

            return decorate

        common.hands_on = watched
        common._say_once = lambda name, why: self.handed_on[self.test].append((name, why.split(":")[0]))


def run_as(whose: str, library: str, tests: str, report: str, arguments: list[str]) -> None:
    """In the tests' own process: this folder off the path, theirs may have a package called tests too."""
    import pytest

    sys.path[:] = [path for path in sys.path if pathlib.Path(path or ".").resolve() != ROOT / "tests"]
    outcomes = Outcomes()
    if whose == "ours":
        import fastloss
        from fastloss.compat import _common

        outcomes.watch(_common)
        print(fastloss.patch(library))
    sys.path[:] = [path for path in sys.path if pathlib.Path(path or ".").resolve() != ROOT]
    pytest.main([tests, "-q", "-p", "no:cacheprovider", *arguments], plugins=[outcomes])
    with open(report, "w") as file:
        json.dump({name: vars(outcomes)[name] for name in ("outcomes", "messages", "called", "handed_on")}, file)


def main() -> None:
    given = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    given.add_argument("library")
    given.add_argument("--tests", required=True, metavar="PATH", help="a file or folder of the library's tests")
    given.add_argument("--as", dest="whose", choices=["theirs", "ours"], help=argparse.SUPPRESS)
    given.add_argument("--report", help=argparse.SUPPRESS)
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, arguments = given.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    if args.whose:
        run_as(args.whose, args.library, args.tests, args.report, arguments)
        return
    theirs, ours = (run(args.library, whose, args.tests, arguments) for whose in ("theirs", "ours"))
    lines, same = compared(args.library, theirs, ours)
    print("\n".join(lines))
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
