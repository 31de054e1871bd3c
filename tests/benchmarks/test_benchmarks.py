"""The benchmark suite works, refuses what it should, and README and REPORT say what the result files say."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import pytest
import torch

import fastloss
from benchmarks import check, perceptual_step, plot, run, scaling, train_steps
from benchmarks.harness import measure, memory, results, session
from benchmarks.harness.progress import Progress
from benchmarks.report import explanations, pages, tables
from benchmarks.workloads import items, providers
from tests.conformance.cases import CASES, Draw

PIXEL = next(c for c in CASES if c.name == "pixel_loss")
SMALL = ["--device", "cpu", "--sizes", "1x3x128x128", "--seconds", "0"]


class FakeChild:
    """A memory child that answers without a process."""

    def __init__(self, limit_mib=0):
        self.limit_mib = limit_mib

    def peak(self, columns, provider):
        too_large = self.limit_mib and provider == "eager" and columns["shape"].startswith("512x")
        return ("", "out of memory: no more") if too_large else ("1.5", "")

    def start(self):
        """Nothing to start."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Nothing to stop."""


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(PIXEL.bench, "options", [{"p": 1}])
    monkeypatch.setattr(measure, "ceilings", lambda device: {"copy": 10.0})
    monkeypatch.setattr(measure, "ceiling", lambda *a: 10.0)
    for module in (run, scaling, train_steps):
        monkeypatch.setattr(module, "Child", FakeChild)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_writes_every_mode_and_provider(small, tmp_path):
    assert run.main(["pixel_loss", *SMALL, "--out", str(tmp_path), "--providers", "eager", "fastloss"]) == 0
    found = table(tmp_path / "cpu" / "pixel_loss.csv")
    assert [(r["mode"], r["provider"]) for r in found] == [
        (m, p) for m in ("forward", "backward", "both") for p in ("eager", "fastloss")
    ]
    for r in found:
        assert float(r["p20_ms"]) <= float(r["p50_ms"]) <= float(r["p80_ms"])
        per_element = {"forward": 8, "backward": 12, "both": 20}[r["mode"]]
        assert int(r["cost"]) == per_element * 3 * 128 * 128
        assert float(r["rate"]) == pytest.approx(int(r["cost"]) / float(r["p50_ms"]) / 1e6, rel=0.01)
        assert float(r["share"]) == pytest.approx(float(r["rate"]) / 10, abs=0.002)
        assert r["checked"] == "float64" and r["headline"] == "0"
        assert (r["peak_mib"], r["launches"] != "") == (("1.5", True) if r["mode"] == "both" else ("", False))
    assert found[-1]["saved_mib"] == "0.0"  # fastloss keeps its inputs and nothing else


def test_who_is_wrong_missing_or_broken_gets_no_time_and_disturbs_nobody(small, tmp_path, monkeypatch):
    def off(image, image_pred, **options):
        return fastloss.pixel_loss(image, image_pred, **options) * 1.01

    def full(*args, **options):
        raise torch.OutOfMemoryError("tried to allocate 3 GiB\nand more")

    def broken(*args, **options):
        raise KeyError("nothing there")

    def missing(*args, **options):
        raise ImportError("No module named 'x'")

    given = {"off": off, "full": full, "broken": broken, "missing": missing, "text": "absent: why"}
    given["eager"] = PIXEL.eager
    monkeypatch.setattr(session, "providers", lambda *a: given)
    run.main(["pixel_loss", *SMALL, "--out", str(tmp_path)])
    found = {r["provider"]: r for r in table(tmp_path / "cpu" / "pixel_loss.csv")}
    assert found["eager"]["p50_ms"] and not any(r["p50_ms"] for name, r in found.items() if name != "eager")
    assert found["off"]["note"] == "wrong: relative error 1.0e-02, allowed 2.0e-03"
    assert found["full"]["note"] == "out of memory: tried to allocate 3 GiB"
    assert found["broken"]["note"] == "failed: KeyError: 'nothing there'"
    assert found["missing"]["note"] == "absent: No module named 'x'; pip install missing"
    assert found["text"]["note"] == "absent: why"


