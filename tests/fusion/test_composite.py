"""CompositeLoss: each weighting against numbers worked out by hand, its state, and what it refuses."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from fastloss import CompositeLoss
from fastloss.fusion.rules import _uniform

WEIGHTS = {"b": 1.0, "a": 0.5, "off": 0.0}
ALL = ("fixed", "uncertainty", "dwa", "relobralo", "vqgan")


def reference(weighting):
    return {"reference": "b"} if weighting == "vqgan" else {}


def make(weighting, **options):
    return CompositeLoss(WEIGHTS, weighting=weighting, **reference(weighting), **options)


def scalars(**values):
    return {name: torch.tensor(float(value)) for name, value in values.items()}


def layered(seed=0):
    """Two parts of one last layer w: gradients of norm 5 (b) and 10 (a) at seed 0."""
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    scale = 1.0 + seed
    return w, {"b": (w * torch.tensor([3.0, 4.0])).sum() * scale, "a": (w * torch.tensor([6.0, 8.0])).sum()}


def call(loss, b, a):
    """A step with losses b and a, whatever the weighting."""
    if loss.weighting != "vqgan":
        return loss(scalars(b=b, a=a))
    w = torch.ones(1, requires_grad=True)
    return loss({"b": b * w.sum(), "a": a * w.sum() ** 2}, last_layer=w)


def test_fixed_is_the_sum_one_would_write_to_the_bit():
    x = torch.rand(3)
    total, parts = CompositeLoss({"contrastive": 1.0, "perceptual": 0.1, "pixel": 0.01})(
        contrastive=x[0], perceptual=x[1], pixel=x[2]
    )
    assert torch.equal(total, x[0] + 0.1 * x[1] + 0.01 * x[2])
    assert list(parts) == ["contrastive", "perceptual", "pixel"] and torch.equal(parts["pixel"], x[2])


def test_parts_are_detached_and_unweighted_and_gradients_are_the_weights():
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    total, parts = make("fixed")(b=x[0], a=x[1], off=x[0] * torch.inf)
    total.backward()
    assert x.grad.tolist() == [1.0, 0.5] and total.item() == 3.5
    assert not any(p.requires_grad for p in parts.values())
    assert parts["b"].item() == 2 and parts["a"].item() == 3 and parts["off"].item() == math.inf
    assert {k: v.item() for k, v in make("fixed").current_weights.items()} == WEIGHTS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("weighting", ["fixed", "uncertainty", "dwa"])
def test_dtype(weighting, dtype):
    total, parts = make(weighting)(b=torch.tensor(2.0, dtype=dtype), a=torch.tensor(4.0))
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert total.item() == (2.0 if weighting == "uncertainty" else 4.0) and parts["b"].dtype == dtype


def test_uncertainty():
    """Kendall: w L / (2 e^s) + s / 2, alphabetical order a, b; gradients of s by hand."""
    loss = make("uncertainty", log_variance=-0.5)
    with torch.no_grad():
        loss.rule.log_variances.copy_(torch.tensor([0.2, -0.4]))
    total, _ = loss(scalars(b=3.0, a=5.0))
    a, b = 0.5 * 5 / (2 * math.exp(0.2)), 3 / (2 * math.exp(-0.4))
    assert total.item() == pytest.approx(a + 0.1 + b - 0.2, rel=1e-6)
    total.backward()
    assert loss.rule.log_variances.grad.tolist() == pytest.approx([0.5 - a, 0.5 - b], rel=1e-6)
    weights = loss.current_weights
    assert weights["a"].item() == pytest.approx(0.25 * math.exp(-0.2))
    assert weights["b"].item() == pytest.approx(0.5 * math.exp(0.4)) and weights["off"].item() == 0
    assert [n for n, _ in loss.named_parameters()] == ["rule.log_variances"]
    # the optimum of s is log of the weighted loss
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.5)
    for _ in range(400):
        optimizer.zero_grad()
        loss(scalars(b=3.0, a=5.0))[0].backward()
        optimizer.step()
    assert loss.rule.log_variances.tolist() == pytest.approx([math.log(2.5), math.log(3.0)], abs=1e-3)


def test_uncertainty_gradcheck():
    loss = make("uncertainty").double()
    x = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)

    def total(x, s):
        return torch.func.functional_call(loss, {"rule.log_variances": s}, ({"b": x[0], "a": x[1]},))[0]

    s = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(total, (x, s)) and torch.autograd.gradgradcheck(total, (x, s))


def test_dwa():
    loss = make("dwa")
    history = [(4.0, 2.0), (2.0, 2.0), (1.0, 1.0), (1.0, 3.0)]
    for t, (b, a) in enumerate(history):
        total, _ = loss(scalars(b=b, a=a))
        if t < 2:
            w = (1.0, 1.0)
        else:
            r = [history[t - 1][i] / history[t - 2][i] for i in (0, 1)]
            e = [math.exp(x / 2) for x in r]
            w = tuple(2 * x / sum(e) for x in e)
        assert total.item() == pytest.approx(w[0] * b + 0.5 * w[1] * a, rel=1e-6)
        assert loss.current_weights["b"].item() == pytest.approx(w[0], rel=1e-6)


def test_dwa_averages_over_a_period():
    loss = make("dwa", period=2, temperature=1.0)
    for b, a in [(1, 1), (3, 1), (2, 4), (2, 4)]:
        assert loss(scalars(b=b, a=a))[0].item() == pytest.approx(b + 0.5 * a)
    total, _ = loss(scalars(b=1, a=1))  # means 2, 1 then 2, 4: ratios 1 and 4
    e = (math.exp(1), math.exp(4))
    assert total.item() == pytest.approx((2 * e[0] + e[1]) / sum(e), rel=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_relobralo(beta):
    loss = make("relobralo", alpha=0.9, beta=beta, tau=0.7, seed=3)
    history = [(4.0, 2.0), (2.0, 2.5), (1.0, 1.0), (1.5, 0.2), (0.7, 0.1)]
    m, drawn = (1.0, 1.0), set()
    for t, now in enumerate(history):
        total, _ = loss(scalars(b=now[0], a=now[1]))

        def balance(past, now=now):
            e = [math.exp(x / (0.7 * y)) for x, y in zip(now, past, strict=True)]
            return [2 * x / sum(e) for x in e]

        if t:
            rho = 1.0 if _uniform(torch.tensor(t), 3).item() < beta else 0.0
            drawn.add(rho)
            first, last = balance(history[0]), balance(history[t - 1])
            m = [0.9 * (rho * m[i] + (1 - rho) * first[i]) + 0.1 * last[i] for i in (0, 1)]
        assert total.item() == pytest.approx(m[0] * now[0] + 0.5 * m[1] * now[1], rel=1e-5)
    assert drawn == {0.0: {0.0}, 1.0: {1.0}, 0.5: {0.0, 1.0}}[beta]


def test_draws_are_uniform_independent_and_leave_the_global_generator_alone():
    steps = torch.arange(200_000)
    u, other = _uniform(steps, 0).double(), _uniform(steps, 1).double()
    assert 0 <= u.min() and u.max() < 1
    counts = torch.histc(u, 100, 0, 1)
    assert ((counts - 2000) ** 2 / 2000).sum() < 150  # chi square, 99 degrees of freedom
    for pair in ((u[1:], u[:-1]), (u[2:], u[:-2]), (u, other)):
        assert abs(torch.corrcoef(torch.stack(pair))[0, 1]) < 0.01
    assert abs((u < 0.99).double().mean() - 0.99) < 0.001
    loss, before = make("relobralo"), torch.get_rng_state()
    for _ in range(3):
        loss(scalars(b=1, a=2))
    assert torch.equal(before, torch.get_rng_state())


def test_vqgan():
    loss = make("vqgan")
    w, parts = layered()
    total, _ = loss(parts, last_layer=w)
    ratio = 5 / (10 + 1e-4)
    assert total.item() == pytest.approx(11 + 0.5 * ratio * 22, rel=1e-6)
    total.backward()
    assert w.grad.tolist() == pytest.approx([3 + 3 * ratio, 4 + 4 * ratio], rel=1e-6)
    assert loss.current_weights["a"].item() == pytest.approx(0.5 * ratio)
    # a part whose gradient vanishes: the ratio is bounded
    w, parts = layered()
    total, _ = loss({"b": parts["b"], "a": (w * 0).sum() + 3}, last_layer=w)
    assert loss.current_weights["a"].item() == 5000.0
    limited = make("vqgan", max_ratio=0.25)
    w, parts = layered()
    assert limited(parts, last_layer=w)[0].item() == pytest.approx(11 + 0.125 * 22)


def test_vqgan_refuses_what_it_cannot_measure():
    loss = make("vqgan")
    w, parts = layered()
    with pytest.raises(TypeError, match="last_layer: .* got NoneType"):
        loss(parts)
    with pytest.raises(ValueError, match="part 'a' has no gradient with respect to it"), torch.no_grad():
        loss(layered()[1], last_layer=w)
    with pytest.raises(ValueError, match="part 'a' has no gradient"):
        loss({"b": parts["b"], "a": torch.ones((), requires_grad=True) * 2}, last_layer=w)
    with pytest.raises(ValueError, match="reference: expected a part with a weight > 0, one of .*'a', 'b'"):
        CompositeLoss(WEIGHTS, weighting="vqgan", reference="off")
    with pytest.raises(ValueError, match="reference: weighting 'vqgan' expects the name of a part"):
        CompositeLoss(WEIGHTS, weighting="vqgan")


@pytest.mark.parametrize("weighting", ALL)
def test_resumes_exactly(weighting):
    """A state dict, a deepcopy and a pickle after 7 steps each give the next totals, whatever the order of names."""
    torch.manual_seed(0)
    loss = make(weighting)
    steps = [(1 + torch.rand(()).item(), 0.1 + torch.rand(()).item()) for _ in range(14)]
    for b, a in steps[:7]:
        call(loss, b, a)
    fresh = CompositeLoss({"off": 0.0, "a": 0.5, "b": 1.0}, weighting=weighting, **reference(weighting))
    fresh.load_state_dict(loss.state_dict())
    others = [copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), *([fresh] if weighting != "fixed" else [])]
    for b, a in steps[7:]:
        expected = call(loss, b, a)[0]
        for other in others:
            assert torch.equal(call(other, b, a)[0], expected)


@pytest.mark.parametrize("weighting", ["dwa", "relobralo", "vqgan"])
def test_eval_changes_nothing_and_uses_the_last_weights(weighting):
    loss = make(weighting)
    for b, a in [(4, 2), (2, 2), (1, 3)]:
        call(loss, b, a)
    before, weights = copy.deepcopy(loss.state_dict()), loss.current_weights
    loss.eval()
    with torch.no_grad():
        total, _ = loss(scalars(b=10, a=20))
    assert total.item() == pytest.approx(10 * weights["b"].item() + 20 * weights["a"].item())
    for name, value in loss.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("weighting", ["dwa", "relobralo"])
def test_a_step_that_overflows_is_forgotten(weighting):
    loss, clean = make(weighting), make(weighting)
    for b, a in [(4, 2), (2, 2), (1, 3)]:
        call(loss, b, a)
        call(clean, b, a)
    assert call(loss, math.inf, 1.0)[0].isinf()
    assert torch.equal(call(loss, 1.0, 2.0)[0], call(clean, 1.0, 2.0)[0])


@pytest.mark.parametrize("weighting", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_rounds_no_state(weighting, dtype):
    expected = [call(make(weighting), b, a)[0] for b, a in [(4.0, 2.0)]]
    torch.set_default_dtype(dtype)
    try:
        loss = make(weighting)
        state = [t for t in (*loss.buffers(), *loss.parameters()) if t.is_floating_point()]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert state and all(t.dtype == wide for t in state)
        w = torch.ones(1, requires_grad=True, dtype=torch.float32)
        got, _ = loss({"b": 4 * w.sum(), "a": 2 * w.sum() ** 2}, last_layer=w)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(got, expected[0])


def test_options_at_the_edge_of_float32():
    for weighting, name in (("dwa", "temperature"), ("relobralo", "tau")):
        cold, hot = (CompositeLoss({"b": 1.0, "a": 1.0}, weighting=weighting, **{name: t}) for t in (1.2e-38, 3e38))
        for b, a in [(4.0, 2.0), (2.0, 2.5), (1.0, 1.0), (1.0, 1.0)]:
            for loss in (cold, hot):
                assert loss(scalars(b=b, a=a))[0].isfinite()
        assert hot.current_weights["a"].item() == pytest.approx(1.0)
        assert cold.current_weights["a"].item() != pytest.approx(1.0)
    loss = CompositeLoss({"b": 3e38, "a": 3e38})
    x = torch.tensor([0.25, 0.5], requires_grad=True)
    total, _ = loss(b=x[0], a=x[1])
    total.backward()
    assert total.item() == pytest.approx(2.25e38) and x.grad.tolist() == pytest.approx([3e38, 3e38])
    with pytest.raises(ValueError, match="log_variance: expected a finite number"):
        CompositeLoss({"a": 1.0}, weighting="uncertainty", log_variance=1e4)


@pytest.mark.parametrize("weighting", ALL)
def test_two_forwards_before_one_backward(weighting):
    """Gradient accumulation: the state of the second step does not reach into the graph of the first."""
    loss = make(weighting)
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    totals = [loss({"b": x[0] * k, "a": (x * x).sum() * k}, last_layer=x)[0] for k in (1.0, 2.0, 3.0)]
    sum(totals).backward()
    assert x.grad.isfinite().all() and (x.grad > 0).all()


@pytest.mark.parametrize("weighting", ["fixed", "uncertainty", "dwa", "relobralo"])
def test_compiles_into_one_graph(weighting):
    torch._dynamo.reset()
    loss, plain = make(weighting), make(weighting)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for b, a in [(4.0, 2.0), (2.0, 2.5), (1.0, 1.0), (0.5, 3.0)]:
        x, y = (torch.tensor([b, a], requires_grad=True) for _ in range(2))
        total, parts = compiled({"b": x[0], "a": x[1]})
        expected, _ = plain({"b": y[0], "a": y[1]})
        total.backward()
        expected.backward()
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(x.grad, y.grad)
        assert parts["a"].item() == a and not parts["a"].requires_grad


def test_one_part_alone():
    for weighting in ("fixed", "dwa", "relobralo"):
        loss = CompositeLoss({"only": 2.0}, weighting=weighting)
        for value in (1.0, 2.0, 0.0, 3.0):
            assert loss(only=torch.tensor(value))[0].item() == pytest.approx(2 * value)


@pytest.mark.parametrize(
    ("parts", "error", "text"),
    [
        ({"b": 1.0, "a": 1.0, "c": 1.0}, ValueError, r"expected \['b', 'a', 'off'\], got .*; unknown: \['c'\], "),
        ({"b": 1.0}, ValueError, r"expected \['b', 'a', 'off'\], got \['b'\]; unknown: \[\], missing: \['a'\]"),
        ({}, ValueError, r"missing: \['b', 'a'\]"),
        ({"b": 1.0, "a": [1.0]}, ValueError, r"parts\['a'\]: expected a scalar \(0-D\) loss, got shape \(1,\)"),
        ({"b": 1.0, "a": 1}, TypeError, r"parts\['a'\]: expected a float16"),
    ],
)
def test_bad_parts(parts, error, text):
    with pytest.raises(error, match=text):
        make("fixed")({name: torch.tensor(value) for name, value in parts.items()})


def test_bad_calls():
    with pytest.raises(TypeError, match=r"parts\['a'\]: expected a number, got str"):
        make("fixed")(b=torch.ones(()), a="1.0")
    with pytest.raises(ValueError, match=r"parts\['a'\]: expected a finite number, got nan"):
        make("fixed")(b=torch.ones(()), a=math.nan)
    with pytest.raises(TypeError, match="parts: expected a dictionary of scalar tensors, got Tensor"):
        make("fixed")(torch.ones(2))
    with pytest.raises(ValueError, match=r"parts: \['a'\] came both"):
        make("fixed")(scalars(b=1, a=1), a=torch.ones(()))
    with pytest.raises(ValueError, match="keep it in float32"):
        make("dwa").half()(scalars(b=1, a=1))
    with pytest.raises(ValueError, match="move the module there with .to"):
        make("dwa").to("meta")(scalars(b=1, a=1))


@pytest.mark.parametrize(
    ("weights", "options", "error", "text"),
    [
        ({"a": -1.0}, {}, ValueError, r"weights\['a'\]: expected a finite number >= 0, got -1.0"),
        ({"a": math.nan}, {}, ValueError, r"weights\['a'\]: expected a finite number"),
        ({"a": "1"}, {}, TypeError, r"weights\['a'\]: expected a number, got str"),
        ({"a": 0.0}, {}, ValueError, "weights: expected at least one weight > 0"),
        ({}, {}, ValueError, "weights: expected at least one weight > 0"),
        ([1.0], {}, TypeError, "weights: expected a dictionary of numbers by part, got list"),
        ({"last_layer": 1.0}, {}, ValueError, "weights: expected names of parts other than"),
        ({"a": 1.0}, {"weighting": "equal"}, ValueError, "weighting: expected one of"),
        ({"a": 1.0}, {"tau": 1.0}, TypeError, r"unknown option 'tau'; the options of 'fixed' are \[\]"),
        ({"a": 1.0}, {"weighting": "dwa", "tau": 1.0}, TypeError, r"options of 'dwa' are \['temperature', 'period'\]"),
        ({"a": 1.0}, {"weighting": "dwa", "temperature": 0}, ValueError, "temperature: expected a finite number > 0"),
        ({"a": 1.0}, {"weighting": "dwa", "period": 1.5}, ValueError, "period: expected a whole number"),
        ({"a": 1.0}, {"weighting": "relobralo", "alpha": 1.5}, ValueError, "alpha: expected a finite number"),
        ({"a": 1.0}, {"weighting": "relobralo", "tau": 0.0}, ValueError, "tau: expected a finite number > 0"),
        ({"a": 1.0}, {"weighting": "vqgan", "reference": "b"}, ValueError, "reference: expected a part with a weight"),
        ({"a": 1.0}, {"weighting": "vqgan", "reference": ["a"]}, TypeError, "reference: expected the name .* got list"),
    ],
)
def test_bad_construction(weights, options, error, text):
    with pytest.raises(error, match=text):
        CompositeLoss(weights, **options)


def test_repr_and_docstring_example():
    import doctest

    assert "weighting='dwa'" in repr(make("dwa")) and "'b': 1.0" in repr(make("dwa"))
    (example,) = doctest.DocTestFinder(recurse=False).find(CompositeLoss, globs={"torch": torch})
    example.globs |= {"CompositeLoss": CompositeLoss}
    assert doctest.DocTestRunner().run(example).failed == 0
