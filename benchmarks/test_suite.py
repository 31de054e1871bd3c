"""The headline rows as a pytest-benchmark suite: `pytest benchmarks --benchmark-only`, `--benchmark-compare`.

One group per loss, options, shape and dtype; forward plus backward of each provider. FASTLOSS_BENCH_SIZES (shapes, or
numbers as for `fastloss bench --sizes`) replaces the shapes, FASTLOSS_BENCH_LOSSES the losses, FASTLOSS_BENCH_DTYPES
the dtypes; `-k` chooses further.
"""

from __future__ import annotations

import os
from functools import lru_cache

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks.harness import session  # noqa: E402
from benchmarks.workloads.items import Item, items, named, passes  # noqa: E402
from benchmarks.workloads.providers import providers  # noqa: E402
from tests.conformance.tools import cast, ops_of  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = os.environ.get("FASTLOSS_BENCH_DTYPES", "float32 bfloat16" if DEVICE == "cuda" else "float32").split()
LOSSES = os.environ.get("FASTLOSS_BENCH_LOSSES", "").split() or named()
SIZES = os.environ.get("FASTLOSS_BENCH_SIZES", "").split()


def rows() -> list:
    found = []
    for item in items(LOSSES, DEVICE, DTYPES, headline=not SIZES, sizes=SIZES):
        if ops_of(item.case.name):
            for name, function in providers(item.case, item.options, DEVICE).items():
                if not isinstance(function, str):
                    found.append(pytest.param(item, name, id=f"{item.name}-{name}".replace(" ", "_")))
    return found


@lru_cache(maxsize=1)
def inputs_and_truth(item: Item) -> tuple:
    inputs = item.inputs(DEVICE)
    return inputs, session.truth(item, inputs, DEVICE)


@pytest.mark.parametrize(("item", "provider"), rows())
def test_forward_and_backward(benchmark, item, provider):
    benchmark.group = item.name
    inputs, (eager, exact, _) = inputs_and_truth(item)
    torch._dynamo.reset()
    function = providers(item.case, item.options, DEVICE, [provider])[provider]
    dtype = getattr(torch, item.dtype)
    if exact is not None:
        error, wrong = session.judge(provider, session.once(item, function, dtype, inputs, DEVICE), eager, exact, dtype)
        assert not wrong, wrong
        benchmark.extra_info["error"] = error
    forward, backward, _ = passes(item.case, function, cast(inputs, dtype), item.options)

    def step() -> None:
        backward(forward())
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    step()
    benchmark.pedantic(step, rounds=10, warmup_rounds=1)
