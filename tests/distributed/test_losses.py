"""Every form and option on 1, 2 and 3 ranks (7, 5 and 9 rows) against one process that has the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastloss import core
from tests.conformance.tools import Errors
from tests.distributed.cases import CASES, Case, counts_of, result
from tests.distributed.worker import run


def of_all_ranks(parts: list[Tensor], counts: list[int], case: Case) -> Tensor:
    """Losses of rows, or what is one a row, in the order of one process: of NT-Xent view_a's rows come first."""
    if case.loss != "nt_xent_loss":
        return torch.cat(parts, -1)
    return torch.cat([half for view in range(2) for half in (p.chunk(2)[view] for p in parts)])


def expected(case: Case, dtype: torch.dtype, counts: list[int]) -> dict:
    with core.use_backend("reference"):
        one = result(case, dtype, counts, None)
    if case.options.get("reduction") == "none":  # of each rank's own objective the mean is followed
        one["grads"] = [grad / len(counts) for grad in one["grads"]]
    return one


@pytest.mark.parametrize("world", [1, 2, 3])
def test_value_and_averaged_gradients_are_those_of_one_process(world, tmp_path):
    ranks = run("losses", world, tmp_path)
    errors = {loss: Errors(torch.float32) for loss in {case.loss for case in CASES.values()}}
    for name, case in CASES.items():
        counts = counts_of(case, world)
        exact, eager = (expected(case, dtype, counts) for dtype in (torch.float64, torch.float32))
        for dtype in (torch.float64, torch.float32):
            got = [rank[name, dtype] for rank in ranks]
            rows = got[0]["loss"].ndim > 0
            losses = [of_all_ranks([g["loss"] for g in got], counts, case)] if rows else [g["loss"] for g in got]
            extra = [
                of_all_ranks(list(parts), counts, case) for parts in zip(*(g["by-products"] for g in got), strict=True)
            ]
            ours = {"loss": losses, "by-products": [extra] if extra else [], "grads": [g["grads"] for g in got]}
            for what, of_ranks in ours.items():
                for values in of_ranks:
                    values = values if isinstance(values, list) else [values]
                    wanted = exact[what] if isinstance(exact[what], list) else [exact[what]]
                    theirs = eager[what] if isinstance(eager[what], list) else [eager[what]]
                    for value, want, their in zip(values, wanted, theirs, strict=True):
                        if dtype == torch.float64 or want.dtype == torch.bool:
                            torch.testing.assert_close(value, want, rtol=0, atol=1e-10, msg=lambda m: f"{name}: {m}")
                        else:
                            errors[case.loss].add(what, value, their, want, name)
    for each in errors.values():
        each.check()
