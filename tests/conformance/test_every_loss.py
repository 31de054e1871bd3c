"""The conformance tests: every Case of cases/ through every check, dtype, backend and option."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastloss import core
from tests.conformance.cases import CASES, Case, Draw
from tests.conformance.tools import (
    INTERPRETING,
    Errors,
    cast,
    cast_options,
    first,
    grid,
    leaves,
    recorded,
    reductions,
    run,
    to_device,
    with_reduction,
)

HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
by_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
not_interpreted = pytest.mark.skipif(INTERPRETING, reason="nothing here depends on the backend")


def inputs(case: Case, shape, dtype: torch.dtype, device: str, seed: int = 0) -> tuple:
    return to_device(case.make(Draw(dtype, seed=seed), shape), device)


def compare(case: Case, place: tuple, args: tuple, options: dict, errors: Errors, name: str, where: str) -> None:
    """Adds our value and gradients on `place` against eager's in the same dtype and eager's in float64."""
    options, dtype = to_device(options, place[0]), errors.dtype
    ours = tree_map_only(Tensor, lambda t: t.detach(), args)  # detach keeps strides
    with core.use_backend(place[1]):
        loss, grads, upstream = run(case, case.fn, ours, options)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    eager_loss, eager_grads, _ = run(case, case.eager, cast(args, dtype), cast_options(options, dtype), upstream)
    exact_loss, exact_grads, _ = run(
        case, case.eager, cast(args, torch.float64), cast_options(options, torch.float64), upstream
    )
    errors.add(f"{name} value", loss, eager_loss, exact_loss, where)
    for i, (mine, eager, exact) in enumerate(zip(grads, eager_grads, exact_grads, strict=True)):
        assert mine.dtype == dtype
        errors.add(f"{name} gradient {i}", mine, eager, exact, where)


@grid()
def test_value_and_gradient(case, place, options, dtype, nan_filled):
    errors = Errors(dtype)
    for seed in errors.draws(4 if place[0] == "cuda" else 1):
        for shape, reduction in itertools.product(case.shapes, reductions(case)):
            args = inputs(case, shape, dtype, place[0], seed)
            compare(case, place, args, with_reduction(case, options, reduction), errors, str(reduction), str(shape))
    errors.check()


@grid(dtypes=HALF_AND_SINGLE, options=False)
def test_strides(case, place, options, dtype):
    """Transposed, sliced, channels_last and stride-0 inputs give what dense ones give."""
    forms = {
        "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        "sliced": lambda t: torch.stack((t, t), -1)[..., 0],
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t,
        "stride 0": lambda t: t[:1].expand_as(t),
    }
    errors = Errors(dtype)
    for seed in errors.draws():
        for (name, form), reduction in itertools.product(forms.items(), reductions(case)):
            args = inputs(case, case.shapes[0], dtype, place[0], seed)
            args = tree_map_only(Tensor, lambda t, form=form: form(t) if t.is_floating_point() else t, args)
            compare(case, place, args, with_reduction(case, options, reduction), errors, str(reduction), name)
    errors.check()


@grid(dtypes=(torch.float32,))
def test_ties_have_finite_gradients(case, place, options, dtype):
    """Equal and all-zero inputs: no NaN, in value or gradient."""
    for fill in ("equal", "zero"):
        args = inputs(case, case.shapes[0], dtype, place[0])
        if fill == "zero":
            args = tree_map_only(Tensor, lambda t: torch.zeros_like(t) if t.is_floating_point() else t, args)
        elif len(case.grads) > 1:
            same = args[case.grads[0]]
            args = tuple(
                tree_map_only(Tensor, torch.clone, same) if i in case.grads and _alike(args[i], same) else a
                for i, a in enumerate(args)
            )
        with core.use_backend(place[1]):
            loss, grads, _ = run(case, case.fn, args, to_device(options, place[0]))
        assert loss.isfinite().all(), f"{fill}: {loss}"
        for g in grads:
            assert g.isfinite().all(), f"{fill}: a gradient is not finite"


def _alike(a, b) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape
    return isinstance(a, list) and isinstance(b, list) and all(_alike(x, y) for x, y in zip(a, b, strict=True))


@grid(dtypes=(torch.float32,))
def test_nonfinite_values_arrive(case, place, options, dtype):
    """A NaN in an input is never hidden: neither in the loss nor in the gradients, where eager's are not finite (a loss
    scaler would take the step). Nor is an infinity in the loss, as long as it does not stand for something left out."""
    options, first_options = to_device(options, place[0]), options is case.options[0]
    for which, value in itertools.product(range(len(case.grads)), (math.nan, math.inf)[: 1 + first_options]):
        results = []
        for fn in (case.fn, case.eager):
            args = inputs(case, case.shapes[0], dtype, place[0])
            leaves(case, args)[which].view(-1)[0] = value
            with core.use_backend(place[1]):
                results.append(run(case, fn, args, options))
        (loss, grads, _), (_, eager, _) = results
        assert case.extra.get("bounded") or not loss.isfinite().all(), f"the loss hides the {value} of {which}"
        for i, (mine, theirs) in enumerate(zip(grads, eager, strict=True)):
            shown = math.isinf(value) or theirs.isfinite().all() or not mine.isfinite().all()
            assert shown, f"gradient {i} hides the {value} of {which}"


@grid(dtypes=(torch.float32,))
def test_backward_is_reentrant_and_deterministic(case, place, options, dtype, nan_filled):
    """Torch's own operators around ours (the interpolation of a map) in their deterministic form."""
    options = to_device(options, place[0])
    args = inputs(case, case.shapes[0], dtype, place[0])
    wrt = [t.requires_grad_() for t in leaves(case, args)]
    with core.use_backend(place[1]):
        loss = first(case.fn(*args, **options))
        again = first(case.fn(*args, **options))
        assert torch.equal(loss, again)
        total = loss.sum()
        once = torch.autograd.grad(total, wrt, retain_graph=True, allow_unused=True)
        kept = [None if g is None else g.clone() for g in once]
        twice = torch.autograd.grad(total, wrt, retain_graph=True, allow_unused=True)
        total.backward()
    for g, k, t, leaf in zip(once, kept, twice, wrt, strict=True):
        if k is not None:
            assert torch.equal(g, k) and torch.equal(t, k) and torch.equal(leaf.grad, k)


