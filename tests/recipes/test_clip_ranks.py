"""`fastloss train-clip` on two ranks, in one launch: the curve of one process, at once and in pieces."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from fastloss.recipes.clip.train import Trainer  # noqa: E402
from fastloss.recipes.training.metrics import read_metrics  # noqa: E402
from tests.recipes.clip_ranks import STEPS, options_of  # noqa: E402
from tests.recipes.ranks import launch  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.one_launch]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder):
    return launch(folder, job="tests.recipes.clip_ranks")


@pytest.mark.parametrize(("name", "loss"), [("clip", "clip"), ("siglip", "siglip"), ("pieces", "clip")])
def test_two_ranks_follow_the_curve_of_one(name, loss, folder, ranks, tmp_path):
    Trainer(options_of(tmp_path, loss=loss), quiet=True).run()
    one, two = (read_metrics(path / "metrics.csv") for path in (tmp_path, folder / name))
    assert two["step"] == list(range(1, STEPS + 1))  # each row once, by rank 0
    torch.testing.assert_close(torch.tensor(two["loss"]), torch.tensor(one["loss"]), rtol=1e-4, atol=1e-4)
    assert torch.equal(ranks[0][name], ranks[1][name])
