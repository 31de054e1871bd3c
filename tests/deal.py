"""`pytest -p tests.deal --deal I/N`: run I (from 0) of N that together run all chosen tests, each once.

Tests are dealt in turn, each round beginning one run further: a parameter that changes with a period of N, a dtype say,
would otherwise meet the same run each time.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--deal", default="0/1", metavar="I/N", help="run I of N that share the tests")


def run_of(position: int, runs: int) -> int:
    """Which run has the test at this position."""
    return (position + position // runs) % runs


@pytest.hookimpl(trylast=True)  # of what -k has left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    own, runs = map(int, config.getoption("--deal").split("/"))
    if not 0 <= own < runs:
        raise pytest.UsageError(f"--deal: expected I/N with 0 <= I < N, got {own}/{runs}")
    mine = [run_of(position, runs) == own for position in range(len(items))]
    config.hook.pytest_deselected(items=[item for item, there in zip(items, mine, strict=True) if not there])
    items[:] = [item for item, there in zip(items, mine, strict=True) if there]
