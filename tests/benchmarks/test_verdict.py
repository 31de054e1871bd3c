"""What `fastloss bench` prints, where it writes, and that an installed package has all it needs."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import run
from benchmarks.harness import measure, results
from benchmarks.report import tables, verdict
from tests.benchmarks.test_benchmarks import SMALL, small  # noqa: F401


def rows(**times):
    """Rows of all modes; a time of both directions per provider, a third of it forward. A text is a note."""
    found = []
    for mode, share in (("forward", 1 / 3), ("backward", 2 / 3), ("both", 1.0)):
        for name, time in times.items():
            row = dict.fromkeys(results.COLUMNS, "") | dict(loss="pixel_loss", options='{"p": 1}', shape="8x3x8x8")
            row |= dict(dtype="float32", mode=mode, provider=name.replace("_", "."))
            if isinstance(time, str):
                found += [row | {"note": time}] if mode == "both" else []
                continue
            p20, p50, p80 = (f"{share * time * f:.4f}" for f in (0.9, 1.0, 1.1))
            found.append(row | dict(p20_ms=p20, p50_ms=p50, p80_ms=p80, error="1e-07", peak_mib="3.0"))
    return found


def test_standing_counts_rows_that_have_another(monkeypatch):
    """One row faster by more than 5 %, one level from each side, one slower, one with nobody else."""
    cases = [(5.0, 6.0), (5.0, 5.1), (5.1, 5.0), (6.0, 5.0)]
    found = [row | {"shape": str(i)} for i, (ours, other) in enumerate(cases) for row in rows(fastloss=ours, piq=other)]
    found += [row | {"shape": "alone"} for row in rows(fastloss=5.0)]
    monkeypatch.setattr(tables, "rows_of", lambda device, *modes: [row for row in found if row["mode"] in modes])
    assert tables.standing("cpu") == (
        "of 4 rows with another to compare with, fastloss is faster than all by more than 5% in 1, within 5% of the "
        "fastest in 2, slower in 1"
    )


def test_an_unknown_provider_is_named(capsys):
    with pytest.raises(SystemExit):
        run.parse(["pixel_loss", "--providers", "fastloss,eager"])
    assert "--providers: no fastloss,eager; with spaces between them, of fastloss, eager" in capsys.readouterr().err


def test_a_verdict_is_a_sentence():
    found = rows(eager=9.5, torch_compile=6.0, fastloss=5.0, piq=5.1, kornia="absent: no module", other=4.0)
    said = verdict.verdict(found)
    assert said == (
        "pixel_loss p=1, 8x3x8x8, float32: fastloss takes 5 ms, 1.9x as fast as eager, 1.2x as fast as torch.compile, "
        f"level with {verdict.with_version('piq')}, slower than other (0.80x as fast)"
    )
    assert verdict.verdict(rows(eager=2.0, fastloss="wrong: by far")) == (
        "pixel_loss p=1, 8x3x8x8, float32: fastloss has no time, wrong: by far"
    )
    assert verdict.verdict(rows(fastloss=2.0)).endswith("fastloss takes 2 ms; nothing to compare with")


def test_the_table_has_a_line_per_provider():
    title, eager, ours, absent = verdict.table_of(rows(eager=9.0, fastloss=6.0, kornia="absent: no module"))
    assert title.split() == "provider forward backward both, ms of ours peak MiB error".split()
    assert eager.split() == ["eager", "3", "6", "9", "1.50x", "3.0", "1e-07"]
    assert ours.split() == ["fastloss", "2", "4", "6", "1.00x", "3.0", "1e-07"]
    assert absent.split() == ["kornia", "absent:", "no", "module"]


def test_a_library_is_named_with_its_version():
    assert verdict.with_version("eager") == "eager"
    pytest.importorskip("piq")
    assert verdict.with_version("piq").startswith("piq 0.")


@pytest.mark.parametrize(
    ("load", "cores", "warned"), [(0.4, 2, False), (0.6, 2, True), (3.9, 16, False), (5, 16, True)]
)
def test_a_busy_machine_is_named(load, cores, warned):
    said = verdict.busy(load, cores)
    assert bool(said) == warned and (not warned or f"(load average {load:.1f} on {cores} cores)" in said)


def test_nothing_is_written_without_out(small, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "busy", lambda: "warning: busy")
    before = {path: path.stat().st_mtime_ns for path in results.RESULTS.rglob("*")}
    assert run.main(["pixel_loss", *SMALL, "--providers", "eager", "fastloss"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in results.RESULTS.rglob("*")} == before
    said = capsys.readouterr().out
    assert said.count("warning: busy") == 2 and said.endswith("no file written; --out FOLDER keeps the rows\n")
    assert said.count("pixel_loss p=1, 1x3x128x128, float32: fastloss takes ") == 2


def test_make_bench_alone_writes_the_results_of_the_project():
    lines = (measure.ROOT / "Makefile").read_text().splitlines()
    assert [line for line in lines if "benchmarks.run" in line and "--out benchmarks/results" in line]


def test_a_wheel_has_what_bench_needs(tmp_path):
    """As built, beside folders of the user's that have the names of ours, and without the extras."""
    if not (measure.ROOT / "setup.py").is_file():
        pytest.skip("not a checkout")
    lib, home = tmp_path / "lib", tmp_path / "home"
    build = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path), "build_py", "--build-lib", str(lib)]
    subprocess.run(build, cwd=measure.ROOT, check=True, capture_output=True)
    for name in ("benchmarks", "tests"):
        (home / name).mkdir(parents=True)
        (home / name / "__init__.py").write_text("raise ImportError('the wrong one')\n")
    code = "import sys; sys.modules |= dict.fromkeys(('pytest', 'typer', 'hypothesis', 'matplotlib')); "
    code += "from fastloss.cli import main; main()"
    options = ["bench", "smoothness_loss", "--device", "cpu", "--sizes", "1x1x8x8", "--seconds", "0"]
    done = subprocess.run(
        [sys.executable, "-c", code, *options, "--providers", "eager", "fastloss", "--out", "found"],
        cwd=home, env=os.environ | {"PYTHONPATH": str(lib)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "smoothness_loss p=2, 1x1x8x8, float32: fastloss takes " in done.stdout
    (path,) = pathlib.Path(home, "found", "cpu").glob("*.csv")
    found = results.read(path)
    assert len(found) == 3 * 3 * 2 and {r["commit"].split("-")[0] for r in found} == {"fastloss"}
