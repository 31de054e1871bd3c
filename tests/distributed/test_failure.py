"""Ranks that disagree, die, or stop: what the others say, and how soon they are gone."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys

import pytest

from tests.distributed.cases import STRATEGIES
from tests.distributed.failing import FAILURES, LAST, LOSSES, TIMEOUT_S, WORLD

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGSTOP")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.distributed.failing", str(folder)]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        assert process.wait(timeout=300) == 0
    finally:
        if process.poll() is None:
            process.kill()
    return folder


def test_a_mismatch_is_an_error_on_every_rank_that_names_two_within_five_seconds(folder):
    everyone = [json.loads((folder / f"{rank}.said").read_text()) for rank in range(WORLD)]
    words = {
        "width": ("[*, 8]", "[*, 6]"),
        "dtype": ("torch.float32", "torch.float64"),
        "rows": ("as many rows on all ranks",),
        "no rows": ("as many rows on all ranks", "got"),
        "option": ("reduction=mean", "reduction=sum"),
        "strategy": ("strategy=",),
        "refused": ("on all ranks", "error=ValueError: ", "got shape"),
    }
    assert set(everyone[0]) == {", ".join(call) for call in itertools.product(LOSSES, STRATEGIES, words)}
    for name in everyone[0]:
        (said, _), kind = everyone[0][name], name.split(", ")[-1]
        assert said.startswith("ValueError: "), f"{name}: {said}"
        assert all(word in said for word in (*words[kind], "rank 0", f"rank {LAST}")), f"{name}: {said}"
        for rank, theirs in enumerate(everyone):
            if (rank, kind) != (LAST, "refused"):
                assert theirs[name][0] == said, name
            else:  # its own error, without the ranks
                assert theirs[name][0].startswith("ValueError") and " on rank " not in theirs[name][0]
            assert theirs[name][1] < 5, name


@pytest.mark.parametrize("failure", FAILURES, ids=[failure.of(LAST) for failure in FAILURES])
def test_live_ranks_end_with_an_error_that_names_rank_and_operation(folder, failure):
    found, gone = (json.loads((folder / name).read_text()) for name in ("codes", "exits"))
    for rank in range(LAST):
        name = failure.of(rank)
        said = (folder / f"{name}.txt").read_text()
        assert found[name] == 1, said
        assert float((folder / f"{name}.seconds").read_text()) < TIMEOUT_S + 10
        assert gone[name] < TIMEOUT_S + 10, "from the failure to the exit"
        named = f"RuntimeError: fastloss: (the|a) [a-z ']+ failed on rank {rank} of {WORLD}: "
        assert re.search(named, said), said
