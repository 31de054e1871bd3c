"""The conformance tests of arguments: every option and tensor of every Case in each spelling that is taken, and in
nonsense."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastloss import NegativeSampling, core
from fastloss.core import checks
from tests.conformance.cases import CASES, Case, Draw
from tests.conformance.tools import INTERPRETING, first, grid, leaves, run, to_device

pytestmark = pytest.mark.filterwarnings("ignore:.*(Sparse|nested tensors|quantiz).*")
by_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
not_interpreted = pytest.mark.skipif(INTERPRETING, reason="nothing here depends on the backend")
SPELLINGS = {  # of whole numbers and of others
    "numpy, 32 bits": (np.int32, np.float32),
    "numpy, 64 bits": (np.int64, np.float64),
    "0-d array": (np.array, np.array),
    "0-d array, 32 bits": (lambda v: np.array(v, np.int32), lambda v: np.array(v, np.float32)),
}


class Items(Sequence):
    """A sequence of one's own, as OmegaConf's lists are."""

    def __init__(self, items: Sequence) -> None:
        self._items = tuple(items)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple:
    return to_device(case.make(Draw(dtype), case.shapes[0]), device)


def all_options(case: Case, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a call, those left at their defaults too."""
    keywords = [p for p in inspect.signature(case.fn).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return {p.name: options.get(p.name, p.default) for p in keywords}


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def in_numbers(value: Any, change: Callable[[float], Any]) -> Any:
    """`value` with every number in it changed."""
    if is_number(value):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(in_numbers(item, change) for item in value)
    if isinstance(value, Mapping):
        return {key: in_numbers(item, change) for key, item in value.items()}
    if isinstance(value, NegativeSampling):
        return NegativeSampling(**{k: in_numbers(v, change) for k, v in dataclasses.asdict(value).items()})
    return value


def in_sequences(value: Any, change: Callable[[Sequence], Any]) -> Any:
    if isinstance(value, (list, tuple)):
        return change([in_sequences(item, change) for item in value])
    if isinstance(value, Mapping):
        return {key: in_sequences(item, change) for key, item in value.items()}
    return value


def values_of(out: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]


def assert_same(got: Any, expected: Any, what: str) -> None:
    for one, two in zip(values_of(got), values_of(expected), strict=True):
        assert torch.equal(one, two), f"{what}: {one.flatten()[:4]} for {two.flatten()[:4]}"


@not_interpreted
@by_case
def test_numpys_numbers_are_numbers(case):
    """numpy's scalars and 0-d arrays give what the float or int of the same value gives, in functions and modules."""
    args = inputs(case)
    for options in case.options:
        for name, value in all_options(case, options).items():
            found: list[float] = []
            in_numbers(value, lambda v: found.append(v) or v)  # noqa: B023 called at once
            for spelling, (whole, real) in SPELLINGS.items() if found else ():
                plain = in_numbers(value, lambda v, to=real: v if isinstance(v, int) else float(to(v)))
                spelled = in_numbers(value, lambda v, i=whole, f=real: i(v) if isinstance(v, int) else f(v))
                expected = case.fn(*args, **options | {name: plain})
                what = f"{name} as {spelling}"
                assert_same(case.fn(*args, **options | {name: spelled}), expected, what)
                if case.module is not None:
                    assert_same(case.module(**options | {name: spelled})(*args), expected, f"{what}, of a module")


ONE_OR_MORE = ("data_range", "window", "sigma")  # options that a number is right for as well


@not_interpreted
@by_case
def test_any_sequence_is_a_list(case):
    """Tuples, arrays, tensors (of numbers) and sequences of one's own, in options and positional arguments."""
    for options in case.options:
        args = inputs(case)
        expected = case.fn(*args, **options)
        forms: list[Callable[[Sequence], Any]] = [tuple, list, Items]
        for form in forms:
            assert_same(case.fn(*in_sequences(args, form), **options), expected, f"arguments as {form}")
            assert_same(case.fn(*args, **in_sequences(options, form)), expected, f"options as {form}")
        for name, value in options.items():
            if isinstance(value, (list, tuple)) and all(map(is_number, value)):
                arrays = (np.array, lambda v: np.array(v).astype(np.int32 if isinstance(v[0], int) else np.float32))
                tensors = (torch.tensor, lambda v: torch.tensor(v, dtype=torch.float64))
                for array in (*arrays, *(tensors if name.endswith("weights") else ())):
                    plain = array(value).tolist()
                    expected = case.fn(*args, **options | {name: plain})
                    assert_same(case.fn(*args, **options | {name: array(value)}), expected, f"{name} as an array")
            if isinstance(value, (list, tuple)):
                numbers = () if name in ONE_OR_MORE else (2.5, np.array(3.0))
                for nonsense in ({1.0, 2.0}, {"a": 1.0}, "12", *numbers):
                    refused(case, args, options | {name: nonsense}, name)


def refused(case: Case, args: tuple, options: dict, name: str) -> None:
    """A TypeError or ValueError that begins with the argument's name."""
    with pytest.raises((TypeError, ValueError)) as raised:
        case.fn(*args, **options)
    assert name in str(raised.value).split(":")[0], f"{name}={options.get(name)!r}: {raised.value}"


@not_interpreted
@by_case
def test_nonsense_options_are_refused_by_name(case):
    args, options = inputs(case), case.options[0]
    numbers = (10**400, 10**5000, -(10**400), 1e39, -1e39, 1e308, float("nan"), True, np.bool_(True), 1j, [], {}, "x")
    choices = ([], {}, True, 1j, "nonsense", np.array([1, 2]), object(), 2.5)
    for name, value in all_options(case, options).items():
        if isinstance(value, (bool, np.bool_)):
            for nonsense in (1, 0.0, "yes", [], np.array([True]), None):
                refused(case, args, options | {name: nonsense}, name)
            expected = case.fn(*args, **options | {name: value})
            assert_same(case.fn(*args, **options | {name: np.bool_(value)}), expected, name)
        elif is_number(value):
            for nonsense in numbers:
                if name == "workspace_mib" and nonsense in (1e39, 1e308):  # bounds nothing
                    expected = case.fn(*args, **options | {name: 2**30})
                    assert_same(case.fn(*args, **options | {name: nonsense}), expected, name)
                elif name != "sigma" or nonsense not in (1e39, 1e308):  # of a flat window
                    refused(case, args, options | {name: nonsense}, name)
        elif isinstance(value, str):
            for nonsense in choices:
                if not (name == "p" and nonsense == 2.5):
                    refused(case, args, options | {name: nonsense}, name)


def tensors_in(case: Case, args: tuple, options: dict) -> Iterator[tuple[str, Tensor, Callable]]:
    """(name, tensor, put) of every tensor of a call; `put(other)` is the call with another in its place."""
    names = list(inspect.signature(case.fn).parameters)
    for i, arg in enumerate(args):
        if isinstance(arg, Tensor):
            yield names[i], arg, lambda t, i=i: ((*args[:i], t, *args[i + 1 :]), options)
        elif isinstance(arg, (list, tuple)):
            for k, item in enumerate(arg):

                def changed(t, i=i, k=k, arg=arg):
                    return (*args[:i], [*arg[:k], t, *arg[k + 1 :]], *args[i + 1 :]), options

                yield f"{names[i]}[{k}]", item, changed
    for name, value in options.items():
        if isinstance(value, Tensor):
            yield name, value, lambda t, name=name: (args, options | {name: t})
        elif isinstance(value, Mapping):
            for key, item in value.items():
                if isinstance(item, Tensor):
                    yield key, item, lambda t, n=name, v=value, k=key: (args, options | {n: {**v, k: t}})


@not_interpreted
@by_case
def test_tensors_that_are_not_dense_numbers_are_refused_by_name(case):
    forms = {
        "sparse": lambda t: t.to_sparse(),
        "nested": lambda t: torch.nested.nested_tensor([t, t]),
        "jagged": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
        "mkldnn": lambda t: t.to_mkldnn(),
        "complex": lambda t: torch.complex(t, t),
        "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        "a string": lambda t: "tensor",
    }
    for options in (case.options[0], case.options[-1]):
        for name, tensor, put in tensors_in(case, inputs(case), options):
            for form, change in forms.items():
                if not tensor.is_floating_point() and form in ("mkldnn", "complex", "quantized"):
                    continue
                if form in ("nested", "jagged", "mkldnn") and tensor.ndim == 0:
                    continue
                if form == "a string" and name in ("logit_bias", "bias", "temperature", "logit_scale"):
                    continue
                args, changed = put(change(tensor))
                with pytest.raises(TypeError) as raised:
                    case.fn(*args, **changed)
                assert name in str(raised.value).split(" ")[0], f"{form} {name}: {raised.value}"


@not_interpreted
@by_case
def test_parameters_are_tensors(case):
    args = inputs(case)
    expected = run(case, case.fn, args, case.options[0])
    args = list(inputs(case))
    for i in case.grads:
        args[i] = tree_map_only(Tensor, lambda t: nn.Parameter(t.clone()), args[i])
    got = run(case, case.fn, tuple(args), case.options[0])
    assert_same(got, expected, "parameters")


@not_interpreted
@by_case
def test_modules_refuse_tensors_with_a_graph(case):
    """As every option, alone or in a list or dictionary; a Parameter and a detached tensor pass."""
    if case.module is None:
        return
    for name in all_options(case, {}):
        graph = torch.ones((), requires_grad=True)
        for value in (graph, graph.exp(), [graph], {"weight": graph}):
            with pytest.raises(ValueError, match=rf"{case.module.__name__}: {name}.* requires a gradient"):
                case.module(**{name: value})
        case.module(**{name: nn.Parameter(torch.ones(()))})
        case.module(**{name: graph.detach()})


def _made_in_inference_mode(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.detach().clone()


@grid(dtypes=(torch.float32,))
def test_inference_tensors_are_what_their_clones_are(case, place, options, dtype):
    """Each tensor in turn, beside those that need gradients; then all of them inside inference mode."""
    options = to_device(options, place[0])
    with core.use_backend(place[1]):
        for name, tensor, put in tensors_in(case, inputs(case, dtype, place[0]), options):
            forms = (tensor.detach().clone(), _made_in_inference_mode(tensor))
            expected, got = (_gradients(case, *put(form), form) for form in forms)
            assert_same(got, expected, name)
        args = inputs(case, dtype, place[0])
        expected = values_of(case.fn(*args, **options))
        with torch.inference_mode():
            inside = tree_map_only(Tensor, torch.clone, (args, options))
            assert_same(case.fn(*inside[0], **inside[1]), expected, "inside inference mode")
            assert_same(case.fn(*args, **options), expected, "inside inference mode, tensors of outside")
            with torch.enable_grad():
                assert_same(case.fn(*inside[0], **inside[1]), expected, "inside, with gradients")


def _gradients(case: Case, args: tuple, options: dict, without: Tensor) -> list[Tensor]:
    wrt = [t.requires_grad_() for t in leaves(case, args) if t is not without]
    loss = first(case.fn(*args, **options)).sum()
    if not wrt:
        return [loss]
    return [loss, *torch.autograd.grad(loss, wrt, materialize_grads=True)]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@grid(dtypes=(torch.float32, torch.bfloat16))
def test_torchs_default_dtype_changes_nothing(case, place, options, dtype):
    """Constants are made in a dtype of their own: value and gradients are those of the usual default, to the bit."""
    options = to_device(options, place[0])
    results = {}
    for default in (torch.float32, torch.bfloat16, torch.float64):
        args = inputs(case, dtype, place[0])
        upstream = torch.ones_like(first(case.fn(*args, **options)), dtype=torch.float32)
        with core.use_backend(place[1]), default_dtype(default):
            loss, grads, _ = run(case, case.fn, args, options, upstream)
        results[default] = [loss.detach(), *grads]
        for got, usual in zip(results[default], results[torch.float32], strict=True):
            assert got.dtype == usual.dtype, default
            assert torch.equal(got.nan_to_num(1e30), usual.nan_to_num(1e30)), default


@not_interpreted
@by_case
def test_modules_have_the_state_of_the_usual_default(case):
    if case.module is None:
        return
    options = case.options[-1]
    states = []
    for default in (torch.float32, torch.bfloat16, torch.float64):
        with default_dtype(default):
            states.append(case.module(**options).state_dict())
            case.module(**options).load_state_dict(states[0], strict=True)
    for state in states[1:]:
        assert_same(list(state.values()), list(states[0].values()), "state")


@not_interpreted
@by_case
def test_modules_with_numpys_numbers_compile(case):
    """A module makes them Python's, which are constants to torch.compile."""
    if case.module is None:
        return
    options = {k: np.array(v)[()] if is_number(v) else v for k, v in case.options[-1].items()}
    options = {k: np.array(v) if isinstance(v, list) and all(map(is_number, v)) else v for k, v in options.items()}
    module, args = case.module(**options), inputs(case)
    torch._dynamo.reset()
    got = torch.compile(module, fullgraph=True, backend="eager")(*args)
    torch.testing.assert_close(values_of(got), values_of(module(*args)))


def test_numbers_and_sequences():
    """What the helpers give back, and how they name what came."""
    from collections import UserList, deque
    from fractions import Fraction

    for value in (0.5, np.float16(0.5), np.longdouble(0.5), np.array(0.5), Fraction(1, 2)):
        got = checks.check_number("eps", value)
        assert type(got) is float and got == 0.5
    for value in (3, np.int8(3), np.array(3), np.uint64(3)):
        got = checks.check_integer("window", value, 1)
        assert type(got) is int and got == 3
        assert checks.check_choice("p", value, (1, 2, 3)) == 3
    for value in (3.0, np.float32(3), True, "3", None):
        with pytest.raises(TypeError, match=f"window: expected a whole number, got {type(value).__name__}"):
            checks.check_integer("window", value, 1)
    with pytest.raises(ValueError, match="window: expected a whole number from 1 to"):
        checks.check_integer("window", 2**40 + 1, 1)
    numbers = [1.0, 2.0, 3.0]
    forms = [numbers, tuple(numbers), Items(numbers), np.array(numbers), torch.tensor(numbers), range(1, 4)]
    for value in [*forms, deque(numbers), UserList(numbers), torch.tensor([1, 2, 3]), np.arange(1, 4)]:
        assert checks.check_numbers("weights", value) == numbers
    for value in ("123", {1.0}, {1: 2}, 1.0, None, np.array(1.0), iter(numbers)):
        with pytest.raises(TypeError, match=f"weights: expected a list of numbers, got {type(value).__name__}"):
            checks.check_numbers("weights", value)
    with pytest.raises(ValueError, match="weights: no gradient is provided"):
        checks.check_numbers("weights", torch.ones(3, requires_grad=True))
    with pytest.raises(ValueError, match=r"weights: expected a list of numbers, got a tensor of shape \(1, 3\)"):
        checks.check_numbers("weights", torch.ones(1, 3))
    assert checks.check_sequence("features", nn.ParameterList([torch.ones(2)]), "tensors")[0].shape == (2,)
    assert checks.check_workspace(2.0**30) == 2.0**30
    assert checks.check_workspace(1e308) == 2.0**30
    with pytest.raises(ValueError, match="workspace_mib: expected a finite number > 0, got inf"):
        checks.check_workspace(float("inf"))