def test_an_item_that_fails_as_a_whole_is_a_row(small, monkeypatch):
    def none(*a):
        raise ValueError("no inputs")

    monkeypatch.setattr(session, "candidates", none)
    item = items.Item(PIXEL, {"p": 1}, (1, 3, 8, 8), "float32")
    (row,) = session.measure_item(item, session.Session("cpu", 0.0))
    assert row["note"] == "failed: ValueError: no inputs" and row["loss"] == "pixel_loss"


def test_when_the_time_is_over_the_rest_is_named(small, capsys):
    work = items.items(["pixel_loss"], "cpu", ["float32"])
    assert list(session.measured(work, session.Session("cpu", 0.0), -1.0, Progress(1))) == []
    assert "not measured" in capsys.readouterr().out


def test_an_unknown_loss_is_named(capsys):
    for module in (run, scaling):
        with pytest.raises(SystemExit):
            module.main(["no_such_loss"])
        said = " ".join(capsys.readouterr().err.split())
        assert "no benchmark row for no_such_loss; there are" in said and "pixel_loss" in said


def test_judge_knows_the_tolerances():
    exact = [torch.tensor([1.0, 2.0], dtype=torch.float64)]
    judge = session.judge
    tf32, poor = [torch.tensor([1.0, 2.002])], [torch.tensor([1.0, 2.1])]
    assert judge("other", tf32, exact, exact, torch.float32) == ("1.0e-03", "")
    assert judge("other", poor, exact, exact, torch.float32)[1] == "wrong: relative error 5.0e-02, allowed 2.0e-03"
    assert judge("other", poor, [torch.tensor([1.0, 2.05])], exact, torch.float32)[1] == ""  # eager is no better
    assert judge("fastloss", tf32, exact, exact, torch.float32)[1].endswith("error 1.0e-03, allowed 3.6e-07")
    assert "nan" in judge("other", [torch.tensor([1.0, float("nan")])], exact, exact, torch.float32)[1]


def test_without_float64_the_others_are_held_against_fastloss(monkeypatch):
    monkeypatch.setattr(session, "truth", lambda *a: (None, None, ""))
    item = items.Item(PIXEL, {"p": 1}, (1, 3, 8, 8), "float32")
    found = session.candidates(item, session.Session("cpu", 0.0), {"eager": PIXEL.eager, "fastloss": PIXEL.fn})
    assert found["fastloss"].checked.startswith("not at this size") and found["eager"].checked.startswith("fastloss,")
    assert not found["eager"].note and found["eager"].timed


def test_shapes_survive_the_result_file():
    for shape in ((8, 3, 512, 512), (5,), ((4, 64, 8, 8), (4, 128, 4, 4))):
        assert items.shape_of(items.shape_text(shape)) == shape
    assert items.shape_text(((4, 64, 8, 8), (4, 128, 4, 4))) == "4x64x8x8+4x128x4x4"
    for item in items.items(items.named(), "cpu", ["float32"]):
        again = items.item_of(json.loads(json.dumps(item.columns())))
        assert (again.case, again.options, again.shape) == (item.case, item.options, item.shape)


def test_sizes_change_what_scales():
    assert items.sized((8192, 512), 256) == (256, 512)
    assert items.sized((8, 3, 512, 512), 32) == (8, 3, 32, 32)
    assert items.sized((2, 8, 77, 77, 64), 128) == (2, 8, 128, 128, 64)
    assert items.sized(((4, 64, 256, 256), (4, 128, 128, 128)), 64) == ((4, 64, 64, 64), (4, 128, 32, 32))
    assert items.sweep((8192, 512))[0] == 256 and items.sweep((8, 3, 512, 512)) == (32, 64, 128, 256, 512, 1024)


def test_every_loss_with_rows_has_a_headline():
    headline = {item.case.name for item in items.items(items.named(), "cpu", ["float32"], headline=True)}
    assert headline == set(items.named())


def test_all_layers_of_a_list_are_differentiated():
    case = next(c for c in CASES if c.name == "feature_distance")
    args = case.make(Draw(), case.shapes[0])
    assert [t.shape for t in items.passes(case, case.fn, args, {})[2]] == [t.shape for t in args[1]]


