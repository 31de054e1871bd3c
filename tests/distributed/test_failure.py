"""Ranks that disagree, die, or stop: what the others say, and how soon they are gone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.distributed.failing import LOSSES, SIGNALS, TIMEOUT_S, WORLD

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
    }
    assert set(everyone[0]) == {f"{loss}, {kind}" for loss in LOSSES for kind in words}
    for name in everyone[0]:
        (said, _), kind = everyone[0][name], name.split(", ")[1]
        assert said.startswith("ValueError: "), f"{name}: {said}"
        assert all(word in said for word in (*words[kind], "rank 0", f"rank {WORLD - 1}")), f"{name}: {said}"
        for rank in everyone:
            assert rank[name][0] == said, name
            assert rank[name][1] < 5, name


@pytest.mark.parametrize("how", [how.name for how in SIGNALS])
def test_live_ranks_end_with_an_error_that_names_rank_and_operation(folder, how):
    found, gone = (json.loads((folder / name).read_text()) for name in ("codes", "exits"))
    for rank in range(WORLD - 1):
        said = (folder / f"{how}{rank}.txt").read_text()
        assert found[f"{how}{rank}"] == 1, said
        assert float((folder / f"{how}{rank}.seconds").read_text()) < TIMEOUT_S + 10
        assert gone[f"{how}{rank}"] < TIMEOUT_S + 10, "from the failure to the exit"
        assert f"failed on rank {rank} of {WORLD}" in said and "RuntimeError: fastloss: the " in said, said
