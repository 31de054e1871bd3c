"""Image-text pre-training: glyphs, steps at once and in pieces, figures, resuming, report, mistakes."""

from __future__ import annotations

import os
import signal

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from fastloss import cli  # noqa: E402
from fastloss.recipes.clip.config import Config  # noqa: E402
from fastloss.recipes.clip.data import same_ids, zero_shot_classes  # noqa: E402
from fastloss.recipes.clip.evaluation import FIGURES, _hits, evaluate  # noqa: E402
from fastloss.recipes.clip.step import shifted  # noqa: E402
from fastloss.recipes.clip.train import Trainer, load_model  # noqa: E402
from fastloss.recipes.data.batches import open_dataset  # noqa: E402
from fastloss.recipes.data.glyphs import FONTS, HELD_OUT_FONTS, classes, draw_glyphs  # noqa: E402
from fastloss.recipes.training.checkpoint import save_checkpoint  # noqa: E402
from fastloss.recipes.training.interrupt import Interrupted  # noqa: E402
from fastloss.recipes.training.metrics import read_metrics  # noqa: E402
from fastloss.recipes.training.noise import RowNoise  # noqa: E402

SMALL = {"data": "digits", "steps": 6, "batch_size": 24, "dim": 16, "width": 32, "size": 8, "device": "cpu"}
SIZE = 24


def small(out, **changes):
    return Config(**(SMALL | {"out": str(out), "val_every": 3, "log_every": 2} | changes))


