"""The tap on every backend: value and gradients of two terms, in one pass. Layouts and long lists on all kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastloss import core, feature_distance, tap
from tests.conformance.cases import CASES
from tests.conformance.tools import INTERPRETING, Errors, places

pytestmark = pytest.mark.kernels

PLACES = places(next(case for case in CASES if case.name == "feature_distance"))
OPTIONS = ({}, {"criterion": "l2", "weight": 0.5}, {"criterion": "charbonnier", "eps": 0.1, "reduction": "sum"},
           {"criterion": "smooth_l1", "beta": 0.3, "reduction": "none", "weight": -2.0})  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPE = (2, 4, 9, 5) if INTERPRETING else (2, 16, 33, 17)
each_place = pytest.mark.parametrize("place", PLACES)
each_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def pair(dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    f, noise = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    t = torch.where(noise.abs() < 0.3, f, f + 0.5 * noise)
    return f.to(device, dtype), t.to(device, dtype)


def behind(feature):
    """Layers behind the tap."""
    return (F.avg_pool2d(feature, 2) ** 2).float().sum()


def tapped(backend, f, t, options):
    f, t = f.detach().requires_grad_(), t.detach().requires_grad_()
    with core.use_backend(backend):
        handed_on, loss = tap(f, t, **options)
        assert torch.equal(handed_on, f)
        grads = torch.autograd.grad(behind(handed_on) + 3 * loss.sum(), (f, t))
    return loss, *grads


def two_terms(f, t, options):
    f, t = f.detach().requires_grad_(), t.detach().requires_grad_()
    options = dict(options)
    weights = [options.pop("weight", 1.0)]
    with core.use_backend("reference"):
        loss = feature_distance([f], [t], weights=weights, **options)
    return loss, *torch.autograd.grad(behind(f) + 3 * loss.sum(), (f, t))


@each_place
@each_option
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_is_the_sum_of_both(place, options, dtype):
    errors, (f, t) = Errors(dtype), pair(dtype, place[0])
    for layout in (torch.contiguous_format, torch.channels_last):
        f = f.contiguous(memory_format=layout)
        got, same, exact = (tapped(place[1], f, t, options), two_terms(f, t, options),
                            two_terms(f.double(), t.double(), options))  # fmt: skip
        assert [g.dtype for g in got] == [torch.float32, dtype, dtype]
        for name, *each in zip(("value", "feature", "target"), got, same, exact, strict=True):
            errors.add(name, *each)
    errors.check()


@each_place
@each_option
def test_either_output_may_go_unused(place, options):
    f, t = pair(device=place[0])
    whole = two_terms(f, t, options)
    f.requires_grad_()
    with core.use_backend(place[1]):
        handed_on, loss = tap(f, t, **options)
    (through,) = torch.autograd.grad(behind(handed_on), f, retain_graph=True)
    (own,) = torch.autograd.grad(3 * loss.sum(), f, retain_graph=True)
    torch.testing.assert_close(through + own, whole[1], rtol=1e-5, atol=1e-6)
    for _ in range(2):  # as often as asked
        (both,) = torch.autograd.grad(behind(handed_on) + 3 * loss.sum(), f, retain_graph=True)
        torch.testing.assert_close(both, whole[1], rtol=1e-5, atol=1e-6)


@each_place
@each_option
def test_double_backward(place, options):
    second = []
    for backend in (place[1], "reference"):
        f, t = (x.requires_grad_() for x in pair(device=place[0]))
        with core.use_backend(backend):
            handed_on, loss = tap(f, t, **options)
            (first,) = torch.autograd.grad(behind(handed_on) + (loss**2).sum(), f, create_graph=True)
            second.append(torch.autograd.grad((first**3).sum(), f)[0])
    torch.testing.assert_close(*second, rtol=1e-4, atol=1e-5 * second[1].abs().max().item())


@each_place
def test_layers_of_every_layout_on_every_kernel(place):
    """What the conformance tests' small lists do not reach: more layers than a launch takes, mixed layouts, several
    tiles."""
    shapes = [(2, 1 + i % 3, 1 + i % 2, 3) for i in range(10)] + [(2, 3, 170, 65 if INTERPRETING else 171)]
    generator = torch.Generator().manual_seed(1)
    features = [torch.randn(s, generator=generator).to(place[0]) for s in shapes]
    targets = [f + torch.randn(f.shape, generator=generator).to(place[0]).round() for f in features]
    features[2::3] = [f.contiguous(memory_format=torch.channels_last) for f in features[2::3]]
    targets[1::2] = [t.contiguous(memory_format=torch.channels_last) for t in targets[1::2]]
    found = []
    for backend in (place[1], "reference"):
        wrt = [x.detach().requires_grad_() for x in (*features, *targets)]
        with core.use_backend(backend):
            for options in ({"reduction": "none"}, {"criterion": "smooth_l1", "beta": 0.4}):
                loss = feature_distance(wrt[: len(shapes)], wrt[len(shapes) :], **options)
                found.append((loss, *torch.autograd.grad(loss.sum(), wrt)))
    for ours, theirs in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(INTERPRETING, reason="the interpreter is not compiled")
@each_option
def test_compiles_into_one_graph(options):
    torch._dynamo.reset()

    def step(f, t):
        handed_on, loss = tap(f, t, **options)
        return behind(handed_on) + 3 * loss.sum()

    f, t = (x.requires_grad_() for x in pair())
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, expected = (torch.autograd.grad(call(f, t), (f, t)) for call in (compiled, step))
    torch.testing.assert_close(got, expected)


def test_bad_input_and_what_the_kernels_do_not_take():
    f, t = pair()
    with pytest.raises(ValueError, match=r"targets\[0\]: expected the shape of features\[0\]"):
        tap(f, t[:1])
    with pytest.raises(ValueError, match=r"weights\[0\]: expected a finite number"):
        tap(f, t, weight=float("nan"))
    handed_on, loss = tap(f.double(), t)
    assert loss.dtype == torch.float64 and torch.equal(handed_on, f.double())
