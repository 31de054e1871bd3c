"""Files of a training run: metrics written in batches, checkpoints whole or not at all."""

from __future__ import annotations

import csv

import pytest
import torch

from fastloss.recipes.training.checkpoint import load_checkpoint, save_checkpoint
from fastloss.recipes.training.metrics import Metrics


def test_metrics_rows_wait_for_the_flush(tmp_path):
    metrics = Metrics(tmp_path, ["pixel"], 0, tensorboard=False)
    metrics.add(1, torch.tensor([1.5, 0.25]), 0.1, 8)
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 1
    metrics.flush()
    metrics.close()
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "loss", "pixel", "learning_rate", "samples_per_second"]
    assert float(rows[0]["pixel"]) == 0.25 and float(rows[0]["samples_per_second"]) > 0


def test_checkpoint_is_whole_or_the_earlier_one(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"x": torch.ones(2)})

    def broken(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(ValueError, match="No space left"):
        save_checkpoint(path, {"x": torch.zeros(2)})
    assert torch.equal(load_checkpoint(path)["x"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut short"])
def test_corrupt_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="corrupt or no checkpoint"):
        load_checkpoint(path)


def test_checkpoint_of_another_format_is_refused(tmp_path):
    torch.save({"weights": 1}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="format None, this fastloss reads 1; its keys are 'weights'"):
        load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load_checkpoint(tmp_path / "nowhere.pt")