def trained(out, **changes):
    trainer = Trainer(small(out, **changes), quiet=True)
    trainer.run()
    return trainer


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def command(*arguments):
    """Exit code of a command."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in arguments])
    return end.value.code


# data


def test_glyphs_are_every_named_character_of_the_fonts():
    glyphs = draw_glyphs(SIZE)
    assert glyphs.images.shape == (len(glyphs.codes), 1, SIZE, SIZE) and glyphs.images.dtype == torch.uint8
    assert len(glyphs.codes) == 54_215 and len(glyphs.codes.unique()) == 7_353
    assert (glyphs.images.flatten(1).amax(1) > 0).all() and glyphs.fonts.max() == len(FONTS) - 1
    placed = glyphs.images[(glyphs.codes == ord("|")) & (glyphs.fonts == 0)][0, 0].float()
    assert placed.sum(0).argmax() in (SIZE // 2 - 1, SIZE // 2)  # in the middle


def test_glyphs_splits_hold_fonts_out_and_share_no_character():
    splits = {split: open_dataset("glyphs", split, SIZE, 1) for split in ("train", "val", "test")}
    glyphs = draw_glyphs(SIZE)
    held = torch.isin(glyphs.fonts, torch.tensor([FONTS.index(name) for name in HELD_OUT_FONTS]))
    assert len(splits["train"]) == int((~held).sum()) == 49_165
    assert len(splits["val"]) + len(splits["test"]) == int(held.sum())  # the model knows all held-out characters
    assert set(splits["val"].captions).isdisjoint(splits["test"].captions)
    assert set(splits["val"].captions) < set(splits["train"].captions)
    sample = splits["val"][0]
    assert sample["image"].dtype == torch.float32 and 0 < sample["image"].max() <= 1


def test_scripts_that_share_shapes_are_one_class():
    same = classes(SIZE)
    shown = ("latin capital letter a", "greek capital letter alpha", "cyrillic capital letter a")
    assert {same[name] for name in shown} == {shown[0]}
    assert same["cyrillic small letter te"] != same["latin small letter t"]
    assert same["latin small letter m"] == "latin small letter m" and len(set(same.values())) == 6_725
    data = open_dataset("glyphs", "val", SIZE, 1)
    ids = same_ids(data, [*shown, "latin small letter m"])
    assert (ids[:3] == ids[0]).all() and ids[3] != ids[0]
    found = zero_shot_classes(Config(), data, [])
    assert found.number == 6_725 and len(found.captions) == 7_353


def test_digits_are_told_apart_by_their_nine_captions():
    found = zero_shot_classes(Config(data="digits"), None, [])
    assert found.number == 10 and found.of.bincount().tolist() == [9] * 10
    assert found.by_caption["a bold handwritten seven upright"] == 7


def test_shifts_follow_the_place_in_the_batch():
    images = torch.rand(64, 1, 8, 8)
    rows = torch.arange(64)
    moved = shifted(images, 1, RowNoise.of(0, 5, rows))
    assert torch.equal(moved[16:], shifted(images[16:], 1, RowNoise.of(0, 5, rows[16:])))
    assert torch.equal(shifted(images, 0, RowNoise.of(0, 5, rows)), images)
    seen = set()
    for image, out in zip(images[:, 0], moved[:, 0], strict=True):
        fits = [
            (down, right)
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
            if torch.equal(out[2:-2, 2:-2], image[2 + down : 6 + down, 2 + right : 6 + right])
        ]
        assert len(fits) == 1
        seen |= set(fits)
    assert len(seen) == 9


# steps


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_pieces_give_the_curve_of_the_whole_batch(loss, tmp_path):
    whole = trained(tmp_path / "whole", loss=loss)
    pieces = trained(tmp_path / "pieces", loss=loss, chunk=5)
    curves = [read_metrics(tmp_path / name / "metrics.csv") for name in ("whole", "pieces")]
    torch.testing.assert_close(torch.tensor(curves[1]["loss"]), torch.tensor(curves[0]["loss"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights(pieces), weights(whole), rtol=0, atol=2e-4)
    assert ("bias" in curves[0]) == (loss == "siglip") and curves[0]["scale"][0] == pytest.approx(
        1 / 0.07 if loss == "clip" else 10.0, rel=1e-4
    )


def test_the_scale_is_bounded(tmp_path):
    trainer = Trainer(small(tmp_path, max_scale=2.0, steps=1), quiet=True)
    with torch.no_grad():
        trainer.model.log_scale.fill_(1.5)
    trainer.run()
    assert trainer.model.scale().item() == pytest.approx(2.0, rel=1e-6)


def test_a_resumed_run_repeats_the_one_it_continues(tmp_path):
    whole = trained(tmp_path / "whole")
    begun = Trainer(small(tmp_path / "begun"), quiet=True)
    step = begun.train_step

    def told(batch):
        if begun.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(batch)

    begun.train_step = told
    with pytest.raises(Interrupted, match="stopped at step 4"):
        begun.run()
    resumed = Trainer.resume(tmp_path / "begun", {"log_every": 1}, quiet=True)
    resumed.run()
    assert resumed.step == 6 and torch.equal(weights(resumed), weights(whole))
    one, two = (read_metrics(tmp_path / name / "metrics.csv") for name in ("whole", "begun"))
    assert one["loss"] == two["loss"] and one["val_score"][-1] == two["val_score"][-1]


# figures


def test_hits_count_the_nearest_and_the_five_nearest():
    keys = torch.eye(8)
    queries = keys + 0.5 * keys.roll(1, 1)  # the second nearest of i is the next one
    ids = torch.arange(8)
    assert _hits("x", queries, keys, ids, ids) == {"x1": 1.0, "x5": 1.0}
    assert _hits("x", queries, keys, ids.roll(-1), ids) == {"x1": 0.0, "x5": 1.0}
    half = torch.where(ids < 4, ids, ids.roll(-1))
    assert _hits("x", queries, keys, half, ids)["x1"] == 0.5
    assert _hits("x", queries[:2], keys[:3], ids[:2], ids[:3]) == {"x1": 1.0, "x5": 1.0}  # fewer than five keys


def test_digits_are_learned(tmp_path):
    trainer = trained(tmp_path, steps=150, batch_size=128, width=128, dim=32, val_every=150)
    figures = trainer.figures
    assert figures["top1"] > 0.85 and figures["n"] == 200 and figures["classes"] == 10
    assert figures["top1"] <= figures["top5"] and figures["image_recall1"] <= figures["image_recall5"]
    assert figures["score"] == pytest.approx(
        (figures["top1"] + figures["caption_recall1"] + figures["image_recall1"]) / 3
    )
    model, config = load_model(tmp_path)
    assert evaluate(model, config, trainer.splits["val"]) == figures


# the command


def test_the_command_leaves_a_report(tmp_path, capsys):
    options = ["--data", "digits", "--steps", 4, "--batch-size", 16, "--dim", 16, "--width", 32, "--val-every", 2]
    out = tmp_path / "run"
    assert command("train-clip", "--out", out, *options) == 0
    assert "digits: 4 steps, top1 " in capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    assert {"retrieval.png", "curves.png", "metrics.csv", "report.md", "checkpoint.pt", "best.pt"} <= names
    report = (out / "report.md").read_text()
    for text in (
        *(f"| {name} | 0." for name in FIGURES if name != "top5"),
        "choose among 10 classes: the ten digits",
        "1397 train, 200 val and 200 test images",
        "![curves](curves.png)",
        "![retrieval](retrieval.png)",
        "| image_encoder | mlp |",
        "| loss |",
        "| scale | 14.",
    ):
        assert text in report
    metrics = read_metrics(out / "metrics.csv")
    assert metrics["step"] == [1, 2, 3, 4] and {"loss", "scale", *(f"val_{name}" for name in FIGURES)} <= set(metrics)
    assert command("train-clip", "--out", out, *options) == 2
    assert "has a run already" in capsys.readouterr().err
    assert command("train-clip", "--out", out, "--resume") == 0
    assert "nothing was trained" in capsys.readouterr().out
    assert command("train-clip", "--out", out, "--resume", "--data", "digits", "--loss", "siglip") == 2
    assert "--loss: the run in" in capsys.readouterr().err
    assert command("train", "--out", out, "--resume") == 2
    assert "is of `fastloss train-clip`, expected one of `fastloss train`" in capsys.readouterr().err
    Trainer(small(out), quiet=True, overwrite=True)
    assert not (out / "report.md").exists() and not (out / "retrieval.png").exists()


def test_folders_take_convolutions_and_a_transformer(tmp_path):
    from PIL import Image

    for i in range(40):
        colour = ("red", "green", "blue", "white")[i % 4]
        Image.new("RGB", (20, 16), colour).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"a picture that is {colour}")
    options = {"data": f"folder:{tmp_path}", "val_percent": 20, "test_percent": 20, "size": 16, "steps": 2}
    trainer = trained(tmp_path / "run", **options, batch_size=8, chunk=3)
    assert trainer.config.encoders() == ("conv", "transformer") and trainer.figures["classes"] <= 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--loss", "softmax"], "--loss: expected one of ('clip', 'siglip'), got 'softmax'"),
        (["--data", "cifar"], "--data: expected glyphs, digits, folder:PATH or wds:SHARDS, got 'cifar'"),
        (["--chunk", "-1"], "--chunk: expected at least 0, got -1"),
        (["--dim", "20"], "--dim: expected a multiple of 16, got 20"),
        (["--size", "20"], "--size: expected a multiple of 8, got 20"),
        (["--shift", "12"], "--shift: expected less than half of the side 24, got 12"),
        (["--channels", "3"], "--channels: glyphs are grey, expected 1"),
        (["--max-scale", "nan"], "--max-scale: expected a finite number > 0, got nan"),
        (["--test-percent", "9"], "--val-percent: glyphs have fixed splits"),
        (["--resume", "--overwrite"], "--overwrite: expected one of --resume and --overwrite, got both"),
        (["--resume"], "--resume: no run to continue"),
        (["--data", "folder:/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_one_line(options, said, tmp_path, capsys):
    assert command("train-clip", "--out", tmp_path / "run", *options) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_checkpoints_of_another_recipe_or_model_are_refused(tmp_path, capsys):
    trainer = trained(tmp_path / "run", steps=1)
    content = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    for name, changed, said in (
        ("recipe", {"recipe": "train"}, "expected one of `fastloss train-clip`"),
        ("model", {"model": {"x": torch.ones(1)}}, "does not fit this version's run"),
        ("state", {"optimizer": None}, ""),
    ):
        path = tmp_path / name
        path.mkdir()
        rest = {key: value for key, value in (content | changed).items() if value is not None}
        save_checkpoint(path / "checkpoint.pt", rest)
        assert command("train-clip", "--out", path, "--resume", "--steps", 3) == 2
        assert (said or "has a model only, no training state") in capsys.readouterr().err
    assert trainer.step == 1
