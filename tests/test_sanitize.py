"""What `make sanitize` makes of the sanitizers' reports; the runs themselves are a target of their own."""

from __future__ import annotations

import sys

import pytest

from tests import sanitize

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
    assert all(run.command[-1] == "tests/conformance/test_every_loss.py" for run in runs if run.job == "tests")
    fuzz = [run for run in runs if run.job == "fuzz"]
    assert len(fuzz) == 4 and all("20" in run.command for run in fuzz)
    assert len({run.command for run in fuzz}) == 4  # each draws its own
    assert sanitize.instruction_sets()[0] == "default"
