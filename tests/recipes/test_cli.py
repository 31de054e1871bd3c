"""The command line: every command end to end at a small size, and one clear line for every mistake."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from fastloss import cli  # noqa: E402
from fastloss.recipes.training.metrics import Metrics, read_metrics  # noqa: E402

SMALL = ["--steps", "4", "--batch-size", "16", "--dim", "16", "--depth", "1", "--val-every", "2", "--device", "cpu"]


def call(capsys, *arguments):
    """Exit code, standard output and standard error of a command."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in arguments])
    got = capsys.readouterr()
    return end.value.code, got.out, got.err


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--out", str(folder), *SMALL])
    assert end.value.code == 0
    return folder


def test_info(capsys):
    code, out, _ = call(capsys, "info")
    assert code == 0
    assert "backend reference: available" in out and "torch 2." in out and "backend triton:" in out


def test_bench_hands_its_options_on(capfd):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "no_such_loss", "--device", "cpu"])
    assert stopped.value.code == 2
    assert "no benchmark row for no_such_loss; there are " in capfd.readouterr().err


def test_train_leaves_all_its_files(run_folder):
    names = {p.name for p in run_folder.iterdir()}
    assert {"samples.png", "curves.png", "metrics.csv", "report.md", "checkpoint.pt", "best.pt"} <= names
    assert not any(name.startswith(".") for name in names)
    metrics = read_metrics(run_folder / "metrics.csv")
    assert metrics["step"] == [1, 2, 3, 4]
    assert {"loss", "contrastive", "perceptual", "pixel", "learning_rate", "samples_per_second"} <= set(metrics)
    report = (run_folder / "report.md").read_text()
    assert "accuracy" in report and "samples.png" in report and "| steps | 4 |" in report
    assert "| batch_size | 16 |" in report and "| tokenizer | word |" in report and "| backbones | digits |" in report
    assert "auto" not in report and "means of the first and of the last 2 steps" in report
    for name, n in (("score", 200), ("accuracy", 400), ("grid_accuracy", 270), ("ssim", 200), ("frechet", 200)):
        row = next(line for line in report.splitlines() if line.startswith(f"| {name} |")).split("|")
        assert row[5].strip() == f"{n}" and row[7].strip()
    assert [step for step, v in zip(metrics["step"], metrics["val_score"], strict=True) if v == v] == [2, 4]
    assert (run_folder / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_resume_with_more_steps(run_folder, capsys):
    code, out, _ = call(capsys, "train", "--out", run_folder, "--resume", "--steps", "6")
    assert code == 0 and "digits: 6 steps" in out.splitlines()[-1]
    assert read_metrics(run_folder / "metrics.csv")["step"] == [1, 2, 3, 4, 5, 6]


def test_sample(run_folder, tmp_path, capsys):
    out = tmp_path / "new" / "x.png"
    captions = ["--captions", "a bold handwritten seven upright", "--caption", "a dog"]
    code, text, _ = call(capsys, "sample", "--checkpoint", run_folder, *captions, "--count", "2", "--out", out)
    assert code == 0 and "2 captions x 2 images" in text
    plain = out.read_bytes()
    assert plain.startswith(b"\x89PNG")
    for name in ("picture", "picture.v2"):  # the name is kept, whatever matplotlib makes of it
        kept = tmp_path / "names" / name
        code, text, _ = call(capsys, "sample", "--checkpoint", run_folder, *captions, "--count", "2", "--out", kept)
        assert code == 0 and text.endswith(f"-> {kept}\n") and kept.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in kept.parent.iterdir()} == {"picture", "picture.v2"}
    jpeg = tmp_path / "x.jpg"
    code, _, _ = call(capsys, "sample", "--checkpoint", run_folder, *captions, "--count", "2", "--out", jpeg, "--real")
    assert code == 0 and jpeg.read_bytes().startswith(b"\xff\xd8")
    from PIL import Image

    with Image.open(jpeg) as wide, Image.open(out) as narrow:  # a column more
        assert wide.width - narrow.width == 80 and wide.height == narrow.height


