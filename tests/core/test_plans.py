"""Launch plans: a replay gives what the launcher gives, bit by bit, and who must not be passed by is not.

The values are those of the Triton interpreter (make test runs this file in it, see tests/triton/test_aot.py); what a
plan launches on a device is compared in tests/triton/test_plans.py.
"""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastloss import clip_loss, feature_distance, info_nce, lpips_distance, pixel_loss, smoothness_loss, ssim_loss
from fastloss.core import plans
from fastloss.core.backends import is_interpreting
from fastloss.image.pixel import _pixel, _pixel_total

pytestmark = pytest.mark.kernels  # run interpreted, see tests/triton/test_aot.py
interpreted = pytest.mark.skipif(not is_interpreting(), reason="needs the kernels: TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def plans_are_on(monkeypatch):
    """Tests that count launches, which may run in the same process, switch them off."""
    monkeypatch.setattr(plans, "ENABLED", True)


def images() -> tuple[Tensor, Tensor]:
    return torch.rand(2, 3, 9, 17), torch.rand(2, 3, 9, 17, requires_grad=True)


def losses():
    image, pred = images()
    last = torch.rand(2, 3, 9, 17).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, guide = torch.rand(2, 1, 9, 17), torch.rand(2, 3, 9, 17)
    query, key = torch.randn(37, 24, requires_grad=True), torch.randn(37, 24, requires_grad=True)
    scale = torch.tensor(5.0, requires_grad=True)
    shapes = ((2, 8, 5, 5), (2, 16, 3, 3))
    features, targets = [torch.rand(s, requires_grad=True) for s in shapes], [torch.rand(s) for s in shapes]
    many, others = [torch.rand(2, 5, requires_grad=True) for _ in range(10)], [torch.rand(2, 5) for _ in range(10)]
    lin = [torch.rand(s[1]) for s in shapes]
    yield "pixel", lambda: pixel_loss(image, pred), [pred]
    yield "pixel, channels_last and weight", lambda: pixel_loss(image, last, p=1, weight=weight), [last]
    yield "pixel, map", lambda: pixel_loss(image, pred, reduction="none").square().sum(), [pred]
    yield "smoothness", lambda: smoothness_loss(pred, guide=guide, weight=weight), [pred]
    yield "ssim", lambda: ssim_loss(image, pred), [pred]
    yield "clip", lambda: clip_loss(query, key, logit_scale=scale, normalize=True), [query, key, scale]
    yield "clip, half", lambda: clip_loss(query.bfloat16(), key.bfloat16(), logit_scale=5.0), [query, key]
    yield "info_nce", lambda: info_nce(query, key, reduction="sum"), [query, key]
    yield "feature_distance", lambda: feature_distance(features, targets), features
    yield (
        "feature_distance, a table",
        lambda: feature_distance(many, others, criterion="l2", reduction="none").sum(),
        many,
    )
    yield "lpips", lambda: lpips_distance(features, targets, lin).sum(), features


CASES = {name: (loss, wrt) for name, loss, wrt in losses()}


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_a_replay_gives_the_launchers_values(name):
    loss, wrt = CASES[name]

    def both() -> list[Tensor]:
        out = loss()
        return [out.detach(), *torch.autograd.grad(out, wrt)]

    wanted = both()
    for _ in range(3):  # recorded, replayed, replayed with all that is prepared for it
        for got, want in zip(both(), wanted, strict=True):
            assert got.stride() == want.stride()
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def recorded(op=_pixel_total, stage="_fwd_plans"):
    """The plans of an op that are recorded, counted by what they refuse and replay."""
    return getattr(op, stage).plan.cache_info().currsize


def call(x: Tensor, y: Tensor) -> Tensor:
    return _pixel_total(x, y, None, "l2", 2.0, True, [1.0 / x.numel()])


def planned(x: Tensor, y: Tensor) -> plans.Plan | None:
    return _pixel_total._fwd_plans.ready((x, y, None, "l2", 2.0, True, [1.0 / x.numel()]))


@interpreted
def test_other_memory_other_layouts_and_the_same_tensor_twice():
    x, y = torch.rand(3, 31), torch.rand(3, 31)
    for _ in range(2):
        call(x, y)
    plan = planned(x, y)
    assert plan is not None and "def replay" in plan.source
    for a, b in ((torch.rand(3, 31), torch.rand(3, 31)), (x, x), (x.clone(), y)):
        assert planned(a, b) is plan
        torch.testing.assert_close(call(a, b), (a - b).square().mean())
    shifted = torch.rand(3 * 31 + 1)[1:].view(3, 31)
    for other in (shifted, x.T.contiguous().T, x.bfloat16(), torch.rand(31, 3).T):
        assert planned(other, y) is None
        torch.testing.assert_close(call(other, y), (other.float() - y).square().mean())


@interpreted
def test_a_plan_recorded_with_one_tensor_twice_serves_two():
    x = torch.rand(3, 29)
    for _ in range(2):
        call(x, x)
    y = torch.rand(3, 29)
    assert planned(x, y) is not None
    torch.testing.assert_close(call(x, y), (x - y).square().mean())


@interpreted
def test_an_address_that_comes_back_with_other_values_and_as_another_dtype():
    """As memory does that is freed and given out again."""
    memory = torch.empty(2, 4096, dtype=torch.uint8)
    for i in range(12):
        size, dtype = ((16, 64), torch.float32) if i % 3 else ((32, 64), torch.bfloat16)
        x, y = (m.view(dtype).view(size).copy_(torch.rand(size)) for m in memory)
        torch.testing.assert_close(call(x, y), (x.double() - y.double()).square().mean().float())
    assert planned(x, y) is not None


def test_a_replay_runs_on_the_device_of_its_tensors(monkeypatch):
    """Two devices are made up, and the tensor is a fake one on the second."""
    pytest.importorskip("triton")
    from fastloss.core.kernels import c_launch

    entered, current = [], [0]

    class Device(contextlib.nullcontext):
        def __enter__(self):
            entered.append(self.enter_result)

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[0], raising=False)
    with FakeTensorMode():
        x = torch.empty(2, device="cuda:1")
    replay = c_launch.on_its_device(lambda x: "replayed", (x,))
    assert replay(x) == "replayed" and entered == [1]
    current[0] = 1
    assert replay(x) == "replayed" and entered == [1]


