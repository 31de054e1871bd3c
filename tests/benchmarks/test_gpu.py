"""`make gpu` without a GPU: what it would do in which call, with a clock that a test turns."""

from __future__ import annotations

import pytest

from benchmarks import compile_ahead, gpu, profile_kernels, tune
from benchmarks.harness import measure
from benchmarks.workloads import gpu_parts, items
from tests import device_calls

CALL = ["--device", "cpu", "--out"]


@pytest.fixture
def clock(monkeypatch):
    """Nothing is run: a part takes the seconds that it says, or what `takes` says of it. The parts begun, in order."""
    now, begun, takes, fails = [0.0], [], {}, set()

    def do(part, seconds, log):
        begun.append(part.name)
        if not part.beside:  # what runs beside another takes no time of its own
            now[0] += min(seconds, takes.get(part.name, part.seconds))
        return part.name not in fails, "its last line"

    monkeypatch.setattr(gpu, "do", do)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(measure, "commit", lambda: "abc")
    begun_of = type("Clock", (), dict(now=now, begun=begun, takes=takes, fails=fails))
    return begun_of


@pytest.fixture(autouse=True)
def own_temporary_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.tempfile, "gettempdir", lambda: str(tmp_path / "caches"))


def test_every_loss_is_measured_once_and_names_are_unique(tmp_path):
    parts = gpu_parts.parts("cuda", tmp_path, tmp_path / "h200")
    names, words = [p.name for p in parts], [word for p in parts for command in p.commands for word in command]
    assert len(set(names)) == len(names) and [p.chapter for p in parts] == sorted(p.chapter for p in parts)
    assert all(words.count(loss) == 1 for loss in items.named())
    assert all(p.seconds <= gpu_parts.LONGEST for p in parts)


def test_losses_without_a_row_come_first(tmp_path):
    known = [name for name in items.named() if name != "ssim_loss"]
    for name in known:
        (tmp_path / "h200").mkdir(exist_ok=True)
        (tmp_path / "h200" / f"{name}.csv").touch()
    rows = gpu_parts.rows_of(items.named(), "cuda", tmp_path, tmp_path / "h200")
    assert rows[0].name == "bench-images" and "ssim_loss" in rows[0].commands[0]


def test_large_rows_are_bfloat16_alone():
    clip = [item for item in items.items(["clip_loss"], "cuda", ["float32", "bfloat16"], True)]
    assert {item.dtype for item in clip if items.is_large(item.shape)} == {"bfloat16"}
    assert {item.dtype for item in clip if not items.is_large(item.shape)} == {"float32", "bfloat16"}


def test_two_calls_of_ten_minutes_answer_what_matters(tmp_path, clock):
    """Right, fast, why and what fits: two calls of 9.5 minutes; a third goes on with the rest."""
    for end in (570, 1140, 1710):
        assert gpu.main([*CALL, str(tmp_path), "--minutes", "9.5"]) == 3  # there is more to do
        assert clock.now[0] <= end
        clock.now[0] = end
        if end == 1140:
            first = list(clock.begun)
    parts = gpu_parts.parts("cpu", tmp_path, tmp_path / "cpu")
    matters = [p.name for p in parts if p.chapter < 5]
    assert first[: len(matters)] == matters
    assert len(clock.begun) > len(first) and len(set(clock.begun)) == len(clock.begun)


def test_what_failed_is_done_again_and_a_new_commit_does_all_again(tmp_path, clock, monkeypatch, capsys):
    call = ["steps", "tests-1", *CALL, str(tmp_path)]
    clock.fails.add("steps")
    assert gpu.main(call) == 1 and clock.begun == ["tests-1", "steps"]
    assert gpu.main(call) == 1 and clock.begun == ["tests-1", "steps", "steps"]
    assert "failed: steps: its last line" in capsys.readouterr().out
    monkeypatch.setattr(measure, "commit", lambda: "def")
    assert gpu.main(["tests-1", *call[2:]]) == 0 and clock.begun[-1] == "tests-1"


def test_caches_are_filled_again_on_another_machine(tmp_path, clock, monkeypatch):
    call = ["compile", *CALL, str(tmp_path)]
    assert gpu.main(call) == gpu.main(call) == 0 and clock.begun == ["compile"]
    monkeypatch.setattr(gpu.tempfile, "gettempdir", lambda: str(tmp_path / "another"))
    assert gpu.main(call) == 0 and clock.begun == ["compile", "compile"]