def test_tune_is_resumable(tmp_path, capsys):
    pytest.importorskip("optuna")
    small = [*SMALL, "--out", str(tmp_path), "--weights", "perceptual=0"]
    code, out, _ = call(capsys, "tune", "--trials", "1", *small)
    assert code == 0 and "best of 1 trials" in out
    code, out, _ = call(capsys, "tune", "--trials", "2", *small)
    assert code == 0 and out.count("trial 1: score") == 1 and "best of 2 trials" in out and "(n 200)" in out
    assert "perceptual=0" in out and "contrastive=" in out
    report = (tmp_path / "tune.md").read_text()
    assert "2 trials of 4 steps." in report and "standard errors" in report and "less mae" in report
    table = [line for line in report.splitlines() if line.startswith(("| 0 |", "| 1 |"))]
    assert len(table) == 2 and table[0].split("|")[5].strip() == "best" and "| 200 |" in table[0]
    assert (tmp_path / "tune.png").read_bytes().startswith(b"\x89PNG")
    before = {path.name for path in tmp_path.iterdir()}
    code, _, err = call(capsys, "tune", "--trials", "1", *small, "--steps", "5")
    assert code == 2 and f"--out: {tmp_path} has the trials of another search, of digits-32-4; wanted" in err
    (tmp_path / "tune.db").unlink()
    code, _, err = call(capsys, "tune", "--trials", "1", *small)
    assert code == 2 and "another search, without their tune.db" in err
    assert {path.name for path in tmp_path.iterdir()} == before - {"tune.db"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--temperature", "nan"], "error: --temperature: expected a finite number > 0"),
        (["train", "--learning-rate", "0"], "error: --learning-rate: expected a finite number > 0, got 0.0"),
        (["train", "--lr", "inf"], "error: --learning-rate: expected a finite number > 0, got inf"),
        (["train", "--val-every", "0"], "error: --val-every: expected at least 1, got 0"),
        (["train", "--data", "cats"], "error: --data: expected digits"),
        (["train", "--data", "folder:/no/such"], "error: --data: expected a folder of images, got '/no/such'"),
        (["train", "--weights", "pixel=-1"], "error: --weights: pixel needs a finite weight >= 0"),
        (["train", "--val-percent", "0"], "error: --val-percent: expected at least 1, got 0"),
        (["train", "--val-percent", "20"], "error: --val-percent: the digits have fixed splits"),
        (["train", "--data", "wds:/no/such/*.tar"], "error: --data: expected shards, a folder"),
        (["tune", "--trials", "0"], "error: --trials: expected at least 1, got 0"),
        (["sample", "--caption", " "], "error: --caption: expected words, got ' '"),
        (["train", "--device", "cuda:77"], "error: --device: 'cuda:77' cannot be used"),
        (["train", "--device", "toaster"], "error: --device: 'toaster'"),
        (
            ["train", "--backbones", "vgg16", "--backbone-weights", "/no/such.pth"],
            "error: --backbone-weights: there is no weights file '/no/such.pth'",
        ),
        (["train", "--resume"], "error: --resume: no run to continue"),
        (["sample", "--checkpoint", "/no/such/run", "--caption", "a"], "error: --checkpoint: /no/such/run does not"),
        (["sample"], "error: --caption: expected at least one"),
        (["sample", "--caption", "a", "--count", "0"], "error: --count: expected at least 1, got 0"),
    ],
)
def test_mistakes_end_with_one_line(arguments, message, tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    code, _, err = call(capsys, *arguments, *out)
    assert code == 2
    assert message in err and len(err.strip().splitlines()) == 1 and "Traceback" not in err


def test_every_option_that_a_message_names_is_there():
    """`--word` in the text of the training system is an option of train, tune or sample."""
    import typer.main

    app = typer.main.get_command(cli.make_app())
    there = {
        option
        for command in (app, *app.commands.values())
        for p in command.params
        for option in (*p.opts, *p.secondary_opts)
    }
    assert {"--learning-rate", "--lr", "--batch-size", "--resume", "--captions"} <= there
    named = {}
    for path in (Path(cli.__file__), *Path(cli.__file__).with_name("recipes").rglob("*.py")):
        for literal in (n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)):
            if isinstance(literal, str):
                named |= {option: path.name for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", literal)}
    assert "--out" in named
    assert {option: file for option, file in named.items() if option not in there | {"--help", "--"}} == {}


def test_a_loss_that_is_not_finite_names_the_learning_rate(tmp_path):
    metrics = Metrics(tmp_path, ["pixel"], 0, tensorboard=False)
    metrics.add(1, torch.tensor([float("nan"), 0.0]), 0.1, 8)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1; try a lower --learning-rate$"):
        metrics.flush()
    metrics.close()


def test_a_failed_download_names_the_command_lines_option():
    """The words of PerceptualLoss, in which the command line's own stand for the arguments of Python."""
    message = "pretrained: no route. Pass pretrained=PATH to that file fetched elsewhere, pretrained=False for random"
    assert cli._in_options(message, ["backbone_weights"]) == (
        "--backbone-weights: no route. Pass --backbone-weights PATH of that file fetched elsewhere, "
        "--backbone-weights random for random"
    )


def test_unwritable_folder_and_corrupt_checkpoint(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("in the way")
    code, _, err = call(capsys, "train", "--out", file / "run")
    assert code == 2 and "cannot write to" in err
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04")
    for arguments in (["train", "--resume", "--out", tmp_path], ["sample", "--caption", "a", "--checkpoint", tmp_path]):
        code, _, err = call(capsys, *arguments)
        assert code == 2 and "is corrupt or no checkpoint" in err


def test_unknown_option_and_command(capsys):
    for arguments in (["train", "--stepps", "3"], ["trian"]):
        code, _, err = call(capsys, *arguments)
        assert code == 2 and "No such" in err


def test_without_typer_the_message_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; from fastloss.cli import main; main([{!r}])"
    done = subprocess.run([sys.executable, "-c", code.format("train")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "typer is missing" in done.stderr and 'pip install ".[train]" in its checkout' in done.stderr
    done = subprocess.run([sys.executable, "-c", code.format("info")], capture_output=True, text=True)
    assert done.returncode == 0 and "backend reference: available" in done.stdout
