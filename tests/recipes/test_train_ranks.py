"""`fastloss train` on two ranks, in one launch: the curve of one process, its batches, decisions of all together."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")

from fastloss.recipes.imagen import train as training  # noqa: E402
from fastloss.recipes.imagen.build import load_model  # noqa: E402
from fastloss.recipes.imagen.train import Trainer  # noqa: E402
from fastloss.recipes.training.checkpoint import last_checkpoint, load_checkpoint, save_last  # noqa: E402
from fastloss.recipes.training.metrics import read_metrics  # noqa: E402
from fastloss.recipes.training.options import fitted  # noqa: E402
from fastloss.recipes.training.sharded import read_sharded, write_sharded  # noqa: E402
from fastloss.recipes.training.world import World, of_all_ranks  # noqa: E402
from tests.recipes.ranks import STEPS, launch, next_ids, options_of  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.one_launch]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module", autouse=True)
def judged():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "validate", lambda *_: {"score": 0.5})
        yield


@pytest.fixture(scope="module")
def ranks(folder, judged):
    """What two ranks return; before them one process has begun the run that they go on with."""
    begun = Trainer(options_of(folder / "one", weighting="uncertainty", steps=4), quiet=True)
    begun.run()
    return launch(folder)


def joined(ranks, part):
    """The ids of each global batch."""
    return [one + two for one, two in zip(*(rank[part]["ids"] for rank in ranks), strict=True)]


def test_two_ranks_follow_the_curve_of_one(folder, ranks, tmp_path):
    one = Trainer(options_of(tmp_path, weighting="uncertainty"), quiet=True)
    one.run()
    curves = [read_metrics(path / "metrics.csv") for path in (tmp_path, folder / "two")]
    assert [curve["step"] for curve in curves] == [list(range(1, STEPS + 1))] * 2  # each row once, by rank 0
    for name in ("loss", "contrastive", "pixel", "diversity", "smoothness", "mode_seeking", "prior"):
        there, here = (torch.tensor(curve[name]) for curve in curves)
        torch.testing.assert_close(here, there, rtol=1e-4 if name == "loss" else 2e-3, atol=1e-4)
    first, second = (rank["curve"] for rank in ranks)
    assert torch.equal(first["weights"], second["weights"]) and torch.equal(first["bank"], second["bank"])
    assert first["pushed"] == second["pushed"] == one.losses.bank.pushed == STEPS * 9
    torch.testing.assert_close(first["bank"], one.losses.bank.emb, rtol=1e-2, atol=1e-2)
    assert joined(ranks, "curve") == next_ids(one)


def test_runs_go_on_with_another_number_of_ranks(folder, ranks):
    for part in ranks:
        assert part["resumed_from_one"]["start"] == 4
    assert not (folder / "one" / "checkpoint.pt").exists()  # its state is the folder of two ranks now
    one = Trainer.resume(folder / "one", {"steps": 7}, quiet=True)
    assert one.step == 6 and next_ids(one) == joined(ranks, "resumed_from_one")
    one.run()
    assert last_checkpoint(folder / "one").name == "checkpoint.pt" and not (folder / "one" / "checkpoint").exists()
    assert read_metrics(folder / "one" / "metrics.csv")["step"] == [1, 2, 3, 4, 5, 6, 7]
    load_model(folder / "two" / "checkpoint")


def test_a_signal_to_one_rank_stops_all_at_one_step(folder, ranks):
    steps = {rank["stopped"]["step"] for rank in ranks}
    assert len(steps) == 1 and steps <= {3, 4}
    assert all(f"stopped at step {steps.copy().pop()}; `--resume`" in rank["stopped"]["said"] for rank in ranks)
    resumed = Trainer.resume(folder / "stopped", {}, quiet=True)
    assert {resumed.step} == steps and not any(path.name.startswith(".") for path in (folder / "stopped").iterdir())


def test_all_ranks_end_of_the_same_reason(folder, ranks):
    assert {rank["not_finite"] for rank in ranks} == {"the loss is nan at step 1; try a lower --learning-rate"}
    for rank in ranks:
        assert rank["early"]["step"] == 4 and rank["early"]["best"] == 0.5
        assert rank["early"]["said"] == f"[Errno 2] No such file or directory: '{folder / 'nowhere' / 'x'}'"
    assert load_checkpoint(folder / "early")["progress"]["step"] == 2


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("wrong model", "does not fit this version's run (Error(s) in loading state_dict"),
        ("truncated", "checkpoint is corrupt or no checkpoint ("),
        (
            "no metadata",
            "checkpoint is corrupt or no checkpoint (it has no .metadata, which is written last: it is not",
        ),
        ("other recipe", "checkpoint.pt is of `fastloss train-clip`, expected one of `fastloss train`"),
        ("too few", "error: --batch-size: expected an image for each of the 2 ranks, got 1"),
        ("bad option", "error: --temperature: expected a finite number > 0, got nan"),
    ],
)
def test_a_mistake_ends_with_one_line_of_rank_0_and_code_2(ranks, what, said):
    (code, lines), (other_code, other_lines) = (rank["failures"][what] for rank in ranks)
    assert (code, other_code) == (2, 2) and other_lines == ""
    assert lines.count("\n") == 1 and lines.startswith("error: ") and said in lines


def test_fewer_images_than_ranks_are_named():
    with pytest.raises(ValueError, match="data: expected a training image for each of the 4 ranks, got 3 in folder:x"):
        fitted(options_of("x", data="folder:x"), 3, 4)


# the checkpoint of several ranks, in one process


def test_a_sharded_checkpoint_gives_back_what_it_got(tmp_path):
    content = {
        "model": {"a": torch.randn(3, 4).bfloat16(), "b": torch.tensor(2)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.99), "x": None}]},
        "pictures": [torch.zeros(2, dtype=torch.uint8)],
    }
    for _ in range(2):  # the second takes the place of the first
        write_sharded(tmp_path / "checkpoint", content, World())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    found = read_sharded(tmp_path / "checkpoint")
    assert torch.equal(found["model"]["a"], content["model"]["a"]) and found["model"]["b"] == 2
    assert found["optimizer"] == content["optimizer"] and torch.equal(found["pictures"][0], content["pictures"][0])


def test_a_run_killed_between_two_renames_has_its_earlier_checkpoint(tmp_path):
    write_sharded(tmp_path / "checkpoint", {"version": 1, "progress": {"step": 3}}, World())
    os.replace(tmp_path / "checkpoint", tmp_path / ".checkpoint.previous")
    assert load_checkpoint(last_checkpoint(tmp_path))["progress"]["step"] == 3
    write_sharded(tmp_path / "checkpoint", {"version": 1, "progress": {"step": 4}}, World())
    assert load_checkpoint(tmp_path)["progress"]["step"] == 4
    save_last(tmp_path, {"progress": {"step": 5}}, World())
    assert load_checkpoint(tmp_path)["progress"]["step"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_metadata_that_would_run_code_is_refused(tmp_path):
    write_sharded(tmp_path / "checkpoint", {"x": 1}, World())
    (tmp_path / "checkpoint" / ".metadata").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(ValueError, match=r"its .metadata names os.system, which no checkpoint needs"):
        load_checkpoint(tmp_path / "checkpoint")


def test_a_world_of_one_needs_no_communication():
    world = World.join()
    assert (world.size, world.group, world.same(3), world.every(4), world.first(lambda: 5)) == (1, None, 3, [4], 5)
    with pytest.raises(ZeroDivisionError):
        world.together(lambda: 1 / 0)
    assert of_all_ranks(error := ValueError()) is error
