"""Totals: one launch beside the loss's own in the forward; values and derivatives are those of op and arithmetic."""

from __future__ import annotations

import importlib

import pytest
import torch

from fastloss import core, pixel_loss, smoothness_loss
from tests.conformance.cases import CASES
from tests.conformance.tools import places

PLACES = [p for p in places(next(case for case in CASES if case.name == "pixel_loss")) if "triton" in str(p)]
each_place = pytest.mark.parametrize("place", PLACES)
CALLS = {
    "pixel": lambda x, y: pixel_loss(x, y, p=1),
    "l1": lambda x, y: smoothness_loss(y),
    "sum of means": lambda x, y: smoothness_loss(y, p=2, reduction="sum"),
    "isotropic": lambda x, y: smoothness_loss(y, p="isotropic"),
    "sums": lambda x, y: smoothness_loss(y, convention="basicsr", reduction="sum"),
    "mean of sums": lambda x, y: smoothness_loss(y, convention="torchmetrics"),
    "channels_last": lambda x, y: smoothness_loss(y.contiguous(memory_format=torch.channels_last)),
    "volume": lambda x, y: smoothness_loss(y[:, :, None], order=2),
}


def pair(place):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(2, 3, 9, 21, generator=generator).to(place[0]).requires_grad_() for _ in range(2)]


def values(backend, call, inputs):
    with core.use_backend(backend):
        loss = call(*inputs)
        return loss, *torch.autograd.grad(3 * loss, inputs, allow_unused=True)


@each_place
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_totals_are_the_references_and_one_launch(place, call, monkeypatch):
    kernels = importlib.import_module("fastloss.core.kernels.scaled_sum")
    launches, kernel = [], kernels._total_kernel
    counted = type("Counted", (), {"__getitem__": lambda self, grid: launches.append(1) or kernel[grid]})
    monkeypatch.setattr(kernels, "_total_kernel", counted())
    inputs = pair(place)
    got = values(place[1], call, inputs)
    assert len(launches) == 1
    torch.testing.assert_close(got, values("reference", call, inputs), rtol=1e-5, atol=1e-7)


@each_place
def test_totals_of_many_partials(place, monkeypatch):
    kernels = importlib.import_module("fastloss.core.kernels.scaled_sum")
    partials = torch.arange(3 * 5, dtype=torch.float32, device=place[0]).reshape(5, 3).T
    for most in (5, 4):
        monkeypatch.setattr(kernels, "MOST", most)
        expected = (partials.sum(1) * torch.tensor([1.0, 0.5, 2.0], device=place[0])).sum()
        torch.testing.assert_close(kernels.total_of(partials, [1.0, 0.5, 2.0]), expected)


@each_place
def test_totals_are_differentiable_twice(place):
    inputs, second = pair(place), []
    for backend in (place[1], "reference"):
        with core.use_backend(backend):
            first = torch.autograd.grad(pixel_loss(*inputs), inputs, create_graph=True)
            second.append(torch.autograd.grad(sum((g * g).sum() for g in first), inputs))
    torch.testing.assert_close(*second)