@interpreted
def test_outputs_are_new_each_time():
    x, y = torch.rand(3, 23), torch.rand(3, 23, requires_grad=True)
    first = [call(x, y) for _ in range(4)]
    assert len({out.data_ptr() for out in first}) == 4
    gradients = [torch.autograd.grad(out, y)[0] for out in first]
    assert len({g.data_ptr() for g in gradients}) == 4


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(str(op))
        return op(*args, **(kwargs or {}))


class Wrapped(Tensor):
    pass


@interpreted
def test_modes_subclasses_negated_views_and_transforms_are_not_passed_by():
    x, y = torch.rand(3, 19), torch.rand(3, 19, requires_grad=True)
    for _ in range(3):
        torch.autograd.grad(call(x, y), y)
    assert planned(x, y) is not None
    with Seen() as seen:
        torch.autograd.grad(call(x, y), y)
    assert [op for op in seen.ops if "fastloss" in op] == [
        "fastloss.pixel_total_fwd.default", "fastloss.pixel_total_bwd.default"
    ]  # fmt: skip
    assert planned(x.as_subclass(Wrapped), y) is None
    negated = torch.complex(torch.zeros(3, 19), -x).conj().imag
    assert negated.is_neg() and planned(negated, y) is None
    for _ in range(3):
        torch.testing.assert_close(call(negated, y), (x - y).square().mean())
    with torch.autocast("cpu"):
        assert planned(x, y) is None
    with torch.profiler.profile() as profile:
        call(x, y)
    assert any(event.name == "fastloss::pixel_total_fwd" for event in profile.events())
    rows = torch.autograd.grad(call(x, y), y, torch.tensor([1.0, 2.0]), is_grads_batched=True)[0]
    torch.testing.assert_close(rows[1], 2 * rows[0])