def test_an_older_file_is_read(tmp_path):
    (tmp_path / "a.csv").write_text("loss,provider,p50_ms\npixel_loss,eager,1.0\n")
    (row,) = results.read_all(tmp_path)
    assert row["p50_ms"] == "1.0" and row["headline"] == "" and tables.is_headline(row)


def test_the_tables_say_what_the_result_files_say():
    assert plot.outdated() == [], "run `python -m benchmarks.plot`"


def test_every_lost_row_is_explained():
    assert tables.unexplained() == [], "say why in benchmarks/report/explanations.py"


def test_a_lost_row_without_a_reason_is_found(monkeypatch):
    row = dict.fromkeys(results.COLUMNS, "")
    row |= dict(loss="new_loss", options="{}", shape="8x8", dtype="half", mode="both")
    ours = row | dict(provider="fastloss", p20_ms="2.0", p50_ms="2.1", p80_ms="2.2", peak_mib="8")
    fast = row | dict(provider="kornia", p20_ms="0.9", p50_ms="1.0", p80_ms="1.1", peak_mib="2")
    level = row | dict(provider="piq", p20_ms="1.9", p50_ms="2.05", p80_ms="2.2", peak_mib="8")
    monkeypatch.setattr(tables, "_read", lambda device: (ours, fast, level) if device == "cpu" else ())
    assert [line.split(": ")[1:] for line in tables.unexplained()] == [
        ["new_loss {} 8x8 both", "2.10 times kornia's"], ["new_loss {} 8x8 memory", "4.00 times kornia's"],
    ]  # fmt: skip
    assert tables.UNEXPLAINED in pages.report() and "| level |" in pages.report()
    assert "kornia 1 (0.48x)" in tables.table()
    monkeypatch.setattr(explanations, "EXPLANATIONS", (("cpu", "new_*", "*", "*", "*", "kornia", "because"),))
    assert tables.unexplained() == [] and "(1) because" in pages.report()


def test_what_got_worse_is_named_if_it_is_worse_again(monkeypatch, capsys):
    key = {name: ("pixel_loss", "{}", name, "float32") for name in ("same", "worse", "noisy", "eager is fast")}
    before = {k: {"eager": 0.5, "torch.compile": 0.8} for k in key.values()}
    before |= {("other", "{}", "8", "half"): {"eager": 1}}
    once = {key["same"]: {"eager": 0.57, "torch.compile": 0.9}, key["worse"]: {"eager": 0.7, "torch.compile": 1.0},
            key["noisy"]: {"eager": 0.9, "torch.compile": 2.0}, key["eager is fast"]: {"eager": 0.8}}  # fmt: skip
    again = once | {key["noisy"]: {"eager": 0.5, "torch.compile": 0.7}, key["same"]: {"eager": 9.0}}
    again[key["eager is fast"]] = {"eager": 0.8, "torch.compile": 0.8}
    answers = [once, again]
    monkeypatch.setattr(check, "read_all", lambda folder: [])
    monkeypatch.setattr(check, "ratios", lambda rows: before)
    monkeypatch.setattr(check, "measured", lambda losses, device, minutes: answers.pop(0))
    assert check.main(["pixel_loss", "--device", "cpu"]) == 1 and not answers
    assert capsys.readouterr().out.splitlines() == [
        "not compared: `pixel_loss`, eager is fast, float32 against torch.compile has no time now",
        "eager became faster by 60%, fastloss did not get worse: `pixel_loss`, eager is fast, float32",
        "worse by 40% against eager: `pixel_loss`, worse, float32",
        "worse by 25% against torch.compile: `pixel_loss`, worse, float32",
        "4 rows compared, 1 worse by more than 15% in both of two runs",
    ]
    assert check.main(["no_such_loss"]) == 2


def test_results_of_another_processor_are_called_so():
    here = {"device": check.measure.device_label("cpu")}
    assert check.other_processor([here, {"device": ""}], "cpu") == ""
    warning = check.other_processor([here, {"device": "Abacus 3"}], "cpu")
    assert warning.startswith("warning: the results are of ") and "Abacus 3" in warning and here["device"] in warning


