"""Calls that go straight to a launch plan: the same values, and only where a call's signature says all about it.

In the Triton interpreter, as test_plans.py; counts and times are in tests/triton/test_plans.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss import PixelLoss, pixel_loss, smoothness_loss, ssim_loss
from fastloss.core import planned_calls, plans
from fastloss.core.backends import is_interpreting

pytestmark = pytest.mark.kernels  # run interpreted, see tests/triton/test_aot.py
interpreted = pytest.mark.skipif(not is_interpreting(), reason="needs the kernels: TRITON_INTERPRET=1")
ORDINARY = 3  # calls: one as written, one recorded, one replayed, which makes the shortcut


@pytest.fixture(autouse=True)
def plans_are_on(monkeypatch):
    """Tests that count launches, which may run in the same process, switch them off."""
    monkeypatch.setattr(plans, "ENABLED", True)


@pytest.fixture
def taken(monkeypatch) -> list[Tensor]:
    """The results of calls that went straight to their plan."""
    found: list[Tensor] = []
    call = planned_calls._Shortcut.__call__

    def counted(self, given):
        found.append(out := call(self, given))
        return out

    monkeypatch.setattr(planned_calls._Shortcut, "__call__", counted)
    return found


def images(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.rand(shape), torch.rand(shape, requires_grad=True)


@interpreted
@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: pixel_loss(x, y, p=1),
        lambda x, y: pixel_loss(image_pred=y, image=x, reduction="none").sum(),
        lambda x, y: PixelLoss(p="huber", delta=0.3)(x, y),
        lambda x, y: smoothness_loss(y, p=2),
        lambda x, y: ssim_loss(x, y),
    ],
    ids=["pixel", "pixel, map, by names", "module", "smoothness", "ssim"],
)
def test_values_and_gradients_are_those_of_the_ordinary_call(loss, taken):
    got = []
    torch.manual_seed(0)
    x, y = images(2, 3, 12, 14)
    for i in range(ORDINARY + 2):  # on other memory each time, with the same values
        a, b = (x, y) if i % 2 == 0 else (x.clone(), y.detach().clone().requires_grad_())
        out = loss(a, b)
        got.append([out.detach(), *torch.autograd.grad(out, b)])
    assert len(taken) in (0, 2)  # of ssim_loss: an op's output that something is done to
    for row in got[1:]:
        for mine, first in zip(row, got[0], strict=True):
            torch.testing.assert_close(mine, first, rtol=0, atol=0)


@interpreted
def test_shortcuts_are_taken_for_plain_calls(taken):
    x, y = images(3, 1, 5, 6)
    for _ in range(ORDINARY + 4):
        pixel_loss(x, y)
    assert len(taken) == 4
    for _ in range(ORDINARY + 1):
        smoothness_loss(y)
    assert len(taken) == 5


@interpreted
def test_what_a_signature_does_not_say_takes_the_ordinary_way(taken):
    x, y = images(3, 2, 5, 7)
    for _ in range(ORDINARY + 1):
        pixel_loss(x, y)
    assert len(taken) == 1
    want = (x - y).square().mean()
    with fastloss.use_backend("reference"):
        assert type(pixel_loss(x, y).grad_fn).__name__ == "DivBackward0"
    assert fastloss.explain(pixel_loss, x, y)[0].op == "pixel"
    with torch.no_grad():
        torch.testing.assert_close(pixel_loss(x, y), want)
    with torch.autocast("cpu"):
        torch.testing.assert_close(pixel_loss(x, y), want)
    both = x.clone().requires_grad_()
    assert torch.autograd.grad(pixel_loss(both, y), both)[0].shape == x.shape
    tangent = torch.func.jvp(lambda t: pixel_loss(x, t), (y.detach(),), (torch.ones_like(y),))[1]
    torch.testing.assert_close(tangent, 2 * (y - x).mean())
    with torch.inference_mode():
        made = x.clone()
    torch.testing.assert_close(pixel_loss(made, y), want)
    assert len(taken) == 1
    with pytest.raises(ValueError, match="shape"):
        pixel_loss(x[:2], y)
    with pytest.raises(TypeError, match="did you mean 'reduction'"):
        pixel_loss(x, y, reductions="mean")
    pixel_loss(x, y)
    assert len(taken) == 2


@interpreted
def test_an_argument_twice_and_one_that_the_function_makes_have_no_shortcut(taken):
    x, y = images(3, 3, 5, 5)
    weight = torch.rand(3, 1, 5, 5)
    for _ in range(ORDINARY + 2):
        torch.testing.assert_close(pixel_loss(y, y), torch.zeros(()))
        pixel_loss(x, y, weight=weight)
    assert not taken
    for _ in range(ORDINARY):
        torch.testing.assert_close(pixel_loss(x, y), (x - y).square().mean())


@interpreted
def test_shortcuts_are_bounded(monkeypatch, taken):
    monkeypatch.setattr(plans, "MOST", 3)
    calls = planned_calls.PlannedCalls(lambda x, y: pixel_loss.__wrapped__(x, y))
    for n in range(1, 9):
        x, y = images(n, 1, 3, 3)
        for _ in range(ORDINARY + 1):
            calls(x, y)
        assert len(calls.shortcuts) <= 3
    assert len(taken) == 8