@not_interpreted
@pytest.mark.parametrize("index", range(max(len(c.options) for c in CASES)))
@by_case
def test_gradcheck(case, index):
    """float64 goes to the reference; its gradient is the derivative of its value."""
    if index >= len(case.options):
        return
    torch.manual_seed(0)
    args = case.make(Draw(torch.float64, seed=3), case.shapes[0])
    wrt = [t.requires_grad_() for t in leaves(case, args)]
    options = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in case.options[index].items()
    } | case.extra.get("gradcheck", {})

    def loss(*_: Tensor) -> Tensor:
        return first(case.fn(*args, **options))

    assert torch.autograd.gradcheck(loss, wrt, fast_mode=True)


@not_interpreted
@grid(dtypes=(torch.float32,))
def test_compiles_into_one_graph(case, place, options, dtype):
    """By torch._dynamo, which meets the options; the graphs of a case's first options go through AOTAutograd too, which
    meets the ops, as it does in test_opcheck."""
    backend = "aot_eager" if options is case.options[0] else "eager"
    options = to_device(options, place[0])
    torch._dynamo.reset()
    with core.use_backend(place[1]):
        expected = run(case, case.fn, inputs(case, case.shapes[0], dtype, place[0]), options)
        compiled = torch.compile(case.fn, fullgraph=True, backend=backend)
        got = run(case, compiled, inputs(case, case.shapes[0], dtype, place[0]), options)
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])


def _as_leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_(t.requires_grad)


OPCHECKS = ("test_schema", "test_faketensor")
OF_ONE_DTYPE = () if INTERPRETING else ("test_autograd_registration", "test_aot_dispatch_dynamic")


@grid(dtypes=HALF_AND_SINGLE, only_ops=True)
def test_opcheck(case, place, options, dtype):
    """The registration of each op is sound: schema, fake tensors, autograd, AOT dispatch. The last two are the same for
    all launchers and dtypes, so the time of the interpreter and of half precision is not spent on them."""
    if place[1] == "reference":
        return
    checked = set()  # most ops are called in the same way whatever the reduction
    for reduction in reductions(case):
        args = inputs(case, case.shapes[0], dtype, place[0])
        for t in leaves(case, args):
            t.requires_grad_()
        with recorded() as calls, core.use_backend(place[1]):
            case.fn(*args, **with_reduction(case, to_device(options, place[0]), reduction))
        for op, op_args in calls:  # none where the options switch the op off
            plain = tree_map_only(Tensor, lambda t: (t.shape, t.stride(), t.dtype, t.requires_grad), op_args)
            call = f"{op.name} {plain}"
            if op.declines(*op_args) is None and call not in checked:
                checked.add(call)
                # leaves: torch 2.11's check goes back through what came before, twice
                utils = OPCHECKS + (OF_ONE_DTYPE if dtype == torch.float32 else ())
                torch.library.opcheck(op.fwd, tree_map_only(Tensor, _as_leaf, op_args), test_utils=utils)


