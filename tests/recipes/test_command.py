"""The command itself: `python -m fastloss`, version, completion, a help without torch; types in a user's project."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("typer")

import fastloss  # noqa: E402

ROOT = Path(fastloss.__file__).parents[1]


def run(*arguments, **environment):
    """A process of its own, as a user starts it."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths, "COLUMNS": "100", "NO_COLOR": "1"} | environment
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def seconds(*arguments):
    """CPU seconds of a process, user and system, which other processes of a busy machine hardly change."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_takes_less_than_a_second_and_no_torch():
    idle = min(seconds("-c", "pass") for _ in range(2))
    assert min(seconds("-m", "fastloss", "train", "--help") for _ in range(2)) - idle < 1
    for arguments in (["--help"], ["train", "--help"], ["train-clip", "--help"], ["sample", "--help"]):
        code = (
            "import atexit, runpy, sys\n"
            f"sys.argv = ['fastloss', *{arguments!r}]\n"
            "atexit.register(lambda: print('torch' in sys.modules, 'matplotlib' in sys.modules))\n"
            "from fastloss.cli import main; main()\n"
        )
        assert run("-c", code).stdout.splitlines()[-1] == "False False"


def test_help_is_for_users_and_options_are_grouped():
    out = run("-m", "fastloss", "--help").stdout
    assert "Usage: fastloss [OPTIONS] COMMAND" in out and "--version" in out and "--install-completion" in out
    assert "implement" not in out and "imported" not in out and "exit code" not in out
    out = run("-m", "fastloss", "train", "--help").stdout
    order = [out.index(f"─ {group} ─") for group in ("Run", "Data", "Losses", "Optimiser", "Model", "Speed")]
    assert order == sorted(order)
    places = [
        out.index(option) for option in ("--overwrite", "--val-percent", "--weighting", "--warmup", "--dim", "--amp")
    ]
    assert all(group < place for group, place in zip(order, places, strict=True))
    assert all(place < group for place, group in zip(places, order[1:], strict=False))


def test_version_needs_neither_typer_nor_torch():
    assert run("-m", "fastloss", "--version").stdout == f"fastloss {fastloss.__version__}\n"
    code = (
        "import sys; sys.argv = ['fastloss', '--version']; sys.modules['typer'] = None; sys.modules['torch'] = None\n"
    )
    assert run("-c", code + "from fastloss.cli import main; main()").stdout == f"fastloss {fastloss.__version__}\n"


def test_commands_options_and_choices_are_completed():
    def completed(words, at):
        return run("-m", "fastloss", _FASTLOSS_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(at)).stdout

    assert completed("fastloss t", 1).split() == ["train", "train-clip", "tune"]
    assert "--overwrite" in completed("fastloss train --ov", 2).split()
    assert completed("fastloss train --weighting re", 3).split() == ["relobralo"]


def test_the_command_has_all_that_an_import_has():
    """The package whose losses come with the first name asked for, and the one that has them from the start."""
    code = (
        "import sys, json, fastloss\n"
        "lazy = 'torch' not in sys.modules\n"
        "from fastloss import core, pixel_loss\n"
        "names = sorted(fastloss.__all__)\n"
        "assert all(hasattr(fastloss, name) for name in names) and not hasattr(fastloss, 'no_such_loss')\n"
        "assert fastloss.image is sys.modules['fastloss.image'] and fastloss.pixel_loss is pixel_loss\n"
        "print(json.dumps([lazy, names]))\n"
    )
    command = run("-c", "import sys; sys.argv = ['/usr/bin/fastloss', 'train']\n" + code)
    imported = run("-c", code)
    assert command.stdout.startswith("[true, ") and imported.stdout.startswith("[false, "), command.stderr
    assert command.stdout.split(", ", 1)[1] == imported.stdout.split(", ", 1)[1]


def test_py_typed_is_packaged():
    setuptools = pytest.importorskip("setuptools")
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("no checkout")
    before = os.getcwd()
    try:
        os.chdir(ROOT)
        distribution = setuptools.Distribution()
        distribution.parse_config_files()
    finally:
        os.chdir(before)
    assert distribution.package_data["fastloss"] == ["py.typed"] and (ROOT / "fastloss" / "py.typed").is_file()


USERS_PROJECT = """
    import torch
    from torch import Tensor

    import fastloss
    from fastloss import ClipLoss, ContrastiveLoss, ContrastiveOutput, NegativeSampling, PerceptualLoss, PixelLoss
    from fastloss import clip_loss, info_nce, pixel_loss, ssim_loss, supcon_loss

    contrast, perceptual = ContrastiveLoss(temp=0.1), PerceptualLoss(lambda x: [x], normalize=False)
    mae, clip = PixelLoss(1), ClipLoss()


    def step(text: Tensor, image: Tensor, image_pred: Tensor, scale: float) -> Tensor:
        total = contrast(text, image) + 0.1 * perceptual(image, image_pred) + pixel_loss(image, image_pred, p="mae")
        with fastloss.use_backend("reference"):
            total = total + ssim_loss(image, image_pred, reduction="mean")
        total = total + mae(image, image_pred) + clip(text, image, scale)
        total = total + pixel_loss(input=image_pred, target=image, reduction="sum")
        value = clip_loss(text, image, logit_scale=scale)
        full = info_nce(text, image, temperature=0.1, return_lse=True, sampling=NegativeSampling(hardness=0.5))
        hits: Tensor = full.top1
        result: Tensor = total + value + full.loss + supcon_loss(text.reshape(-1, 2, 8)) + hits.sum()
        return result


    def either(text: Tensor, image: Tensor, more: bool) -> Tensor | ContrastiveOutput:
        return clip_loss(text, image, logit_scale=1.0, return_lse=more)


    reveal_type(pixel_loss(torch.ones(1), torch.ones(1)))
    reveal_type(info_nce(torch.ones(1), torch.ones(1), return_lse=True))
    reveal_type(contrast)
    pixel_loss(torch.ones(1), torch.ones(1), reduktion="mean")
    info_nce(torch.ones(1), torch.ones(1), temprature=0.1)
    """


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["mypy", "basedpyright"])
def test_type_checkers_accept_a_users_project(checker, tmp_path):
    """All of it but the two misspelt options; what a call returns is known, with return_lse=True too."""
    pytest.importorskip(checker)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "fastloss").symlink_to(ROOT / "fastloss")
    text = textwrap.dedent(USERS_PROJECT)
    (tmp_path / "user.py").write_text(text)
    config = {"include": ["user.py"], "extraPaths": ["site"], "typeCheckingMode": "standard"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    options = {
        "mypy": ["--strict", "--follow-imports=silent", "--cache-dir", str(tmp_path / "cache")],
        "basedpyright": ["--pythonpath", sys.executable],
    }
    done = subprocess.run(
        [sys.executable, "-m", checker, *options[checker], "user.py"],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"MYPYPATH": str(tmp_path / "site")},
    )  # fmt: skip
    said = [re.search(r"user\.py:(\d+)[:\d]*:?(?: -)? (\w+): ?(.*)", line) for line in done.stdout.splitlines()]
    found = [(text.splitlines()[int(m[1]) - 1], m[2], m[3]) for m in said if m]
    errors = [line for line, kind, _ in found if kind == "error"]
    assert [re.search("reduktion|temprature", line) is not None for line in errors] == [True, True], done.stdout
    types = [words for line, kind, words in found if line.startswith("reveal_type") and kind != "error"]
    for name, words in zip(("Tensor", "ContrastiveOutput", "ContrastiveLoss"), types, strict=True):
        assert name in words, done.stdout
