"""The benchmark runner works, refuses what it should, and the README's table is what the result files say."""

from __future__ import annotations

import csv

import pytest
import torch

import fastloss
from benchmarks import measure, plot, run
from tests.cases import CASES, Draw

PIXEL = next(c for c in CASES if c.name == "pixel_loss")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(PIXEL.bench, "shapes", [(1, 3, 128, 128)])
    monkeypatch.setattr(PIXEL.bench, "options", [{"p": 1}])
    monkeypatch.setattr(run, "memory", lambda *a: "")
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 10.0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_run_writes_every_mode_and_provider(small, tmp_path):
    asked = ["pixel_loss", "--device", "cpu", "--seconds", "0", "--out", str(tmp_path), "--providers"]
    assert run.main([*asked, "eager", "fastloss"]) == 0
    with (tmp_path / "cpu" / "pixel_loss.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["mode"], r["provider"]) for r in rows] == [
        (m, p) for m in ("forward", "backward", "both") for p in ("eager", "fastloss")
    ]
    for r in rows:
        assert float(r["p20_ms"]) <= float(r["p50_ms"]) <= float(r["p80_ms"])
        per_element = {"forward": 8, "backward": 12, "both": 20}[r["mode"]]
        assert int(r["cost"]) == per_element * 3 * 128 * 128
        assert float(r["rate"]) == pytest.approx(int(r["cost"]) / float(r["p50_ms"]) / 1e6, abs=0.006, rel=0.01)


def test_a_wrong_provider_gets_no_time(small, tmp_path, monkeypatch):
    def off(image, image_pred, **options):
        return fastloss.pixel_loss(image, image_pred, **options) * 1.01

    def broken(*args, **options):
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(run, "providers", lambda case: {"eager": case.eager, "off": off, "broken": broken})
    run.main(["pixel_loss", "--device", "cpu", "--seconds", "0", "--out", str(tmp_path)])
    with (tmp_path / "cpu" / "pixel_loss.csv").open(newline="") as file:
        rows = {r["provider"]: r for r in csv.DictReader(file)}
    assert rows["eager"]["p50_ms"] and not rows["off"]["p50_ms"] and not rows["broken"]["p50_ms"]
    assert "relative error 1.0e-02" in rows["off"]["note"]
    assert rows["broken"]["note"] == "RuntimeError: out of memory, say"


def test_an_unknown_loss_is_named(capsys):
    with pytest.raises(SystemExit):
        run.main(["no_such_loss"])
    assert "no benchmark row for no_such_loss; there are pixel_loss" in capsys.readouterr().err


def test_quantiles():
    assert measure.quantiles([5.0, 1.0, 2.0, 3.0, 4.0]) == pytest.approx((1.8, 3.0, 4.2))


def test_the_readme_says_what_the_result_files_say():
    readme = (plot.ROOT / "README.md").read_text(encoding="utf8")
    assert plot.updated(readme) == readme, "run `python -m benchmarks.plot`"


def test_shapes_survive_the_result_file():
    for shape in ((8, 3, 512, 512), (5,), ((4, 64, 8, 8), (4, 128, 4, 4))):
        assert run.shape_of(run.shape_text(shape)) == shape
    assert run.shape_text(((4, 64, 8, 8), (4, 128, 4, 4))) == "4x64x8x8+4x128x4x4"


def test_all_layers_of_a_list_are_differentiated():
    case = next(c for c in CASES if c.name == "feature_distance")
    args = case.make(Draw(), case.shapes[0])
    assert [g.shape for g in run.modes(case, case.fn, args, {})["both"]()] == [t.shape for t in args[1]]
