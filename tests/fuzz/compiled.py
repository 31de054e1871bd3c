"""A call under torch.compile: one compiled function, called with other numbers and other shapes, as a training loop has
them. Each result is judged as that of the same call without the compiler."""

from __future__ import annotations

import dataclasses

import torch

from tests.fuzz import targets
from tests.fuzz.draw import Call
from tests.fuzz.judge import Failure, compare
from tests.fuzz.outcome import run
from tests.fuzz.values import T, replaced


def doubled(t: T) -> T:
    """Every side twice as long, but those that broadcast or are empty: what fitted still fits."""
    return dataclasses.replace(t, shape=tuple(2 * n if n > 1 else n for n in t.shape))


def calls_of(call: Call) -> list[Call]:
    """The call, with each of the varied options, and at last with larger tensors; those that eager takes."""
    plain = dataclasses.replace(call, mode="backward")
    all_calls = [plain] + [dataclasses.replace(plain, options=call.options | changed) for changed in call.varied]
    last = all_calls[-1]
    all_calls.append(
        dataclasses.replace(last, args=replaced(last.args, doubled), options=replaced(last.options, doubled))
    )
    return [one for one in all_calls if run(one, "got").error is None]


def judge_compiled(call: Call) -> Failure | None | str:
    torch._dynamo.reset()
    original = targets.function
    made: dict = {}

    def compiled_function(name: str, form: str, exact: bool):
        function = original(name, form, exact)
        if exact or not made.get("on"):
            return function
        if "compiled" not in made:
            made["compiled"] = torch.compile(function, fullgraph=True, backend="aot_eager")
        return made["compiled"]

    todo = calls_of(call)
    targets.function = compiled_function
    try:
        for one in todo:
            made["on"] = True
            got = run(one, "got")
            made["on"] = False
            found = compare(one, got)
            if isinstance(found, Failure):
                return found
    finally:
        targets.function = original
        torch._dynamo.reset()
    return None if todo else "refused without the compiler"
