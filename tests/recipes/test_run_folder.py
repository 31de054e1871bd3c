"""A run's folder: what is refused, what is kept, what killed runs leave, and how one is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from fastloss.recipes.imagen import train as training  # noqa: E402
from fastloss.recipes.imagen.train import Trainer  # noqa: E402
from fastloss.recipes.training.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from fastloss.recipes.training.run_folder import clear_temporary, started  # noqa: E402
from tests.recipes.test_cli import SMALL, call  # noqa: E402
from tests.recipes.test_imagen import small  # noqa: E402

NO_NETWORK = ["--weights", "perceptual=0"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of four steps, with a report."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "validate", lambda *_: {"score": 0.5})
        Trainer(small(folder, weights="perceptual=0"), quiet=True).run()
    (folder / "report.md").write_text("# A run")
    return folder


def test_a_run_is_not_written_over_without_a_word(finished, capsys):
    before = contents(finished)
    code, _, err = call(capsys, "train", "--out", finished, *SMALL)
    assert code == 2 and err.splitlines()[-1] == (
        f"error: --out: {finished} has a run already (checkpoint.pt, best.pt, report.md); --resume continues it, "
        "--overwrite deletes it, another --out leaves it as it is"
    )
    code, _, err = call(capsys, "train", "--out", finished, "--resume", "--overwrite")
    assert code == 2 and "error: --overwrite: expected one of --resume and --overwrite, got both" in err
    code, _, err = call(capsys, "train", "--out", finished, "--overwrite", "--data", "folder:/no/such")
    assert code == 2 and "expected a folder of images" in err
    assert contents(finished) == before


def test_the_default_folder_is_guarded_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    (tmp_path / "runs" / "digits" / "report.md").write_text("of a month")
    code, _, err = call(capsys, "train", *SMALL)
    assert code == 2 and "--out: runs/digits has a run already (report.md)" in err
    assert (tmp_path / "runs" / "digits" / "report.md").read_text() == "of a month"


def test_resuming_a_finished_run_says_that_nothing_was_trained(finished, capsys):
    before = contents(finished)
    code, out, _ = call(capsys, "train", "--out", finished, "--resume")
    assert code == 0 and out == (
        f"nothing was trained: {finished} has a finished run, it is at step 4 of 4; more --steps go on with it\n"
    )
    assert contents(finished) == before


def test_overwrite_leaves_nothing_of_the_earlier_run_and_all_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for name in ("checkpoint.pt", "best.pt", "report.md", "samples.png"):
        (tmp_path / name).write_bytes(b"old")
    Trainer(small(tmp_path, weights="perceptual=0"), quiet=True, overwrite=True)
    assert set(contents(tmp_path)) == {"notes.txt"}


def test_a_failed_start_leaves_no_folder(tmp_path, capsys):
    for arguments in (["--data", "folder:/no/such"], ["--device", "cuda:77"]):
        assert call(capsys, "train", "--out", tmp_path / "a" / "b", *arguments)[0] == 2
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError), started(tmp_path / "a" / "b"):
        (tmp_path / "a" / "kept").write_text("")
        raise RuntimeError
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


def test_temporary_files_of_killed_runs_go_and_those_of_others_stay(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = [f".checkpoint.pt.{ended.pid}", f".best.pt.{ended.pid}", f".writable-{ended.pid}", ".metrics.csv"]
    kept = [f".checkpoint.pt.{os.getppid()}", ".mine", ".checkpoint.pt.old", f".other.{ended.pid}"]
    for name in names + kept:
        (tmp_path / name).write_bytes(b"half")
    clear_temporary(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(kept)


def test_a_run_killed_in_its_first_checkpoint_starts_again(tmp_path, monkeypatch):
    code = (
        "import os, signal, torch\n"
        "def killed(content, file):\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "torch.save = killed\n"
        "from fastloss.recipes.imagen import train\n"
        "train.validate = lambda *_: {'score': 0.5}\n"
        "from tests.recipes.test_imagen import small\n"
        f"train.Trainer(small({str(tmp_path)!r}, steps=2, weights='perceptual=0'), quiet=True).run()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = {path.name for path in tmp_path.iterdir()}
    assert any(name.startswith(".checkpoint.pt.") for name in left) and "checkpoint.pt" not in left
    with pytest.raises(ValueError, match="resume: no run to continue, .*checkpoint.pt does not exist"):
        Trainer.resume(tmp_path, {}, quiet=True)
    monkeypatch.setattr(training, "validate", lambda *_: {"score": 0.5})
    Trainer(small(tmp_path, steps=2, weights="perceptual=0"), quiet=True).run()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert load_checkpoint(tmp_path / "checkpoint.pt")["progress"]["step"] == 2


def test_a_run_killed_between_its_two_checkpoints_has_both_after_resuming(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "validate", lambda *_: {"score": 0.5})
    trainer = Trainer(small(tmp_path, steps=2, weights="perceptual=0"), quiet=True)
    trainer._save_best = lambda: None
    trainer.run()
    assert not (tmp_path / "best.pt").exists()
    resumed = Trainer.resume(tmp_path, {}, quiet=True)
    best = load_checkpoint(tmp_path / "best.pt")
    assert best["progress"]["step"] == 2
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, best["model"][name])


def test_a_corrupt_checkpoint_names_the_other_one(tmp_path):
    for name, step in (("checkpoint.pt", 7), ("best.pt", 5)):
        save_checkpoint(tmp_path / name, {"progress": {"step": step}})
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[:300])
    with pytest.raises(ValueError) as error:
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert error.value.__cause__ is None and str(error.value).endswith(
        f"{tmp_path / 'best.pt'} (the best model, of step 5) loads: sample from it with --checkpoint "
        f"{tmp_path / 'best.pt'}. It has no training state, so to train on, start again with --overwrite, or in "
        "another --out"
    )
    (tmp_path / "checkpoint.pt").write_bytes(whole)
    (tmp_path / "best.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"best.pt is corrupt or no checkpoint .*checkpoint.pt \(step 7\) loads"):
        load_checkpoint(tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="checkpoint.pt beside it does not load either: train again with --overwrite"):
        load_checkpoint(tmp_path)


def test_the_whole_reason_stands_in_the_message(tmp_path, monkeypatch):
    (tmp_path / "x.pt").write_bytes(b"x")

    def fails(*_, **__):
        raise RuntimeError("word " * 60 + "end\nsecond line")

    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(ValueError, match=r"\((word ){60}end\)$"):
        load_checkpoint(tmp_path / "x.pt")
