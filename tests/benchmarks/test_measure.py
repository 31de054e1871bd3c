"""Times, counts, memory and limits of the benchmarks are what they say."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks.harness import measure


def test_a_pass_that_fails_while_it_is_timed_drops_out():
    calls = []

    def tired():
        calls.append(0)
        if len(calls) > 4:
            raise RuntimeError("tired")

    times, failed = measure.interleaved(
        {"tired": (tired, lambda out: None), "fine": (lambda: 1, lambda out: None)}, measure.Clock("cpu"), 0.0
    )
    assert list(times) == ["fine"] and len(times["fine"]) == 10 and str(failed["tired"]) == "tired"


def test_quantiles():
    assert measure.quantiles([5.0, 1.0, 2.0, 3.0, 4.0]) == pytest.approx((1.8, 3.0, 4.2))


def test_saved_bytes_and_operators_are_counted():
    a, b = torch.ones(1000, requires_grad=True), torch.ones(1000)
    saved, _ = measure.counts(lambda: (a * b).exp().sum(), lambda out: out.backward(), [a, b], "cpu")
    assert saved == 4000  # the exponential; the factors are inputs
    one, three = (measure.counts(f, lambda out: None, [b], "cpu") for f in (b.exp, lambda: b.exp().exp().exp()))
    assert three[1] - one[1] == 2 and one[0] == three[0] == 0


def test_the_commit_is_known_without_git(monkeypatch):
    monkeypatch.setenv("FASTLOSS_COMMIT", "given")
    assert measure.commit() == "given"
    monkeypatch.delenv("FASTLOSS_COMMIT")
    monkeypatch.setenv("PATH", "/nowhere")
    assert measure.commit().startswith("sources-") and measure.commit() == measure.commit()


@pytest.mark.skipif(sys.platform != "linux", reason="address_limit is for Linux")
def test_a_limit_within_a_limit_does_not_raise_it():
    import resource

    with measure.address_limit(512):
        outer = resource.getrlimit(resource.RLIMIT_AS)
        with measure.address_limit(4096):
            assert resource.getrlimit(resource.RLIMIT_AS) == outer
            with pytest.raises(RuntimeError, match="allocate memory"):
                torch.empty(2**30, dtype=torch.uint8)
        assert resource.getrlimit(resource.RLIMIT_AS) == outer
