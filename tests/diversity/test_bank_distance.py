"""The distance from a whole bank on every backend: tiles, copies and duplicates in the bank, NaN and infinities."""

from __future__ import annotations

import pytest
import torch

from fastloss import core
from fastloss.diversity.bank_distance import Inputs, bank_distance, bank_distance_reference
from tests.conformance.cases import CASES
from tests.conformance.tools import INTERPRETING, Errors, places

pytestmark = pytest.mark.kernels

PLACES = places(next(case for case in CASES if case.name == "diversity_loss"))
each_place = pytest.mark.parametrize("place", PLACES)
each_way = pytest.mark.parametrize(
    ("mode", "metric"), [("softmin", "l1"), ("softmin", "l2"), ("softmin", "cosine"), ("mean", "l1")]
)
SIZES = ((1, 1, 1), (5, 7, 16), (2, 300, 33), (67, 9, 515), (3, 70, 2))  # images, rows and elements


def answer(function, generated, bank, mode, metric, temperature, keep=False):
    """[distances, the gradient of a weighted sum of them]"""
    x = generated.clone().requires_grad_()
    out = function(Inputs(x, bank, mode, metric, temperature, 1.0, 0.0, 256.0, keep))
    weights = torch.linspace(-1, 2, len(out), dtype=out.dtype, device=out.device)
    return out.detach().cpu(), torch.autograd.grad(out, x, weights)[0].cpu()


@each_place
@each_way
@pytest.mark.parametrize("temperature", [0.003, 1.0])
def test_against_float64(place, mode, metric, temperature):
    """Banks with a copy of an image and duplicates of it, with near copies, and one smaller than a tile. On the CPU
    with distances that are kept and without."""
    errors = Errors(torch.float32)
    for count, rows, size in SIZES:
        generator = torch.Generator().manual_seed(size)
        generated, bank = (torch.rand(n, size, generator=generator) for n in (count, rows))
        if rows > 5:
            bank[2], bank[5], bank[4] = generated[0], generated[0], generated[-1] * (1 + 2**-15)
        exact = answer(bank_distance_reference, generated.double(), bank.double(), mode, metric, temperature)
        eager = answer(bank_distance_reference, generated, bank, mode, metric, temperature)
        for keep in (False, True) if place[1] == "cpp" else (False,):
            with core.use_backend(place[1]):
                on_place = (t.to(place[0]) for t in (generated, bank))
                got = answer(lambda x: bank_distance(*x), *on_place, mode, metric, temperature, keep)
            for name, *values in zip(("distance", "gradient"), got, eager, exact, strict=True):
                errors.add(name, *values)
    errors.check()


@each_place
@each_way
def test_no_numbers(place, mode, metric):
    """A NaN or an infinity in one image leaves the others as they are; one in the bank reaches all."""
    generator = torch.Generator().manual_seed(0)
    generated, bank = (torch.rand(n, 9, generator=generator) for n in (4, 20))
    plain = answer(bank_distance_reference, generated, bank, mode, metric, 0.1)
    for position, value in ((0, torch.nan), (2, torch.inf)):
        spoilt = generated.clone()
        spoilt[position, 3] = value
        with core.use_backend(place[1]):
            keep = place[1] == "cpp"
            got = answer(lambda x: bank_distance(*x), spoilt.to(place[0]), bank.to(place[0]), mode, metric, 0.1, keep)
        others = torch.arange(4) != position
        for new, old in zip(got, plain, strict=True):
            torch.testing.assert_close(new[others], old[others])
        assert not got[0][position].isfinite()
    bank[7, 1] = torch.nan
    with core.use_backend(place[1]):
        assert (
            answer(lambda x: bank_distance(*x), generated.to(place[0]), bank.to(place[0]), mode, metric, 0.1)[0]
            .isnan()
            .all()
        )


def test_there_are_kernels():
    assert bank_distance.kernels["triton"] and bank_distance.kernels["cpp"] != INTERPRETING