def test_ratios_are_of_rows_that_both_have():
    eager = dict.fromkeys(results.COLUMNS, "") | dict(loss="a", shape="8", mode="both", provider="eager", p50_ms="4.0")
    ours, compiled = eager | dict(provider="fastloss", p50_ms="1.0"), eager | dict(provider="torch.compile", p50_ms="")
    found = check.ratios([eager, ours, compiled, ours | {"mode": "forward", "p50_ms": "9"}])
    assert found == {("a", "", "8", ""): {"eager": 0.25}}
    assert check.growth(found, {("a", "", "8", ""): {"eager": 0.5}, ("b", "", "8", ""): {"eager": 1.0}}) == {
        ("a", "", "8", ""): {"eager": 1.0}
    }


def test_scaling_leaves_out_who_is_out_of_memory(small, tmp_path):
    asked = ["clip_loss", "--device", "cpu", "--sizes", "256", "512", "--threads", "1", "--seconds", "0"]
    assert scaling.main([*asked, "--providers", "eager", "fastloss", "--out", str(tmp_path)]) == 0
    found = table(tmp_path / "cpu" / "scaling" / "clip_loss.csv")
    both = {(r["shape"], r["provider"]): r for r in found if r["mode"] == "both"}
    assert both["256x512", "eager"]["p50_ms"] and both["512x512", "fastloss"]["p50_ms"]
    assert both["512x512", "eager"]["note"] == "out of memory at 512: more than 4096 MiB"
    assert {r["threads"] for r in found} == {"1"}


def test_scaling_goes_on_where_it_ended(small, tmp_path):
    path = tmp_path / "cpu" / "scaling" / "pixel_loss.csv"
    asked = ["pixel_loss", "--device", "cpu", "--threads", "1", "--seconds", "0", "--out", str(tmp_path)]
    asked += ["--providers", "eager", "fastloss", "--sizes"]
    assert scaling.main([*asked, "32"]) == 0
    first = table(path)
    first[-1]["note"] = "no time for 64"  # of fastloss
    next(r for r in first if r["mode"] == "both" and r["provider"] == "eager")["note"] = "out of memory at 64"
    results.write(path, first)
    assert scaling.main([*asked, "32", "64", "--more"]) == 0
    found = table(path)
    assert [r | {"note": ""} for r in found[: len(first)]] == [r | {"note": ""} for r in first]
    more = {r["provider"]: r for r in found[len(first) :] if r["mode"] == "both"}
    assert {r["shape"] for r in more.values()} == {items.shape_text(items.sized(PIXEL.bench.shapes[0], 64))}
    assert more["fastloss"]["p50_ms"] and not more["eager"]["p50_ms"]
    assert [r["note"] for r in found if r["provider"] == "fastloss"] == [""] * 6


def test_a_training_step_is_measured(small, monkeypatch):
    monkeypatch.setattr(train_steps, "names_of", lambda *a: ["eager", "fastloss"])
    for loss, shape in (("clip_step", "16x512"), ("imagen_step", "4x1x32x32")):
        found = train_steps.measure_step(loss, shape, "float32", "cpu", 0.0, FakeChild())
        assert [(r["provider"], r["note"]) for r in found] == [("eager", ""), ("fastloss", "")]
        assert all(float(r["p50_ms"]) > 0 for r in found)


def test_steps_keep_the_rows_of_other_batches(small, tmp_path, monkeypatch):
    monkeypatch.setattr(train_steps, "measure_step", lambda loss, shape, dtype, *a: [
        dict(loss=loss, shape=shape, dtype=dtype, mode="step", provider="fastloss", p50_ms=next(times))
    ])  # fmt: skip
    times = iter("12345")
    for batches in ("64 16", "16"):
        train_steps.main(["--device", "cpu", "--out", str(tmp_path), "--batches", *batches.split()])
    found = results.read(tmp_path / measure.device_folder("cpu") / "train_step.csv")
    assert [(r["shape"], r["p50_ms"]) for r in found] == [("64x1x32x32", "4"), ("16x512", "5"), ("64x512", "2")]


