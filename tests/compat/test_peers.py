"""`python -m tests.peers`: a folder of tests with the library's classes and with ours."""

from __future__ import annotations

import pytest

from tests import peers

THEIR_TESTS = """
import pytest
import torch
from info_nce import InfoNCE, info_nce
from tests import ROWS


def test_a_value():
    assert InfoNCE()(torch.eye(ROWS), torch.eye(ROWS)) > 0


def test_a_temperature_of_each_row():
    assert info_nce(torch.eye(ROWS), torch.eye(ROWS), temperature=torch.ones(ROWS, 1)) > 0


@pytest.mark.parametrize("text", ["a[1]"])
def test_where_it_comes_from(text):
    assert info_nce.__module__ == "info_nce"


@pytest.mark.skip
def test_nothing():
    pass
"""


def test_both_and_what_differs(tmp_path):
    """Their tests too are in a package called tests, and import from it."""
    pytest.importorskip("info_nce")
    folder = tmp_path / "tests"
    folder.mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (folder / "__init__.py").write_text("ROWS = 4\n")
    (folder / "test_info_nce.py").write_text(THEIR_TESTS)
    ours = peers.run("info_nce", "ours", str(folder), ["-p", "no:randomly"])
    wanted = "tests/test_info_nce.py::test_where_it_comes_from[a[1]]"
    theirs = {"outcomes": ours["outcomes"] | {wanted: "passed"}}
    lines, same = peers.compared("info_nce", theirs, ours)
    assert lines[0] == "info_nce with theirs: 3 passed, 1 skipped"
    assert lines[1] == "info_nce with ours: 1 failed, 2 passed, 1 skipped"
    assert lines[2] == "2 tests called a drop-in, 2 of them pass"
    assert lines[3] == "  1 handed on: info_nce.info_nce: temperature"
    assert lines[4] == f"  {wanted}: passed with theirs, failed with ours"
    assert lines[5].endswith("assert 'fastloss.compat.info_nce' == 'info_nce'")
    assert not same and peers.compared("info_nce", ours, ours)[1]
