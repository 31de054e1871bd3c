"""Triton without a GPU: the conformance tests on interpreted kernels, and launches compiled ahead of time.

Each runs in a process of its own, since TRITON_INTERPRET decides what `@triton.jit` makes at import. Each kernel is
compiled once for each target here; `make aot` compiles all launches. Of the tests on interpreted kernels every other
one runs here; `make interpret` (FASTLOSS_INTERPRET=all) runs all.
`make triton36` puts Triton 3.6 beside the installed one; FASTLOSS_TRITON36 names its directory.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from tests import ROOT, kernel_files

OLDER = os.environ.get("FASTLOSS_TRITON36") or str(ROOT / ".venv" / "triton36")

# Of the targets those that most people have; `make aot` has them all.
CHECKED = ("sm_90", "sm_80", "gfx942")
OF_OLDER = ("sm_90",)  # CI has no time for more

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_older = pytest.mark.skipif(
    not pathlib.Path(OLDER, "triton").is_dir(),
    reason="triton 3.6 is absent: `make triton36`, or name its directory in FASTLOSS_TRITON36",
)


def python(*args: str, **environment: str) -> str:
    """Output of a Python process in the repository root; its end is the message if it fails."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTLOSS_BACKEND")}
    done = subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=kept | environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("path", [pytest.param("", id="installed"), pytest.param(OLDER, id="3.6", marks=needs_older)])
def test_every_launch_compiles_ahead_of_time(path):
    before = [p for p in (path, os.environ.get("PYTHONPATH")) if p]
    options = ("--each", "1", "--targets", *(OF_OLDER if path else CHECKED))
    output = python("-m", "tests.triton.aot", *options, PYTHONPATH=os.pathsep.join(before))
    print(output)
    if path:
        assert output.startswith("triton 3.6.")


EVERY_OTHER = () if os.environ.get("FASTLOSS_INTERPRET") == "all" else ("-p", "tests.deal", "--deal", "0/2")
KERNELS = kernel_files()
CONTRASTIVE = [name for name in KERNELS if name.startswith("tests/contrastive/")]
IMAGE = [name for name in KERNELS if name.startswith("tests/image/")]
WORDS = "info_nce or clip_loss or siglip or xent or supcon"
PARTS = {  # parts for workers beside each other: the interpreter takes a minute or two for each
    "ssim": ["tests/conformance/test_every_loss.py", "-k", "ssim"],
    "image kernels": IMAGE,
    "other losses": ["tests/conformance/test_every_loss.py", "-k", f"not ({WORDS} or ssim)"],
    "contrastive losses": ["tests/conformance/test_every_loss.py", "-k", WORDS],
    "edges of images": ["tests/conformance/test_edges.py", "-k", "pixel or smoothness or image or ssim"],
    "edges of others": ["tests/conformance/test_edges.py", "-k", "not (pixel or smoothness or image or ssim)"],
    "contrastive kernels": CONTRASTIVE,
    "drawn calls": ["tests/fuzz/test_fuzz.py"],
    "other kernels": [name for name in KERNELS if name not in (*CONTRASTIVE, *IMAGE)],
}


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("part", PARTS)
def test_interpreted_kernels(part):
    plugins = ["-p", "tests.triton.interpreter", "-p", "no:cacheprovider"]
    options = (*plugins, *EVERY_OTHER, *PARTS[part])
    output = python("-m", "pytest", "-q", *options, TRITON_INTERPRET="1", FASTLOSS_BACKEND="triton")
    assert " passed" in output
