"""CompositeLoss with a part that is constant for a while: a number, or a tensor without a gradient."""

from __future__ import annotations

import math

import pytest
import torch

from fastloss import CompositeLoss
from tests.fusion.test_composite import ALL, layered, make, reference, scalars


def constants(value):
    """A part that is constant, in each way that it may be passed."""
    return (value, torch.tensor(float(value)), torch.tensor(float(value), dtype=torch.float64).detach())


def begin(loss, a, steps=((4.0, 3.0),)):
    """Steps in which b and c learn and a is constant; the leaves of the last one and its total."""
    for b, c in steps:
        x = torch.tensor([b, c], requires_grad=True)
        total, parts = loss({"b": x[0], "c": x[1], "a": a}, last_layer=x)
    return x, total, parts


@pytest.mark.parametrize("a", [0.0, 2, 0.5])
@pytest.mark.parametrize("weighting", ALL)
def test_a_constant_part_enters_the_total_and_no_gradient(weighting, a):
    """With multipliers of 1, b + 2 c + 3 a; with uncertainty half of that, and c gets vqgan's |1| / |2| from two."""
    for form in constants(a):
        loss = CompositeLoss({"b": 1.0, "c": 2.0, "a": 3.0}, weighting=weighting, **reference(weighting))
        x, total, parts = begin(loss, form)
        half = 0.5 if weighting == "uncertainty" else 1.0
        assert total.item() == pytest.approx(half * (4 + 2 * 3 + 3 * a), rel=1e-3)
        total.backward()
        assert x.grad.tolist() == pytest.approx([half, 2 * half], rel=1e-3)
        assert parts["a"].item() == a and isinstance(parts["a"], torch.Tensor) and not parts["a"].requires_grad


def test_fixed_with_numbers_alone():
    total, parts = CompositeLoss({"a": 2.0, "b": 1.0})(a=1.5, b=1)
    assert total.item() == 4.0 and total.dtype == torch.float32 and parts["b"].item() == 1.0


def test_uncertainty_holds_the_log_variance_of_a_constant_part():
    for form in constants(0.0):
        loss = CompositeLoss({"b": 1.0, "c": 2.0, "a": 3.0}, weighting="uncertainty", log_variance=0.4)
        optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
        for _ in range(50):
            optimizer.zero_grad()
            begin(loss, form)[1].backward()
            optimizer.step()
        a, b, c = loss.rule.log_variances.tolist()
        assert a == pytest.approx(0.4) and b > 0.8 and c > 0.8
        x, total, _ = begin(loss, torch.tensor(5.0, requires_grad=True))
        total.backward()  # it has begun: 1/2 - w L / (2 e^s)
        grad = loss.rule.log_variances.grad[0].item()
        assert total.isfinite() and grad == pytest.approx(0.5 - 15 / (2 * math.exp(0.4)), rel=1e-5)


@pytest.mark.parametrize("weighting", ["dwa", "relobralo"])
def test_the_others_balance_is_as_without_the_constant_part(weighting):
    history = [(4.0, 3.0), (2.0, 3.0), (1.0, 3.5), (0.5, 1.0)]
    for form in constants(0.7):
        loss = CompositeLoss({"b": 1.0, "c": 2.0, "a": 3.0}, weighting=weighting)
        alone = CompositeLoss({"b": 1.0, "c": 2.0}, weighting=weighting)
        for b, c in history:
            _, total, _ = begin(loss, form, [(b, c)])
            expected, _ = alone(scalars(b=b, c=c))
            assert total.item() == pytest.approx(expected.item() + 2.1, rel=1e-6)
            assert loss.current_weights["a"].item() == 3.0
        assert abs(loss.current_weights["b"].item() - 1.0) > 1e-4


def balance(ratios, temperature):
    shares = [math.exp(r / temperature) for r in ratios]
    return [len(ratios) * s / sum(shares) for s in shares]


def test_dwa_compares_a_part_from_where_it_begins():
    loss = CompositeLoss({"a": 1.0, "b": 1.0}, weighting="dwa")
    b, a = [8.0, 4.0, 2.0, 2.0, 1.0, 1.0], [0.0, 0.0, 0.0, 5.0, 10.0, 4.0]
    weights = []
    for t in range(6):
        x = torch.tensor([b[t], a[t]], requires_grad=True)
        loss(b=x[0], a=x[1] if t >= 3 else 0.0)
        weights.append([loss.current_weights[name].item() for name in ("b", "a")])
    assert weights[:3] == [[1.0, 1.0]] * 3  # the only one that is not constant counts 1
    assert weights[3] == pytest.approx(balance([2 / 4, 1.0], 2))  # a has no past yet
    assert weights[4] == pytest.approx(balance([2 / 2, 1.0], 2))
    assert weights[5] == pytest.approx(balance([1 / 2, 10 / 5], 2))


def test_relobralo_compares_a_part_with_its_own_first_loss():
    loss = CompositeLoss({"a": 1.0, "b": 1.0}, weighting="relobralo", alpha=0.5, beta=0.0)  # rho = 0: the first losses
    b, a = [8.0, 4.0, 2.0, 2.0], [0.0, 0.0, 5.0, 10.0]
    for t in range(4):
        x = torch.tensor([b[t], a[t]], requires_grad=True)
        loss(b=x[0], a=x[1] if t >= 2 else torch.tensor(0.0))
        got = [loss.current_weights[name].item() for name in ("b", "a")]
        if t < 2:
            expected = [1.0, 1.0]
        elif t == 2:  # a has no past yet: ratio 1
            expected = [0.5 * (f + p) for f, p in zip(balance([2 / 8, 1], 1), balance([2 / 4, 1], 1), strict=True)]
        else:
            expected = [0.5 * (f + p) for f, p in zip(balance([2 / 8, 2], 1), balance([2 / 2, 2], 1), strict=True)]
        assert got == pytest.approx(expected, rel=1e-6)


def test_vqgan_keeps_the_ratio_of_a_part_that_is_constant_again():
    loss = make("vqgan")
    w, parts = layered()
    for form in constants(0.0):
        assert loss(b=parts["b"], a=form, last_layer=w)[0].item() == 11.0
        assert loss.current_weights["a"].item() == 0.5
    loss(parts, last_layer=w)
    ratio = 5 / (10 + 1e-4)
    for form in constants(2.0):
        total, _ = loss(b=parts["b"], a=form, last_layer=w)
        assert total.item() == pytest.approx(11 + 0.5 * ratio * 2)
    total, _ = loss(b=1.0, a=parts["a"], last_layer=w)  # the reference is constant: nothing to compare with
    assert total.item() == pytest.approx(1 + 0.5 * ratio * 22)


@pytest.mark.parametrize("weighting", ["fixed", "uncertainty", "dwa", "relobralo"])
def test_a_number_that_changes_between_compiled_calls(weighting):
    torch._dynamo.reset()
    loss, plain = make(weighting), make(weighting)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a in (0.0, 1.0, 0.25, 0.5, 3.0, 4.0):
        x = torch.tensor(2.0, requires_grad=True)
        torch.testing.assert_close(compiled({"b": x, "a": a})[0], plain({"b": x, "a": a})[0])
