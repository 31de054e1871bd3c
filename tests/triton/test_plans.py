"""Launch plans over Triton's real launcher and a stub driver: what is launched, and what that costs the host.

Values are compared in tests/core/test_plans.py. Processes of their own, as TRITON_INTERPRET decides at import.
"""

from __future__ import annotations

import json
import os
import pathlib

import pytest

from tests.triton import stub_driver
from tests.triton.test_aot import OLDER, needs_older, needs_triton, python

MOST_CALLS = {"pixel": 100, "clip": 250, "feature_distance": 300, "smoothness, guide and weight": 250}
MOST_CALLS |= {"attention, three layers": 250, "attention from qk": 150}
needs_compiler = pytest.mark.skipif(stub_driver.compiler() is None, reason="there is no C compiler")


def report(folder: pathlib.Path, triton: str, *options: str) -> dict:
    """What tests/triton/plans.py reports under the Triton of a directory, or the installed one: ""."""
    environment = stub_driver.build(folder, pathlib.Path(triton, "triton") if triton else None)
    before = [p for p in (triton, os.environ.get("PYTHONPATH")) if p]
    output = python("-W", "ignore", "-m", "tests.triton.plans", *options, **environment,
                    TRITON_CACHE_DIR=str(folder / "cache"), PYTHONPATH=os.pathsep.join(before))  # fmt: skip
    return json.loads(output.splitlines()[-1])


@pytest.mark.slow
@needs_triton
@needs_compiler
@pytest.mark.parametrize(
    ("triton", "losses", "least", "most_calls"),
    [
        pytest.param("", [], 17, MOST_CALLS, id="installed"),
        pytest.param(OLDER, ["pixel", "clip", "feature_distance"], 3, {}, id="3.6", marks=needs_older),
    ],
)
def test_a_replay_launches_what_the_launcher_does_in_fewer_calls(tmp_path, triton, losses, least, most_calls):
    """On an older Triton for some losses: the record is the same there, the C launcher is another. Two processes, as
    what compares would be counted too; the second finds the kernels that the first has compiled."""
    found = report(tmp_path, triton, "--compare", *losses)
    print(found.pop("triton"))
    assert len(found) >= least
    for name, row in found.items():
        assert row["launches"] > 0 and row["same"], (name, row.get("differ"))
        assert row["streams"] == [77], name  # the one that was current then, with plans recorded on another
    counted = report(tmp_path, triton, *most_calls) if most_calls else {}
    print(counted)
    for name, most in most_calls.items():
        row = counted[name]
        assert row["after calls"] <= most < row["before calls"], name
        assert row["after launches"] == row["before launches"], name
        assert row["after us"] < row["before us"], name
