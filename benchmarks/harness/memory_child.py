"""The child process of memory.py: a question a line, the peak of that pass or step as the answer."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.harness import measure
from benchmarks.harness.memory import MARK
from benchmarks.workloads.drop_ins import passes_of
from benchmarks.workloads.items import item_of, passes
from benchmarks.workloads.perceptual_step import step_of
from benchmarks.workloads.providers import providers
from benchmarks.workloads.train_steps import STEPS


def answer(question: dict[str, Any], limit_mib: int) -> dict[str, str]:
    gc.collect()
    try:
        if question["loss"] in STEPS:
            make = STEPS[question["loss"]]
            call: Callable[[], object] = make(question["shape"], question["dtype"], "cpu", question["provider"])
        elif question["loss"] == "perceptual_step":
            call = step_of(question, "cpu")[0]
        elif question["loss"] == "drop_in":
            forward, backward, _ = passes_of(question, "cpu")
            call = lambda: backward(forward())  # noqa: E731
        else:
            item = item_of(question)
            function = providers(item.case, item.options, "cpu", [question["provider"]])[question["provider"]]
            if isinstance(function, str):
                return {"peak": "", "why": function}
            forward, backward, _ = passes(item.case, function, item.inputs("cpu"), item.options)
            call = lambda: backward(forward())  # noqa: E731
        with measure.address_limit(limit_mib):
            return {"peak": f"{measure.peak_mib(call, 'cpu'):.1f}", "why": ""}
    except Exception as error:
        return {"peak": "", "why": measure.reason(error)}


def main() -> None:
    for line in sys.stdin:
        print(MARK + json.dumps(answer(json.loads(line), int(sys.argv[1]))), flush=True)


if __name__ == "__main__":
    main()
