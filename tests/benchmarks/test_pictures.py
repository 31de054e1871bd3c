"""The pictures: one look per provider, no mark behind another, whole texts, files that change where a figure did."""

from __future__ import annotations

import difflib
import re

import pytest

from benchmarks.harness import results
from benchmarks.report import accuracy, tables
from benchmarks.workloads.providers import ADAPTERS, INSTALL
from tests.benchmarks.test_benchmarks import sample

pytest.importorskip("matplotlib")

from benchmarks.report import look, pictures, scaling_picture  # noqa: E402


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws the pictures of rows; their texts by name."""
    errors = [dict.fromkeys(results.ERROR_COLUMNS, "") | dict(
        loss="clip_loss", options="{}", shape="8x8", dtype=dtype, inputs="late", provider=name, value_error="1e-8",
        gradient_error=error) for dtype in ("bfloat16", "float32")
        for name, error in (("fastloss", "2e-3"), ("eager", "inf"), ("open_clip", "0.0"))]  # fmt: skip

    def draw(rows):
        monkeypatch.setattr(pictures, "RESULTS", tmp_path)
        monkeypatch.setattr(tables, "_read", lambda device: tuple(rows) if device == "cpu" else ())
        monkeypatch.setattr(accuracy, "rows_of", lambda device: tuple(errors) if device == "cpu" else ())
        results.write(tmp_path / "cpu" / "scaling" / "pixel_loss.csv", rows)
        return {path.stem: path.read_text(encoding="utf8") for path in pictures.draw_all()}

    return draw


def long_sample():
    options = '{"pixel": [1, 0.8], "smoothness": [1, 0.1], "ssim": 0.2, "another": [0.0448, 0.2856]}'
    return [*sample(), *(r | {"loss": "image_loss", "options": options} for r in sample())]


def test_every_picture_has_its_text_as_text(drawn):
    found = drawn(long_sample())
    assert list(found) == ["speed", "memory", "roofline", "scaling", "accuracy"]
    assert all(text.startswith("<?xml") and "<dc:date>" not in text for text in found.values())
    words = {name: re.findall(r"<text[^>]*>([^<]*)</text>", text) for name, text in found.items()}
    for name in ("speed", "memory", "roofline"):
        assert "pixel_loss" in words[name] and "kornia" in words[name]
        whole = "pixel=(1, 0.8), smoothness=(1, 0.1), ssim=0.2, another=(0.0448, 0.2856), 8x3x32x32, float32"
        assert whole in " ".join(words[name])  # in several lines, none cut
    assert "ms, as a multiple of fastloss's (less is better)" in words["speed"]
    assert "MiB, as a multiple of fastloss's (less is better)" in words["memory"]
    assert "share of the ceiling (more is better)" in words["roofline"]
    assert {"ms", "pixels along a side"} <= set(words["scaling"])
    assert {"not finite", "share of the gradient's norm (less is better)"} <= set(words["accuracy"])


def test_a_new_measurement_changes_a_few_lines(drawn):
    before, same = drawn(long_sample()), drawn(long_sample())
    assert before == same
    rows = long_sample()
    rows[2] |= {"p50_ms": "1.1", "share": "0.4", "peak_mib": "3.3"}  # kornia, of one loss
    after = drawn(rows)
    for name in ("speed", "memory", "roofline"):
        lines = [a.splitlines() for a in (before[name], after[name])]
        changed = [line for line in difflib.unified_diff(*lines, n=0, lineterm="") if line[:1] in "+-"]
        assert 2 < len(changed) < 60, (name, len(changed))


def test_every_provider_has_a_look_of_its_own():
    known = {"fastloss", "eager", "torch.compile", *INSTALL, *(name for own in ADAPTERS.values() for name, *_ in own)}
    assert known <= set(look.LOOKS)
    assert len(set(look.LOOKS.values())) == len(look.LOOKS)
    assert look.look(["piq", "eager"]) == {name: look.LOOKS[name] for name in ("eager", "piq")}
    assert look.look(["new", "piq"])["piq"] == look.LOOKS["piq"]


def test_marks_that_would_hide_one_another_lie_in_lanes():
    marks = {"eager": 1.0, "fastloss": 1.01, "piq": 1.02, "kornia": 5.0}
    assert look.lanes(marks, 0.1) == {"fastloss": 0, "eager": 1, "piq": -1, "kornia": 0}
    assert set(look.lanes(dict.fromkeys("abcdefg", 1.0), 0.1).values()) == {0, 1, -1, 2, -2, 3, -3}


def test_axes_end_at_round_numbers():
    assert look.round_limits(0.53, 37) == (0.5, 50)
    assert look.round_limits(1.0, 100.0) == (1.0, 100.0)


def test_scaling_knows_what_it_changes():
    shapes = {"256x512": ("rows", 256), "8x3x64x64": ("side", 64), "2x4x128x128x64": ("tokens", 128)}
    shapes["4x64x32x32+4x128x16x16"] = ("side", 32)
    for shape, found in shapes.items():
        assert (scaling_picture.unit_of(shape), scaling_picture.size_of(shape)) == found
