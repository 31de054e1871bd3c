"""Small data and short runs: what is made smaller and said, what a missing network offers, what few images mean."""

from __future__ import annotations

import logging
from urllib.error import URLError

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from fastloss.recipes.data.splits import Splits, few  # noqa: E402
from fastloss.recipes.imagen.config import Config  # noqa: E402
from fastloss.recipes.imagen.losses import perceptual_loss  # noqa: E402
from fastloss.recipes.imagen.run import train  # noqa: E402
from fastloss.recipes.imagen.train import Trainer  # noqa: E402
from fastloss.recipes.training.metrics import read_metrics  # noqa: E402
from fastloss.recipes.training.options import fitted  # noqa: E402
from tests.recipes.test_cli import call  # noqa: E402
from tests.recipes.test_data import captioned, noise_file  # noqa: E402
from tests.recipes.test_imagen import small  # noqa: E402
from tests.recipes.test_shards import write_shards  # noqa: E402


def photos(root, count=12):
    """`count` noisy images, of three captions."""
    for i in range(count):
        noise_file(root / f"{i:03}.png", i).with_suffix(".txt").write_text(("red", "green", "blue")[i % 3])
    return root


def test_batch_and_warm_up_are_fitted_and_it_is_said():
    config, notices = fitted(Config(batch_size=64, steps=100, warmup=50), images=10)
    assert (config.batch_size, config.warmup) == (10, 10)
    assert notices == [
        "--batch-size: 10 in place of 64, as many as there are training images",
        "--warmup: 10 in place of 50, a tenth of 100 steps",
    ]
    enough = Config(batch_size=64, steps=500, warmup=50)
    assert fitted(enough, images=64) == (enough, [])


def test_a_run_on_twelve_images(tmp_path, caplog):
    """Every split has an image, the log has one line of counts, the report says that it knows little."""
    data = f"folder:{photos(tmp_path / 'photos')}"
    config = small(tmp_path / "run", data=data, batch_size=64, steps=2, val_every=1, backbones="digits")
    with caplog.at_level(logging.INFO, logger="fastloss"):
        line = train(config)
    said = [record.getMessage() for record in caplog.records]
    counts = [f"{len(Splits(config)[split])} {split}" for split in ("train", "val", "test")]
    assert said[0] == f"{data}: {counts[0]}, {counts[1]} and {counts[2]} images, none skipped"
    assert sum("images, none skipped" in text for text in said) == 1
    assert said[1].startswith("--batch-size: ") and said[2] == "--warmup: 0 in place of 50, a tenth of 2 steps"
    n = len(Splits(config)["test"])
    assert f"n {n})" in line and "figures of fewer than 50 images say little" in said[3]
    report = (tmp_path / "run" / "report.md").read_text()
    assert said[3] in report and f"| batch_size | {len(Splits(config)['train'])} |" in report
    assert "retrieval less mae" in report
    assert len([v for v in read_metrics(tmp_path / "run" / "metrics.csv")["val_mae"] if v == v]) == 2

    resumed = Trainer.resume(tmp_path / "run", {"batch_size": 64, "steps": 3, "warmup": 50}, quiet=True)
    assert resumed.config.batch_size == len(resumed.data) and resumed.step == 2 and resumed.config.warmup == 0
    with pytest.raises(ValueError, match="batch_size: the run in"):
        Trainer.resume(tmp_path / "run", {"batch_size": 5}, quiet=True)


def test_few_is_said_below_fifty_only():
    assert few(50, 200) == "" and few(200, 49).startswith("There are 200 validation and 49 test images")


def test_shards_are_counted_as_far_as_it_takes(tmp_path):
    spec = write_shards(tmp_path, [40, 30], "part")
    splits = Splits(Config(data=spec, channels=1, val_percent=20, test_percent=20))
    counts = [splits.count(split) for split in ("train", "val", "test")]
    assert sum(counts) == 70 and min(counts) >= 5 and splits.count("train", 7) == 7
    assert splits.line() == f"{spec}: {counts[0]} train, {counts[1]} val and {counts[2]} test images, none skipped"
    trainer = Trainer(small(tmp_path / "run", data=spec, channels=1, batch_size=99, weights="perceptual=0"), quiet=True)
    assert trainer.config.batch_size == len(list(trainer.data)) < 70


def test_an_empty_split_names_the_option(tmp_path):
    captioned(tmp_path, 4)
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match="its val split.*a larger --val-percent, or a folder or shards called val"):
        Splits(Config(data=f"folder:{tmp_path}"))["val"]


def test_a_missing_network_offers_what_works_without_one(tmp_path, monkeypatch, capsys):
    models = pytest.importorskip("torchvision.models")

    def unreachable(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(models._api, "load_state_dict_from_url", unreachable)
    data = f"folder:{captioned(tmp_path / 'data', 4)}"
    code, _, err = call(capsys, "train", "--data", data, "--out", tmp_path / "run")
    line = err.splitlines()[-1]
    assert code == 2 and "Traceback" not in err
    assert line.startswith("error: --backbone-weights: the weights of vgg16 could not be downloaded from https://")
    assert "no route to host" in line
    for way in ("--backbone-weights PATH", "--backbone-weights random", "--backbones digits", "--weights perceptual=0"):
        assert way in line
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError) as error:
        perceptual_loss(["vgg16"])
    assert error.value.__cause__ is None and error.value.__suppress_context__


def test_the_digits_network_sees_grey():
    loss = perceptual_loss(["digits"])
    torch.manual_seed(0)
    image, other = torch.rand(2, 2, 3, 32, 32)
    grey = [x.mean(1, keepdim=True) for x in (image, other)]
    torch.testing.assert_close(loss(image, other), loss(*grey))
    assert loss(image, other) > 0.01
