"""What `make sanitize` makes of the sanitizers' reports; the runs themselves are a target of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import ROOT, sanitize

UBSAN = """csrc/a.h:12:5: runtime error: division by zero
    #0 0x7f in f csrc/a.h:12
csrc/b.h:3:9: runtime error: load of misaligned address 0x7f01 for type 'const float', which requires 4 byte alignment
"""
ASAN = """==7==ERROR: AddressSanitizer: heap-buffer-overflow on address 0x60 at pc 0x7f bp 0x7f sp 0x7f
READ of size 4 at 0x60 thread T0
SUMMARY: AddressSanitizer: heap-buffer-overflow csrc/c.h:8 in g
"""


@pytest.fixture
def logs(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitize, "LOGS", tmp_path)
    return tmp_path


def test_each_place_is_one_finding_with_the_runs_that_met_it(logs):
    (logs / "tests-avx2-1.ubsan.100").write_text(UBSAN)
    (logs / "tests-avx512-2.ubsan.101").write_text(UBSAN.replace("0x7f01", "0x7f05"))
    (logs / "fuzz-avx2-1.asan.102").write_text(ASAN)
    (logs / "fuzz-avx2-1.out").write_text("3 calls\n.csrc/d.h:1:2: runtime error: reference binding to null pointer\n")
    met = sanitize.findings()
    assert len(met) == 4
    assert met[".csrc/d.h:1:2: reference binding to null pointer"] == {"fuzz-avx2-1"}
    assert met["csrc/a.h:12:5: division by zero"] == {"tests-avx2-1", "tests-avx512-2"}
    assert met["AddressSanitizer: heap-buffer-overflow csrc/c.h:8 in g"] == {"fuzz-avx2-1"}
    assert next(names for what, names in met.items() if "misaligned" in what) == {"tests-avx2-1", "tests-avx512-2"}


@pytest.mark.parametrize(("report", "fails", "code"), [("", False, 0), (UBSAN, False, 1), ("", True, 1)])
def test_the_exit_code_and_the_last_line(logs, monkeypatch, capsys, report, fails, code):
    write = f"import sys; open({str(logs / 'x.ubsan.1')!r}, 'w').write({report!r}); sys.exit({int(fails)})"
    job = sanitize.Run("tests", "default", 1, (sys.executable, "-c", write))
    monkeypatch.setattr(sanitize, "plan", lambda options: [job])
    monkeypatch.setattr(sanitize, "preloaded", lambda: "")
    monkeypatch.setattr(sys, "argv", ["sanitize", "--no-build"])
    assert sanitize.main() == code
    count, failed = (2 if report else 0), ("tests-default-1" if fails else "none")
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"sanitize: {count} findings in 1 runs; runs that failed: {failed}"
    )


def test_every_instruction_set_and_thread_count_has_its_runs():
    options = sanitize.options_of(["--calls", "80", "--isa", "default", "avx2", "--threads", "1", "2"])
    runs = sanitize.plan(options)
    names = {run.name for run in runs if run.job == "tests"}
    assert names == {f"tests-{isa}-{threads}" for isa in ("default", "avx2") for threads in (1, 2)}
    tests = [run.command for run in runs if run.job == "tests"]
    assert all("tests/conformance/test_every_loss.py" in command for command in tests)
    assert [command[-1] for command in tests] == ["0/4", "1/4", "2/4", "3/4"]
    fuzz = [run for run in runs if run.job == "fuzz"]
    assert len(fuzz) == 4 and all("20" in run.command for run in fuzz)
    assert len({run.command for run in fuzz}) == 4  # each draws its own
    assert sanitize.instruction_sets()[0] == "default"
    whole = sanitize.plan(sanitize.options_of(["--all", "--calls", "0"]))
    assert len({run.command for run in whole}) == 1 and "--deal" not in whole[0].command


DEALT = """
import pytest
@pytest.mark.parametrize("size", range(4))
@pytest.mark.parametrize("dtype", range(4))
def test_kernel(dtype, size):
    pass
def test_other():
    pass
"""


COLLECTED = """
import sys, pytest
for deal in sys.argv[2:]:
    options = ["-q", "--collect-only", "-p", "tests.deal", "--deal", deal, "-k", "kernel"]
    print("status", int(pytest.main([*options, sys.argv[1]])))
    print("end of a run", flush=True)
"""


def test_dealt_runs_share_the_chosen_tests(tmp_path):
    """Each test is in one run, their numbers differ by one at most, and each run meets every value of a parameter."""
    (tmp_path / "test_dealt.py").write_text(DEALT)
    deals = ["0/4", "1/4", "2/4", "3/4", "4/4"]
    done = subprocess.run(
        [sys.executable, "-c", COLLECTED, str(tmp_path), *deals], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *outputs, refused = done.stdout.split("end of a run\n")[:-1]
    seen = [[line.split("::")[1] for line in output.splitlines() if "::" in line] for output in outputs]
    assert sorted(name for names in seen for name in names) == sorted(
        f"test_kernel[{dtype}-{size}]" for dtype in range(4) for size in range(4)
    )
    assert [len(names) for names in seen] == [4, 4, 4, 4]
    for names in seen:
        for digit in (12, 14):  # test_kernel[0-3]
            assert {name[digit] for name in names} == set("0123")
    assert "status 4" in refused and "expected I/N with 0 <= I < N, got 4/4" in refused + done.stderr