def test_a_part_that_does_not_fit_is_not_begun(tmp_path, clock, capsys):
    assert gpu.main(["tests-kernels", *CALL, str(tmp_path), "--minutes", "3"]) == 3 and not clock.begun
    assert "call again for tests-kernels" in capsys.readouterr().out


def test_the_archive_has_results_and_logs(tmp_path):
    (tmp_path / "cpu" / "parts").mkdir(parents=True)
    (tmp_path / "cpu" / "parts" / "steps.log").write_text("said")
    gpu.pack(tmp_path / "out.tar.gz", tmp_path / "cpu")
    with gpu.tarfile.open(tmp_path / "out.tar.gz") as tar:
        assert "cpu/parts/steps.log" in tar.getnames()


def test_processes_are_logged_killed_and_missed(tmp_path):
    part = lambda code, *more: gpu_parts.Part("p", [[gpu.sys.executable, "-c", code]], 1)  # noqa: E731
    log = tmp_path / "logs" / "p.log"
    assert gpu.do(part("print('one'); print('two')"), 60, log) == (True, "two") and log.read_text() == "one\ntwo\n"
    assert gpu.do(part("raise SystemExit('no')"), 60, log) == (False, "no")
    assert gpu.do(part("import time; time.sleep(60)"), 1, log) == (False, "stopped after 1 s, or killed")
    missing = gpu_parts.Part("p", [["no-such-program"]], 1)
    assert gpu.do(missing, 60, log) == (False, "absent: no-such-program is not installed")


def test_the_timetable_is_shown(tmp_path, capsys):
    assert gpu.main([*CALL, str(tmp_path), "--timetable", "--minutes", "9.5"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("call 1: ") and "compile with sanitize" in first
    assert gpu.main([*CALL, str(tmp_path), "--list"]) == 0
    assert "to do" in capsys.readouterr().out


def test_compilations_are_of_every_small_row_and_tell_what_failed():
    tasks = compile_ahead.tasks(["clip_loss", "pixel_loss"], "cuda", ["bfloat16"])
    shapes = {(t.columns["loss"], t.columns["shape"]) for t in tasks}
    assert ("clip_loss", "32768x768") in shapes and ("clip_loss", "65536x768") not in shapes
    assert tasks[0].provider == "torch.compile" and tasks[-1].provider == "fastloss"
    small = items.items(["pixel_loss"], "cpu", ["float32"], True, ["1x3x16x16"])[0].columns()
    assert compile_ahead.compile_one(compile_ahead.Task(small, "fastloss"), "cpu") == ""
    missing = compile_ahead.Task(small, "no such provider")
    assert "no such provider" in compile_ahead.compile_one(missing, "cpu")


def test_ncus_pages_become_a_table():
    head = '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
    rows = [
        '"0","_a_kernel(int)","x","Duration","ns","31,840"', '"0","_a_kernel(int)","x","DRAM Throughput","%","40.02"',
        '"0","_a_kernel(int)","x","Executed Instructions","inst","17,776,640"',
        '"1","_b_kernel","x","Duration","us","9.1"',
    ]  # fmt: skip
    lines = profile_kernels.table("\n".join(["==PROF== connected", head, *rows]))
    assert lines[1].split()[:3] == ["_a_kernel", "31.8", "40.0"] and "1.78e+07" in lines[1]
    assert lines[2].split()[:3] == ["_b_kernel", "9.1", "-"]
    assert profile_kernels.table("nothing")[0] == "ncu gave no table:"


def test_every_op_is_called_for_the_sanitizers(capsys):
    assert device_calls.main(["--device", "cpu", "--loss", "pixel_loss"]) == 0
    assert capsys.readouterr().out.splitlines() == ["pixel_loss", "2 calls"]


def test_settings_name_what_is_there(capsys):
    march = pytest.importorskip("fastloss.image.kernels.smoothness_march")
    from fastloss.contrastive.kernels.tile_configs import Tile

    assert {name for setting in tune.STRETCHES.values() for name in setting} <= set(vars(march))
    assert {name for setting in tune.TILES.values() for name in setting} <= {*Tile.__dataclass_fields__, "programs"}
    assert not next(iter(tune.TILES.values())) and not next(iter(tune.STRETCHES.values()))  # first what is shipped
    with pytest.raises(SystemExit):
        tune.main(["no such family"])
    assert "there are softmax_stats, exps, weighted_keys, smoothness" in capsys.readouterr().err