@interpreted
def test_deterministic_mode_has_plans_of_its_own():
    x, y = torch.rand(3, 13), torch.rand(3, 13)
    for _ in range(2):
        call(x, y)
    before = planned(x, y)
    torch.use_deterministic_algorithms(True)
    try:
        assert planned(x, y) is None
        for _ in range(2):
            call(x, y)
        plan = planned(x, y)
        assert plan is not None and plan is not before
        assert "empty_strided(" in plan.source  # which fills what it allocates, if that is asked for
    finally:
        torch.use_deterministic_algorithms(False)


@interpreted
def test_plans_are_bounded_and_the_first_call_of_a_shape_records_none():
    plan = _pixel._fwd_plans
    for n in range(1, plans.MOST + 10):
        plan.plan((n,))
    assert plan.plan.cache_info().currsize == plans.MOST
    x = torch.rand(3, 11)
    call(x, x + 1)
    assert planned(x, x + 1) is None


def test_threads_share_plans():
    pytest.importorskip("triton")

    def launcher(x: Tensor, factor: float) -> Tensor:
        return torch.mul(x, factor, out=x.new_empty(x.shape)).cumsum(0)

    whole, x, errors = plans.Planned(launcher), torch.rand(37), []

    def work(k: int) -> None:
        try:
            for i in range(200):
                factor = float((k + i) % 7)
                torch.testing.assert_close(whole(x, factor), (x * factor).cumsum(0), rtol=0, atol=0)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert whole.plan(plans.signature((x, 1.0))).replay is not None


@interpreted
def test_double_backward_and_a_second_backward_of_planned_calls():
    x, y = torch.rand(3, 7, dtype=torch.float32), torch.rand(3, 7, requires_grad=True)
    for _ in range(3):
        torch.autograd.grad(call(x, y), y)
    out = call(x, y)
    first = torch.autograd.grad(out, y, retain_graph=True)[0]
    again = torch.autograd.grad(out, y, create_graph=True)[0]
    torch.testing.assert_close(first, again)
    second = torch.autograd.grad(again.sum(), y)[0]
    torch.testing.assert_close(second, torch.full_like(y, 2 / y.numel()))


def asks(x: Tensor) -> Tensor:
    return x * 2 if x.sum().item() > 0 else x


def returns_its_argument(x: Tensor) -> Tensor:
    return x.view(-1)


@pytest.mark.parametrize("launcher", [asks, returns_its_argument], ids=lambda fn: fn.__name__)
def test_what_is_no_plan_goes_on_as_it_is_written(launcher):
    pytest.importorskip("triton")
    whole = plans.Planned(launcher)
    x = torch.rand(5)
    for _ in range(4):
        torch.testing.assert_close(whole(x), launcher(x))
    plan = whole.plan(plans.signature((x,)))
    assert plan.replay is None and plan.refused


def test_torch_operators_alone_are_a_plan_too():
    pytest.importorskip("triton")

    def launcher(x: Tensor, parts: list[Tensor], factor: float) -> tuple[Tensor, Tensor]:
        work = x.new_empty(2, *x.shape)
        torch.mul(x.T, factor, out=work[1].T)
        work[0].copy_(work[1]).add_(parts[1])
        return work.sum(0), torch.cat(parts)[1:]

    whole = plans.Planned(launcher)
    for _ in range(4):
        x, parts = torch.rand(3, 3), [torch.rand(2, 3), torch.rand(3, 3)]
        for got, want in zip(whole(x, parts, 2.0), launcher(x, parts, 2.0), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert whole.plan(plans.signature((x, parts, 2.0))).replay is not None
    torch.testing.assert_close(whole(x, parts, 3.0)[0], launcher(x, parts, 3.0)[0])
