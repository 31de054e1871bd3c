"""What needs several ranks, in one start of their processes for each number of them, which takes the time."""

from __future__ import annotations

import pytest

from tests.distributed.checks import CHECKS
from tests.distributed.worker import run


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_what_ranks_do_is_what_one_process_does(world, tmp_path):
    ranks = run("everything", world, tmp_path)
    assert {"losses", "by_module", "mismatches", "wire", "traffic", "similarities", "nothing", "bank"} <= set(ranks[0])
    assert ("compiled" in ranks[0], "cached" in ranks[0], "death" in ranks[0]) == (world == 2, world == 2, world == 4)
    for part in ranks[0]:
        CHECKS[part](world, ranks)
