"""Hardness up to 1000 at temperature 0.07, where (1 + hardness) s has no digits left for the difference of two logits.

The conformance tests' tolerance over rows enough that eager is not exact by luck. The vectors have unit length
already, so that
the logits themselves, whose rounding counts hardness times, are the same product in all; debiased forms normalise.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastloss import NegativeSampling
from tests.conformance.cases import CASES
from tests.conformance.test_every_loss import compare, inputs
from tests.conformance.tools import INTERPRETING, Errors, places

IDS = {True: torch.arange(6) // 2, False: torch.arange(64) // 2}[INTERPRETING]


def _hard(hardness: float, tau_plus: float = 0.0, margin: float | None = None, **options) -> dict:
    sampling = NegativeSampling(tau_plus, hardness, margin)
    return {"sampling": sampling, "temperature": 0.07, "normalize": tau_plus > 0, "reduction": "sum"} | options


SOME_IDS = {"query_ids": IDS, "key_ids": IDS}
FORMS = {
    "info_nce": [{}, {"symmetric": True}, {"include_positive": False}, {"tau_plus": 0.1, "margin": 0.2}],
    "info_nce masked": [SOME_IDS, {"targets": IDS}],
    "info_nce shared negatives": [{}, {"in_batch": True, "symmetric": True}, {"in_batch": True, "margin": 0.2}],
    "info_nce bank": [{}, {"tau_plus": 0.1}],
    "info_nce frozen keys": [SOME_IDS],
    "info_nce own negatives": [{}, {"in_batch": True, "tau_plus": 0.1}, {"in_batch": True, "margin": 0.2}],
    "nt_xent_loss": [{}, {"ids": IDS, "tau_plus": 0.1}, {"margin": 0.2, "include_positive": False}],
}
SHAPES = {
    "info_nce": (64, 32), "info_nce shared negatives": (64, 60, 32), "info_nce bank": (64, 100, 32),
    "info_nce own negatives": (64, 60, 32), "nt_xent_loss": (64, 32), "info_nce frozen keys": (64, 32),
    "info_nce masked": (64, 32),
}  # fmt: skip
ROWS = [
    pytest.param(
        case, *((place.values[0], options) if hasattr(place, "values") else (place, options)),
        id=f"{case.name}-{'-'.join(place.values[0] if hasattr(place, 'values') else place)}-{k}",
        marks=getattr(place, "marks", ()),
    )
    for case in CASES if case.name in FORMS
    for place in places(case)
    for k, options in enumerate(FORMS[case.name])
]  # fmt: skip


@pytest.mark.parametrize("hardness", [10, 1000] if INTERPRETING else [10, 100, 1000])
@pytest.mark.parametrize(("case", "place", "options"), ROWS)
def test_hardness_keeps_its_digits(case, place, options, hardness):
    """Over many rows: on a few of them eager may round to the exact number by luck."""
    errors = Errors(torch.float32)
    shape = case.shapes[0] if INTERPRETING else SHAPES[case.name]
    for seed in errors.draws(2 if INTERPRETING else 8, 16):
        args = tuple(F.normalize(t, dim=-1) for t in inputs(case, shape, torch.float32, place[0], seed))
        compare(case, place, args, _hard(hardness, **options), errors, "sum", str(seed))
    errors.check()
