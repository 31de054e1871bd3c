"""Hardness up to 1000 at temperature 0.07, where (1 + hardness) s has no digits left for the difference of two logits.

The battery's tolerance, but not in float64, which is its own oracle: there 64 eps are less than what the conditioning
makes of its rounding, hardness times the largest logit.
"""

from __future__ import annotations

import pytest
import torch

from fastloss import NegativeSampling
from tests.battery import INTERPRETING, Errors, places
from tests.cases import CASES
from tests.cases_contrastive import IDS
from tests.test_losses import compare, inputs


def _hard(hardness: float, tau_plus: float = 0.0, margin: float | None = None, **options) -> dict:
    return {"sampling": NegativeSampling(tau_plus, hardness, margin), "temperature": 0.07} | options


SOME_IDS = {"query_ids": IDS, "key_ids": IDS}
FORMS = {
    "info_nce": [{}, {"symmetric": True}, {"include_positive": False}, {"tau_plus": 0.1, "margin": 0.2}],
    "info_nce masked": [SOME_IDS, {"targets": torch.arange(6) // 2, "tau_plus": 0.1}],
    "info_nce shared negatives": [{}, {"in_batch": True, "symmetric": True}, {"in_batch": True, "margin": 0.2}],
    "info_nce bank": [{}, {"tau_plus": 0.1}],
    "info_nce frozen keys": [SOME_IDS],
    "info_nce own negatives": [{}, {"in_batch": True, "tau_plus": 0.1}, {"in_batch": True, "margin": 0.2}],
    "nt_xent_loss": [{}, {"ids": IDS, "tau_plus": 0.1}, {"margin": 0.2, "include_positive": False}],
}
SHAPES = {  # where not the case's own, to which ids belong: some width, so that normalised vectors round as usual
    "info_nce": (64, 32), "info_nce shared negatives": (64, 100, 32), "info_nce bank": (64, 200, 32),
    "info_nce own negatives": (64, 60, 32),
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


@pytest.mark.parametrize("hardness", [10, 100, 1000])
@pytest.mark.parametrize(("case", "place", "options"), ROWS)
def test_hardness_keeps_its_digits(case, place, options, hardness):
    """Over several draws, as eager alone rounds to the exact number now and then."""
    for dtype in (torch.float32,) if INTERPRETING else (torch.float32, torch.bfloat16):
        errors = Errors(dtype)
        shape = case.shapes[0] if INTERPRETING else SHAPES.get(case.name, case.shapes[0])
        for seed in range(2 if INTERPRETING else 6):
            args = inputs(case, shape, dtype, place[0], seed)
            compare(case, place, args, _hard(hardness, **options) | {"reduction": "sum"}, errors, "sum", str(seed))
        errors.check()
