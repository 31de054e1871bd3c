"""Errors against float64: what they are, on which inputs, and what the tables make of them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks import accuracy
from benchmarks.harness import errors
from benchmarks.harness.results import ERROR_COLUMNS, read, write
from benchmarks.report import accuracy as tables
from benchmarks.report import explanations, pages
from benchmarks.workloads import states
from tests.conformance.cases import CASES

ROW = dict.fromkeys(ERROR_COLUMNS, "") | dict(
    loss="clip_loss", options='{"logit_scale": 14.3}', shape="512x128", dtype="bfloat16", inputs="late",
    provider="fastloss", value_error="1.0e-08", gradient_error="2.4e-03", device="a cpu", commit="abc", torch="2",
)  # fmt: skip


def state(loss, name, **more):
    return next(s for s in states.states([loss], **more) if s.name == name)


def cosines(query, key):
    return F.normalize(query.double(), dim=1) @ F.normalize(key.double(), dim=1).T


def test_every_loss_of_the_benchmarks_has_states():
    assert {c.name for c in CASES if c.bench} <= set(states.TABLE)
    assert {s.case.name.split()[0] for s in states.states()} == {c.name.split()[0] for c in CASES}


@pytest.mark.parametrize(
    ("name", "paired", "strangers"),
    [("fresh", 0.0, 0.0), ("late", 0.99, 0.0), ("scale 100", 0.3, 0.0), ("anisotropic", 0.99, 0.9)],
)
def test_pairs_and_strangers_are_at_their_cosines(name, paired, strangers):
    found = cosines(*state("info_nce", name).inputs())
    off = found - torch.diag(found.diagonal())
    assert found.diagonal().numpy() == pytest.approx(paired, abs=1e-6 if name != "anisotropic" else 0.02)
    assert off.sum().item() / (off.numel() - len(off)) == pytest.approx(strangers, abs=0.01)


def test_labelled_and_own_negatives_are_at_their_cosines():
    features, labels = state("supcon_loss", "late").inputs()
    same = (labels[:, None] == labels) & ~torch.eye(len(labels), dtype=torch.bool)
    assert cosines(features, features)[same].mean().item() == pytest.approx(0.99, abs=0.005)
    query, key, negatives = state("info_nce own negatives", "anisotropic").inputs()
    apart = F.cosine_similarity(query[:, None], negatives, dim=-1)
    assert apart.mean().item() == pytest.approx(0.9, abs=0.01)
    assert F.cosine_similarity(query, key).mean().item() == pytest.approx(0.99, abs=0.01)


def test_images_and_features_are_as_they_are_called():
    image, pred = state("pixel_loss", "near-equal").inputs()
    assert (image - pred).std().item() == pytest.approx(0.002, rel=0.05) and 0 <= pred.min() and pred.max() <= 1
    bright, _ = state("ssim_loss", "a mean").inputs()
    assert bright.mean().item() == pytest.approx(0.9, abs=0.01) and bright.std().item() == pytest.approx(0.02, rel=0.1)
    (own, *_), (other, *_) = state("feature_distance", "a mean").inputs()
    assert own.mean().item() == pytest.approx(5, abs=0.05) and own.std().item() == pytest.approx(0.5, rel=0.05)
    assert ((other - own) / own).std().item() == pytest.approx(0.01, rel=0.05)


def test_an_error_is_relative_to_the_norm():
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert errors.relative(torch.tensor([3.0, 4.5]).double(), exact) == pytest.approx(0.1)
    assert math.isnan(errors.relative(torch.tensor([3.0, float("nan")]).double(), exact))


def test_rows_have_the_errors_and_go_on_where_they_ended(tmp_path):
    asked = ["pixel_loss", "--small", "--device", "cpu", "--dtype", "bfloat16", "--out", str(tmp_path), "--providers"]
    assert accuracy.main([*asked, "eager"]) == 0
    assert accuracy.main([*asked, "eager", "fastloss", "--more"]) == 0
    rows = read(tmp_path / "cpu" / "accuracy" / "pixel_loss.csv", ERROR_COLUMNS)
    who = [r["provider"] for r in rows]
    assert who == ["eager"] * 9 + ["fastloss"] * 9
    assert {r["inputs"] for r in rows} == {"fresh", "near-equal", "a mean"}
    for r in rows[9:]:
        assert float(r["value_error"]) < 1e-6 and float(r["gradient_error"]) < 2**-8
    asked[asked.index("bfloat16")] = "float32"
    assert accuracy.main([*asked, "fastloss"]) == 0
    rows = read(tmp_path / "cpu" / "accuracy" / "pixel_loss.csv", ERROR_COLUMNS)
    assert [(r["dtype"], r["provider"]) for r in rows[::9]] == [
        ("bfloat16", "eager"), ("bfloat16", "fastloss"), ("float32", "fastloss"),
    ]  # fmt: skip


def test_late_in_bfloat16_ours_is_exact_where_eager_is_lost():
    late = state("clip_loss", "late")
    found = {r["provider"]: r for r in errors.measured([late], "bfloat16", "cpu", ["eager", "fastloss"])}
    assert float(found["eager"]["gradient_error"]) > 0.1
    assert float(found["fastloss"]["gradient_error"]) < 2**-8 and float(found["fastloss"]["value_error"]) < 1e-6


def test_who_fails_has_a_reason(monkeypatch):
    def broken(*args, **options):
        raise KeyError("nothing there")

    monkeypatch.setattr(errors, "providers", lambda *a: {"broken": broken, "text": "absent: why"})
    rows = list(errors.measured([state("pixel_loss", "fresh", small=True)], "float32", "cpu", None))
    assert [r["note"] for r in rows] == ["failed: KeyError: 'nothing there'", "absent: why"]
    monkeypatch.setattr(errors, "result", lambda *a: (torch.tensor(1.0), torch.tensor([float("nan")])))
    rows = list(errors.measured([state("pixel_loss", "fresh", small=True)], "float32", "cpu", None))
    assert {r["note"] for r in rows} == {"nothing to compare with: float64 itself is not finite"}


def test_float16_gradients_do_not_underflow():
    block = [state("pixel_loss", "near-equal")]
    (row,) = errors.measured(block, "float16", "cpu", ["fastloss"])
    assert float(row["gradient_error"]) < 1e-3  # without the scale 2e-9 of a gradient is nothing at all


@pytest.fixture
def three(monkeypatch):
    """Ours, an eager that is worse and a library that is better or level, in two dtypes."""
    rows = [ROW, ROW | dict(provider="eager", value_error="1.0e+00", gradient_error="1.06e+00")]
    rows.append(ROW | dict(provider="open_clip", value_error="2.0e-07", gradient_error="nan"))
    single = dict(dtype="float32", inputs="fresh")
    rows.append(ROW | single | dict(gradient_error="3.0e-07"))
    rows.append(ROW | single | dict(provider="eager", value_error="1.0e-09", gradient_error="1.5e-07"))
    monkeypatch.setattr(tables, "rows_of", lambda device: tuple(rows) if device == "cpu" else ())


def test_a_row_where_another_is_more_exact_is_listed(three, monkeypatch):
    ((key, measure, name, theirs, ours),) = tables.behind("cpu")  # the value, 1e-8, is exact but for its rounding
    assert (key[3:], measure, name, theirs, ours) == (("float32", "fresh"), "gradient", "eager", 1.5e-07, 3e-07)
    row = "| `clip_loss` logit_scale=14.3, 512x128 | fresh | float32 | gradient | eager | 3.0e-7 | 1.5e-7 | 2.00 |"
    assert f"{row} not explained |" in tables.behind_table("cpu")
    monkeypatch.setattr(explanations, "INEXACT", (("cpu", "clip*", "*", "fresh", "float32", "gradient", "because"),))
    assert f"{row} (1) |" in tables.behind_table("cpu") and "(1) because\n" in tables.behind_table("cpu")


def test_the_table_and_the_line_say_the_errors(three):
    assert tables.table("cpu", "bfloat16")[2] == (
        "| `clip_loss` logit_scale=14.3, 512x128 | late | 0.24 % | 106 % | - | open_clip not finite "
        "| 1.0e-8 | 100 % | - | open_clip 2.0e-7 |"
    )
    line = tables.summary()
    assert "largest error of the gradient (median): fastloss 0.24 % (0.24 %), eager 106 % (106 %)" in line
    assert "of `clip_loss`: fastloss 0.24 %, eager 106 %, open_clip not finite." in line
    assert "of 2 rows the gradient is the most exact or level in 1 and the value" in line
    assert "### Errors in bfloat16, CPU" in pages.report()


def test_errors_are_read_as_they_are_written(tmp_path):
    assert [tables.percent(e) for e in (None, 0.0, 2.4e-8, 0.0024, 1.06, 140.0, math.inf)] == [
        "-", "0", "2.4e-8", "0.24 %", "106 %", "14,000 %", "not finite",
    ]  # fmt: skip
    write(tmp_path / "a.csv", [ROW], ERROR_COLUMNS)
    assert read(tmp_path / "a.csv", ERROR_COLUMNS) == [ROW]