def _derivatives(case: Case, backend: str, args: tuple, options: dict) -> tuple[list[Tensor], list[Tensor]]:
    """The loss and its gradients, and the gradients of their squares."""
    wrt = [t.requires_grad_() for t in leaves(case, args)]
    with core.use_backend(backend):
        loss = first(case.fn(*args, **options))
        grads = torch.autograd.grad(loss.sum(), wrt, create_graph=True, allow_unused=True)
        total = sum((g * g).sum() for g in grads if g is not None)
        none = [None] * len(wrt)  # a piecewise linear op has gradients that depend on no input
        there = isinstance(total, Tensor) and total.requires_grad
        second = torch.autograd.grad(total, wrt, allow_unused=True) if there else none
    once, twice = (
        [torch.zeros_like(t) if g is None else g.detach() for t, g in zip(wrt, got, strict=True)]
        for got in (grads, second)
    )
    return [loss.detach(), *once], twice


@grid(dtypes=(torch.float32,), only_ops=True)
def test_double_backward_is_the_references(case, place, options, dtype):
    options = to_device(options, place[0])
    second = [
        _derivatives(case, backend, inputs(case, case.shapes[0], dtype, place[0]), options)[1]
        for backend in (place[1], "reference")
    ]
    for ours, theirs in zip(*second, strict=True):  # of many magnitudes in one tensor; p=1.5 has none (NaN) at d=0
        largest = theirs.abs().nan_to_num(0, 0).max().item() if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * max(1.0, largest), equal_nan=True)


@grid(dtypes=(torch.float32,))
def test_empty_axes(case, place, options, dtype):
    """Value, gradient and double backward of inputs without rows, or without what they are compared with."""
    if any(isinstance(value, Tensor) and value.ndim for value in options.values()):
        return
    options = to_device(options, place[0])
    for shape, reduction in itertools.product(case.empty, set(reductions(case)) - {"mean"}):
        ours, theirs = (
            _derivatives(case, backend, inputs(case, shape, dtype, place[0]), with_reduction(case, options, reduction))
            for backend in (place[1], "reference")
        )
        for mine, reference in zip((*ours[0], *ours[1]), (*theirs[0], *theirs[1]), strict=True):
            assert mine.isfinite().all(), shape
            torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


@not_interpreted
@by_case
def test_functorch_and_forward_mode_take_the_reference(case):
    if not case.extra.get("functorch", True):
        return
    args = case.make(Draw(), case.shapes[0])
    which = case.grads[-1]
    if not isinstance(args[which], Tensor):
        return

    def total(t: Tensor) -> Tensor:
        return first(case.fn(*args[:which], t, *args[which + 1 :], **case.options[0])).sum()

    x, direction = args[which], Draw(seed=5).normal(*args[which].shape)
    g = torch.func.grad(total)(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(g, torch.autograd.grad(total(leaf), leaf)[0], rtol=1e-4, atol=1e-6)
    _, tangent = torch.func.jvp(total, (x,), (direction,))
    torch.testing.assert_close(tangent, (g * direction).sum(), rtol=1e-3, atol=1e-5, check_dtype=False)


@grid(dtypes=(torch.float32,), options=False)
def test_autocast_changes_nothing(case, place, options, dtype):
    options = to_device(options, place[0])
    args = inputs(case, case.shapes[0], dtype, place[0])
    with core.use_backend(place[1]):
        plain = first(case.fn(*args, **options))
        with torch.autocast(place[0], torch.bfloat16):
            under = first(case.fn(*args, **options))
    assert under.dtype == torch.float32
    torch.testing.assert_close(under, plain)


@not_interpreted
@by_case
def test_bad_input_names_the_argument(case):
    for what, change, error, text in case.bad:
        args, options = change(case.make(Draw(), case.shapes[0]), dict(case.options[0]))
        with pytest.raises(error) as raised:
            case.fn(*args, **options)
        assert text in str(raised.value), f"{what}: {raised.value}"


@not_interpreted
@by_case
def test_module_form(case):
    """The Module gives the function's value, survives pickle and deepcopy, and rejects unknown options."""
    if case.module is None:
        return
    options = case.options[-1]
    module = case.module(**options)
    args = case.make(Draw(), case.shapes[0])
    expected = first(case.fn(*args, **options))
    for form in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(first(form(*args)), expected)
    assert type(module).__name__ in repr(module)
    with pytest.raises(TypeError, match="unknown option 'no_such_option'"):
        case.module(no_such_option=1)
