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
needs_compiler = pytest.mark.skipif(stub_driver.compiler() is None, reason="there is no C compiler")


@pytest.fixture(params=[pytest.param("", id="installed"), pytest.param(OLDER, id="3.6", marks=needs_older)])
def plans(request, tmp_path):
    """What tests/triton/plans.py reports, under the installed Triton and the older one."""

    def report(*options: str) -> dict:
        package = pathlib.Path(request.param, "triton") if request.param else None
        environment = stub_driver.build(tmp_path, package) | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
        before = [p for p in (request.param, os.environ.get("PYTHONPATH")) if p]
        output = python("-W", "ignore", "-m", "tests.triton.plans", *options, **environment,
                        PYTHONPATH=os.pathsep.join(before))  # fmt: skip
        return json.loads(output.splitlines()[-1])

    report.older = bool(request.param)
    return report


@pytest.mark.slow
@needs_triton
@needs_compiler
def test_a_replay_launches_what_the_launcher_does(plans):
    older = plans.older  # some losses there: each launcher is the same, the C launcher is another
    found = plans("--compare", *(list(MOST_CALLS)[:3] if older else ()))
    print(found.pop("triton"))
    assert len(found) >= (3 if older else 12)
    for name, row in found.items():
        assert row["launches"] > 0 and row["same"], (name, row.get("differ"))


@pytest.mark.slow
@needs_triton
@needs_compiler
def test_a_planned_loss_makes_few_calls(plans):
    if plans.older:
        pytest.skip("the calls are counted on the installed Triton alone")
    found = plans(*MOST_CALLS)
    print(found)
    for name, most in MOST_CALLS.items():
        row = found[name]
        assert row["after calls"] <= most < row["before calls"], name
        assert row["after launches"] == row["before launches"], name
        assert row["after us"] < row["before us"], name
