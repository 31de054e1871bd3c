"""Without the C++ kernels: the wheel's tag says so, one warning says so, and nothing else changes."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]
needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="runs in a checkout")

CALLS = """
import warnings
import torch
import fastloss
from fastloss import core
from fastloss.cli import info_lines

image, pred = torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), 0.5)

def said(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert abs(float(call()) - 0.25) < 1e-6
    return [str(w.message) for w in caught if "fastloss" in str(w.message)]

def forced():
    with core.use_backend("reference"):
        return fastloss.pixel_loss(image, pred)

compiled = torch.compile(lambda: fastloss.pixel_loss(image, pred), fullgraph=True, backend="eager")
for call in (forced, compiled, lambda: fastloss.pixel_loss(image.double(), pred.double())):
    assert said(call) == [], said(call)
first = said(lambda: fastloss.pixel_loss(image, pred))
assert said(lambda: fastloss.pixel_loss(image, pred)) == []
print(len(first), *first)
print(*info_lines(), sep="\\n")
"""


def copy_package(to: pathlib.Path) -> pathlib.Path:
    """The package as a wheel without kernels has it."""
    left_out = shutil.ignore_patterns("_C*.so", "__pycache__", "digits_backbone.safetensors")
    shutil.copytree(ROOT / "fastloss", to / "fastloss", ignore=left_out)
    return to


def run_calls(folder: pathlib.Path, **environment: str) -> list[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FASTLOSS_", "TRITON_"))}
    done = subprocess.run([sys.executable, "-c", CALLS], cwd=folder, capture_output=True, text=True,
                          env=clean | {"PYTHONPATH": str(folder)} | environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_one_warning_and_info_say_that_the_kernels_are_missing(tmp_path):
    first, *info = run_calls(copy_package(tmp_path))
    assert first.startswith("1 fastloss runs on PyTorch operators on the CPU")
    why = next(line for line in info if line.startswith("backend cpp: ")).removeprefix("backend cpp: ")
    assert why in first and "install one, e.g. g++, and run `pip install --no-build-isolation" in why
    assert "FASTLOSS_BACKEND=reference" in first and "use_backend('reference')" in first


def test_a_forced_reference_is_silent(tmp_path):
    assert run_calls(copy_package(tmp_path), FASTLOSS_BACKEND="reference")[0] == "0"


def test_another_build_of_the_kernels_is_loaded_by_its_path(tmp_path):
    first, *info = run_calls(copy_package(tmp_path), FASTLOSS_EXTENSION="/no/such/_C.so")
    assert first.startswith("1 ") and "/no/such/_C.so does not load: " in first
    built = sorted((ROOT / "fastloss").glob("_C*.so"))
    if built:
        first, *info = run_calls(tmp_path, FASTLOSS_EXTENSION=str(built[0]))
        assert first == "0" and "backend cpp: available" in info


# Wheels: of this setup.py and one C++ file, which is all that a tag depends on


def wheel(folder: pathlib.Path, source: str, **environment: str) -> tuple[list[str], list[str], str]:
    """Names of the wheels built, files in them, and what was printed."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "fastloss").mkdir(exist_ok=True)
    for name in ("__init__.py", "_version.py"):
        (folder / "fastloss" / name).write_text("" if name == "__init__.py" else (ROOT / "fastloss" / name).read_text())
    (folder / "csrc").mkdir(exist_ok=True)
    (folder / "csrc" / "one.cpp").write_text(source)
    shutil.rmtree(folder / "dist", ignore_errors=True)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FASTLOSS_")}
    done = subprocess.run([sys.executable, "setup.py", "-q", "bdist_wheel"], cwd=folder, capture_output=True, text=True,
                          env=clean | environment)  # fmt: skip
    wheels = sorted((folder / "dist").glob("*.whl"))
    assert bool(wheels) == (done.returncode == 0), done.stderr
    files = [name for path in wheels for name in zipfile.ZipFile(path).namelist()]
    return [path.name for path in wheels], files, done.stdout + done.stderr


NO_COMPILER = {"CXX": "/no/such/compiler", "CC": "/no/such/compiler"}
PURE = "fastloss-0.1.0-py3-none-any.whl"


@needs_sources
@pytest.mark.slow
def test_the_tag_of_a_wheel_says_whether_it_has_kernels(tmp_path):
    if shutil.which(os.environ.get("CXX", "c++")) is not None:
        names, files, _ = wheel(tmp_path, 'extern "C" int one() { return 1; }')
        assert len(names) == 1 and names[0].startswith("fastloss-0.1.0-cp310-abi3-linux_") and PURE not in names
        assert "fastloss/_C.abi3.so" in files
        # a source that does not compile: what an earlier build left is not taken for it
        names, files, said = wheel(tmp_path, "#error not this one")
        assert names == [PURE] and not [name for name in files if name.endswith(".so")]
        assert "no C++ kernels" in said and "fastloss/_version.py" in files
    names, files, said = wheel(tmp_path, "", **NO_COMPILER)
    assert names == [PURE] and not [name for name in files if name.endswith(".so")] and "no C++ kernels" in said


@needs_sources
@pytest.mark.slow
def test_a_wheel_without_compiler_and_ninja_is_pure_or_refused(tmp_path):
    bare = NO_COMPILER | {"PATH": str(tmp_path)}  # without ninja, setuptools builds, and fails, in another way
    names, files, said = wheel(tmp_path, "", **bare)
    assert names == [PURE] and not [name for name in files if name.endswith(".so")] and "no C++ kernels" in said
    names, _, said = wheel(tmp_path, "", **bare, FASTLOSS_REQUIRE_CPP="1")
    assert names == [] and "/no/such/compiler" in said
