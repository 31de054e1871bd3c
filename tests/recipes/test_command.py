"""The command itself: `python -m fastloss`, version, completion, a help without torch; types in a user's project."""

from __future__ import annotations

import os
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
    for arguments in (["--help"], ["train", "--help"], ["sample", "--help"]):
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

    assert completed("fastloss t", 1).split() == ["train", "tune"]
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


@pytest.mark.slow
def test_mypy_accepts_a_users_project(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "fastloss").symlink_to(ROOT / "fastloss")
    (tmp_path / "user.py").write_text(
        textwrap.dedent(
            """
            import torch
            from torch import Tensor

            import fastloss
            from fastloss import ContrastiveLoss, PerceptualLoss, clip_loss, pixel_loss, ssim_loss

            contrast, perceptual = ContrastiveLoss(temp=0.1), PerceptualLoss(lambda x: [x], normalize=False)


            def step(text: Tensor, image: Tensor, image_pred: Tensor, scale: float) -> Tensor:
                total = contrast(text, image) + 0.1 * perceptual(image, image_pred) + pixel_loss(image, image_pred)
                with fastloss.use_backend("reference"):
                    total = total + ssim_loss(image, image_pred, reduction="mean")
                value = clip_loss(text, image, logit_scale=scale)
                assert isinstance(value, Tensor)  # with return_lse it is more
                result: Tensor = total + value
                return result


            reveal_type(pixel_loss(torch.ones(1), torch.ones(1)))
            reveal_type(contrast)
            pixel_loss(torch.ones(1), torch.ones(1), reduktion="mean")
            """
        )
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--no-error-summary",
         "--cache-dir", str(tmp_path / "cache"), "user.py"],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"MYPYPATH": str(tmp_path / "site")},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert [line for line in lines if ": error:" in line and "reduktion" not in line] == [], done.stdout + done.stderr
    assert any("Revealed type is" in line and "Tensor" in line for line in lines)
    assert any("ContrastiveLoss" in line for line in lines)
    assert any('Unexpected keyword argument "reduktion"' in line for line in lines)