def test_a_perceptual_step_is_measured(small, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.setattr(perceptual_step, "who", lambda *a: [
        ({"criterion": "l1"}, name) for name in ("eager", "basicsr-style", "piq-style", "fastloss")
    ] + [({"criterion": "l1", "execution": "chunk=1"}, "fastloss")])  # fmt: skip
    found = perceptual_step.measure_criterion("l1", "2x3x32x32", "cpu", 0.0, FakeChild())
    assert [(r["note"], r["headline"]) for r in found] == [("", 1)] * 4 + [("", 0)]
    assert all(float(r["p50_ms"]) > 0 and r["mode"] == "step" for r in found)
    assert {r["error"] for r in found if r["provider"] == "eager"} == {"0.0e+00"}


def test_rows_of_other_criteria_stay(monkeypatch, tmp_path):
    row = dict(loss="perceptual_step", provider="eager", peak_mib="", note="")
    measured = lambda criterion, *_: [row | dict(options=items.options_text({"criterion": criterion}), p50_ms=next(ms))]  # noqa: E731
    ms = iter("123")
    monkeypatch.setattr(perceptual_step, "measure_criterion", measured)
    for criteria in (["lpips", "l1"], ["l1"]):
        assert perceptual_step.main(["--device", "cpu", "--out", str(tmp_path), "--criteria", *criteria]) == 0
    found = [(perceptual_step.criterion_of(r), r["p50_ms"]) for r in table(tmp_path / "cpu" / "perceptual_step.csv")]
    assert found == [("l1", "3"), ("lpips", "1")]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_child_measures_and_keeps_its_limit(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")  # as prepare_process() sets it, for processes that measure time
    with memory.Child(limit_mib=64) as child:
        columns = items.Item(PIXEL, PIXEL.bench.options[0], (1, 3, 512, 512), "float32").columns()
        peak, why = child.peak(columns, "eager")
        assert why == "" and 2.5 < float(peak) < 40  # at least the gradient's 3 MiB
        peak, why = child.peak(columns | {"shape": "16x3x1024x1024"}, "eager")
        assert peak == "" and why.startswith("out of memory")


def test_adapters_take_what_they_know_and_no_more():
    for loss, adapters in providers.ADAPTERS.items():
        assert any(c.name == loss for c in CASES), loss
        for name, _, adapter in adapters:
            try:
                assert adapter({"no_such_option": 1}) is None, (loss, name)
            except ImportError:
                assert name in providers.INSTALL, name


def test_the_report_says_how_far_each_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.scaling_table("cpu") == ["Not measured."]
    eager, ours, _ = sample()
    results.write(tmp_path / "cpu" / "scaling" / "pixel_loss.csv", [
        eager | {"threads": "1", "p50_ms": "6"}, eager | {"threads": "1", "p50_ms": "24", "shape": "8x3x64x64"},
        eager | {"p50_ms": "4"}, eager | {"shape": "8x3x64x64", "p50_ms": "", "note": "out of memory at 64"}, ours,
    ])  # fmt: skip
    head = "| `pixel_loss` | {} | 8x3x32x32 | {} | 3 | {} | {} |"
    assert tables.scaling_table("cpu")[2:] == [
        head.format("eager", 4, "out of memory at 64", "1 to 2: 1.50x at 8x3x32x32"),
        head.format("fastloss", 1, "the end of the sweep", "-"),
    ]


def sample():
    row = dict.fromkeys(results.COLUMNS, "") | dict(
        loss="pixel_loss", options="{}", shape="8x3x32x32", dtype="float32", mode="both", device="a cpu", threads="2",
        unit="GB/s", ceiling="10", rate="5", share="0.5", p20_ms="1", p50_ms="1", p80_ms="1", peak_mib="3",
    )  # fmt: skip
    for name, time in (("eager", "2.5"), ("fastloss", "1"), ("kornia", "0.9")):
        yield row | {"provider": name, "p50_ms": time}


def test_the_pytest_benchmark_suite_runs():
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "-p", "no:cacheprovider"]
    command += ["-k", "pixel_loss and charbonnier and fastloss"]
    apart = {k: v for k, v in os.environ.items() if "XDIST" not in k}  # pytest-benchmark times nothing in a worker
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=measure.ROOT,
        env=apart | {"FASTLOSS_BENCH_SIZES": "1x3x32x32", "FASTLOSS_BENCH_LOSSES": "pixel_loss"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout and "pixel_loss(p=charbonnier) 1x3x32x32 float32" in done.stdout
