"""The mechanism under every loss: op registration, autograd, backend choice, reductions, the `Loss` base.

Core knows no loss, and no other file touches `torch.library`. A loss file describes its op with two typed
functions that compute shapes only (they are the schema and the fake kernel at once); C++ and Triton add
implementations to that schema; the eager reference serves every other case:

    op = Op("pixel", fwd=_pixel_fwd, bwd=_pixel_bwd, reference=pixel_reference, grads=("image", "image_pred"))
    op(image, image_pred, ...)      # cpp, triton or reference, whichever the call should have
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.library import Library

from .. import backends
from ..backends import BACKENDS, backend_report, is_forced, is_interpreting, use_backend  # noqa: F401 re-exported
from ..checks import as_plain, check_choice, check_no_graph
from ..traced import parameters_of, take_out_numbers, with_numbers, with_parameter

NAMESPACE = "fastloss"
REDUCTIONS = ("none", "mean", "sum")
_PLAIN = frozenset((type(None), bool, int, float, str))  # no tensors in these: a look-up, on every call's way

_LIB = Library(NAMESPACE, "DEF")
_OPS: dict[str, Op] = {}


def transformed() -> bool:
    """A functorch transform or forward-mode AD is active: `register_autograd` serves neither, the reference does."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of an argument: of itself, or of a list of them."""
    if isinstance(value, Tensor):
        return [value]
    return [v for v in value if isinstance(v, Tensor)] if isinstance(value, (list, tuple)) else []


def _below_autograd(op: Callable, *args: Any) -> Any:
    """The op's kernel at once: autograd's dispatch in Python costs more than a small kernel."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _save(ctx: Any, values: Sequence[Any]) -> None:
    """Keep values for the backward, the tensors (and lists of them) where autograd can watch them."""
    tensors = [None if type(v) in _PLAIN or not isinstance(v, Tensor) else v for v in values]
    ctx.plain, ctx.lists = [None if t is not None else v for t, v in zip(tensors, values, strict=True)], []
    for k, value in enumerate(ctx.plain):
        if type(value) not in _PLAIN and (own := _tensors(value)):
            ctx.plain[k] = None
            ctx.lists.append((k, len(own)))
            tensors += own
    ctx.save_for_backward(*tensors)


def _saved(ctx: Any) -> list[Any]:
    tensors, plain = ctx.saved_tensors, ctx.plain
    values = [p if t is None else t for t, p in zip(tensors, plain)]  # noqa: B905 what lists held follows
    first = len(plain)
    for k, length in ctx.lists:
        values[k] = list(tensors[first : first + length])
        first += length
    return values


def _no_gradient(like: Any) -> Any:
    """What autograd takes for an argument without a gradient: None, or a list of None for a list of tensors (or of
    their needs for gradients)."""
    tensors = isinstance(like, list) and all(isinstance(item, (Tensor, bool)) for item in like)
    return [None] * len(like) if tensors else None


class Op:
    """A differentiable op with an eager reference and, where they exist, C++ and Triton kernels.

    `fwd` and `bwd` carry the schema in their type hints and compute shapes only. `bwd` asks by parameter name for
    what it needs: `grad` (of the first output), any forward input, any name in `outputs`, `needs_<input>` flags, and
    `incoming` (gradients to add, for a tap; here none); it returns one tensor per name in `grads`, an empty one
    (`numel() == 0`) where it was not needed. Inputs may be lists of tensors; where those in `grads` are, `bwd` returns
    one list: the gradients of each needed input in turn.
    `outputs` names the tensors `fwd` returns; only the first is differentiable and leaves the op.
    `reference` takes the same arguments as `fwd`. `triton` names the module in `fastloss.kernels` whose
    `<name>_fwd` and `<name>_bwd` launch the kernels. `bwd_reference` is for an op that is linear around almost every
    point and does not save its inputs: `bwd` in differentiable torch, which double backward then goes through.
    """

    def __init__(
        self,
        name: str,
        *,
        fwd: Callable,
        bwd: Callable,
        reference: Callable,
        grads: tuple[str, ...],
        outputs: tuple[str, ...] = ("out",),
        triton: str | None = None,
        takes: Callable[..., bool] | None = None,
        bwd_reference: Callable | None = None,
    ) -> None:
        self.name, self.reference, self.grads, self.outputs = name, reference, grads, outputs
        self.bwd_reference = bwd_reference
        self.takes = takes or (lambda *args: True)
        self.inputs = list(inspect.signature(fwd).parameters)
        self._bwd_wants = list(inspect.signature(bwd).parameters)
        self._kept = [i for i, name in enumerate((*self.inputs, *outputs)) if name in self._bwd_wants]
        # Where in (what was kept, gradient, flags of needs, []) the backward's arguments stand.
        have = [*((*self.inputs, *outputs)[i] for i in self._kept), "grad", *(f"needs_{n}" for n in grads), "incoming"]
        self._order = [have.index(name) for name in self._bwd_wants]
        self._wrt = [self.inputs.index(name) for name in grads]
        self._constant = [i for i in range(len(self.inputs)) if i not in self._wrt]
        for stage, fake in (("fwd", fwd), ("bwd", bwd)):
            self._define(f"{name}_{stage}", fake, triton)
        qualified = f"{NAMESPACE}::{name}"
        torch.library.register_autograd(f"{qualified}_fwd", self._backward, setup_context=self._setup, lib=_LIB)
        torch.library.register_autograd(
            f"{qualified}_bwd", self._double_backward, setup_context=self._setup_bwd, lib=_LIB
        )
        namespace = getattr(torch.ops, NAMESPACE)
        self.fwd = getattr(namespace, f"{name}_fwd").default
        self.bwd = getattr(namespace, f"{name}_bwd").default
        kinds = [p.annotation for p in parameters_of(fwd)]
        self._floats = [i for i, kind in enumerate(kinds) if kind in (float, list[float])]
        if self._floats:
            self._define_traced(fwd, bwd)
        has_cpp = torch._C._dispatch_has_kernel_for_dispatch_key(f"{qualified}_fwd", "CPU")
        self.kernels = {"cpp": has_cpp and not is_interpreting(), "triton": triton is not None, "cuda": False}
        keep, backward = self._keep, self._backward

        def forward(ctx: Any, *args: Any) -> Tensor:
            out = _below_autograd(self.fwd, *args)
            return keep(ctx, args, (out,) if isinstance(out, Tensor) else out)[0]

        # The same autograd as the dispatcher's at a third of its time on the host; it sees no tensors within lists.
        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function: Any = type(name, (torch.autograd.Function,), methods)
        _OPS[name] = self

    @staticmethod
    def _define(name: str, fake: Callable, triton: str | None) -> None:
        schema = torch.library.infer_schema(fake, mutates_args=())
        _LIB.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIB)
        if triton is None:
            return

        def launch(*args: Any, **kwargs: Any) -> Any:  # Triton is imported on the first call
            kernels = importlib.import_module(f"{NAMESPACE}.kernels.{triton}")
            return getattr(kernels, name)(*args, **kwargs)

        for key in ("CUDA", "CPU") if is_interpreting() else ("CUDA",):
            _LIB.impl(name, launch, key)

    def _define_traced(self, fwd: Callable, bwd: Callable) -> None:
        """The op once more, for graphs that torch.compile makes: see :func:`traced.take_out_numbers`."""
        for stage, fake, op in (("fwd", fwd, self.fwd), ("bwd", bwd, self.bwd)):

            def kernel_of_traced(*args: Any, op: Any = op) -> Any:
                return op(*with_numbers(args[:-1], args[-1].tolist()))

            def fake_of_traced(*args: Any, fake: Callable = fake) -> Any:
                return fake(*args[:-1])

            name = f"{self.name}_{stage}_traced"
            self._define(name, with_parameter(fake, "changing", Tensor, fake_of_traced), None)
            _LIB.impl(name, kernel_of_traced, "CompositeExplicitAutograd")
        name = f"{self.name}_fwd_traced"
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}", self._backward, setup_context=self._setup_traced, lib=_LIB
        )
        namespace = getattr(torch.ops, NAMESPACE)
        self._fwd_traced = getattr(namespace, name).default
        self._bwd_traced = getattr(namespace, f"{self.name}_bwd_traced").default

    def _traced_call(self, args: tuple) -> Any:
        """The call in a graph that is being compiled: its floats may be inputs of the graph."""
        rest, numbers = take_out_numbers(args, self._floats)
        return self.fwd(*args) if numbers is None else self._fwd_traced(*rest, numbers)

    def backend(self, *args: Any) -> str:
        """The backend this call gets; a forced one that is missing raises."""
        tensors = [t for a in args if type(a) not in _PLAIN for t in _tensors(a)]
        if transformed() or any(t.dtype == torch.float64 for t in tensors) or not self.takes(*args):
            return "reference"
        device = tensors[0].device.type
        forced = backends.state.forced
        if forced == "reference":
            return forced
        if forced is not None:
            why = backends.why_not(forced, device, self.kernels[forced], self.name)
            if why is not None:
                raise RuntimeError(
                    f"backend {forced!r} is forced (FASTLOSS_BACKEND or use_backend) "
                    f"but cannot serve {self.name}: {why}"
                )
            return forced
        for name in backends.fitting(device):
            if self.kernels[name] and backends.state.missing[name] is None:
                return name
        backends.say_cpp_is_missing(device)
        return "reference"

    def __call__(self, *args: Any, backend: str | None = None) -> Tensor:
        """`backend`: what :meth:`backend` says of this call, where the caller has asked already."""
        if (backend or self.backend(*args)) == "reference":
            return self.reference(*args)
        device = _tensors(args[0])[0].device.type
        if torch.is_autocast_enabled(device):  # kernels choose their own precision
            with torch.autocast(device, enabled=False):
                out = self._differentiable(args)
        else:
            out = self._differentiable(args)
        return out if isinstance(out, Tensor) else out[0]

    def _differentiable(self, args: tuple) -> Any:
        if torch.compiler.is_compiling():
            return self._traced_call(args)
        if list in map(type, args):
            return self.fwd(*args)
        return self._function.apply(*args) if torch.is_grad_enabled() else _below_autograd(self.fwd, *args)

    # autograd of the forward op: save what the backward names, and nothing else

    def _setup(self, ctx: Any, inputs: tuple, output: Any, *numbers: Tensor) -> None:
        outputs = (output,) if isinstance(output, Tensor) else tuple(output)
        if len(outputs) > 1:
            ctx.mark_non_differentiable(*outputs[1:])
        self._keep(ctx, inputs, outputs, *numbers)

    def _setup_traced(self, ctx: Any, inputs: tuple, output: Any) -> None:
        *inputs, numbers = inputs  # type: ignore[assignment]
        self._setup(ctx, inputs, output, numbers)

    def _keep(self, ctx: Any, inputs: tuple, outputs: tuple, *numbers: Tensor) -> tuple:
        if len(outputs) > 1:
            ctx.set_materialize_grads(False)  # no zeros in the shape of what is merely saved
        values = (*inputs, *outputs)
        _save(ctx, [*(values[i] for i in self._kept), *numbers])
        return outputs

    def _backward(self, ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
        flags = ctx.needs_input_grad  # a list of them for a list of tensors
        lists = list in map(type, flags)
        needs = [any(flag) if isinstance(flag, list) else flag for flag in flags] if lists else flags
        for i in self._constant:
            if needs[i]:
                raise RuntimeError(f"{self.name}: no gradient is provided for {self.inputs[i]!r}; detach it")
        out: list[Any] = [_no_gradient(flag) for flag in flags] if lists else [None] * len(flags)
        if grad is None:  # nothing reaches the output (in a double backward)
            return tuple(out)
        saved, numbers = _saved(ctx), []
        if len(saved) > len(self._kept):
            numbers = [saved.pop()]
        have = (*saved, grad, *(needs[i] for i in self._wrt), [])
        args = [have[k] for k in self._order]
        bwd = self._bwd_traced if numbers else self.bwd
        got = bwd(*args, *numbers) if torch.is_grad_enabled() else _below_autograd(bwd, *args, *numbers)
        if isinstance(got, list):
            rest = iter(got)
            got = [[next(rest) for _ in flags[i]] if needs[i] else None for i in self._wrt]
        for i, gradient in zip(self._wrt, (got,) if isinstance(got, Tensor) else got, strict=True):
            if needs[i]:
                out[i] = gradient
        return tuple(out)

    # autograd of the backward op: differentiate the reference twice, so that double backward is right everywhere

    def _setup_bwd(self, ctx: Any, inputs: tuple, output: Any) -> None:
        _save(ctx, inputs)

    def _double_backward(self, ctx: Any, *grad_grads: Any) -> tuple:
        have = dict(zip(self._bwd_wants, _saved(ctx), strict=True))
        upstream = have["grad"].detach().requires_grad_()
        with torch.enable_grad():
            if self.bwd_reference is not None:
                wrt: dict[str, Any] = {}
                first = self.bwd_reference(*((have | {"grad": upstream})[name] for name in self._bwd_wants))
            else:
                wrt, first, grad_grads = self._first_derivative(have, upstream, grad_grads)
            pairs = zip(first, (t for g in grad_grads for t in _tensors(g)), strict=True)
            total = torch.stack([(f * g).sum() for f, g in pairs]).sum()
            wrt = {"grad": upstream} | wrt
            flat = [t for value in wrt.values() for t in _tensors(value)]
            second: Iterator[Tensor | None] = iter([None] * len(flat))
            if total.requires_grad:  # else, of an empty batch say, it depends on nothing
                again = torch.is_grad_enabled()
                second = iter(torch.autograd.grad(total, flat, create_graph=again, allow_unused=True))
        got = {n: [next(second) for _ in v] if isinstance(v, list) else next(second) for n, v in wrt.items()}
        none = {name: _no_gradient(have[name]) for name in self._bwd_wants}
        return tuple((none | got)[name] for name in self._bwd_wants)

    def _first_derivative(self, have: dict, upstream: Tensor, grad_grads: tuple) -> tuple[dict, tuple, tuple]:
        """(new leaves of the inputs by name, the differentiable gradients needed, what belongs to them upstream)."""
        missing = [name for name in self.inputs if name not in have]
        if missing:
            raise RuntimeError(f"{self.name}: double backward is not provided (it would need {missing}); "
                               "use_backend('reference') differentiates any number of times")
        wrt: dict[str, Any] = {}
        for name in self.grads:
            if have[name] is None:  # an optional input that was not given
                continue
            leaf = [t.detach().requires_grad_() for t in _tensors(have[name])]
            wrt[name] = leaf if isinstance(have[name], list) else leaf[0]
        out = self.reference(*((have | wrt)[name] for name in self.inputs))
        used = [i for i, name in enumerate(self.grads) if name in wrt and have.get(f"needs_{name}", True)]
        inputs = [t for i in used for t in _tensors(wrt[self.grads[i]])]
        first = tuple(torch.zeros_like(t) for t in inputs)  # without a row or a negative nothing may depend on them
        if out.requires_grad:
            first = torch.autograd.grad(
                out, inputs, upstream.to(out.dtype), create_graph=True, allow_unused=True, materialize_grads=True
            )
        if not isinstance(grad_grads[0], list):  # a list holds the needed ones only
            grad_grads = tuple(grad_grads[i] for i in used)
        return wrt, first, grad_grads


def reduce(values: Tensor, reduction: str) -> Tensor:
    """`values` as they are, their mean or their sum. A mean over nothing raises instead of giving NaN."""
    check_reduction(reduction)
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    check_not_empty(values.numel())
    return values.mean()


def check_reduction(reduction: str, choices: tuple[str, ...] = REDUCTIONS) -> None:
    check_choice("reduction", reduction, choices)


def check_not_empty(count: int) -> None:
    if count == 0:
        raise ValueError("reduction: the mean of an empty batch is undefined; skip the batch or use reduction='sum'")


def result_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype every loss accumulates in and returns: float64 if any input is float64, else float32."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def full_precision(like: Tensor) -> contextlib.AbstractContextManager:
    """Autocast off, so that products keep the dtype they are computed in; the meta device has no autocast."""
    return contextlib.nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


class Loss(nn.Module):
    """Module form of a loss function: keyword options at construction, tensors at call.

    A subclass names its function, `fn = staticmethod(pixel_loss)`. Options are checked against the function's
    keyword-only parameters; a tensor or Parameter option (a learnable temperature) becomes a buffer or Parameter.
    numpy's numbers and vectors become Python's, which torch.compile takes for constants.
    Keywords given at call override the options of the module for that call.

    Raises:
        TypeError: an unknown option. ValueError: an option is a tensor that requires a gradient and no Parameter.
    """

    fn: Callable[..., Any]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        keywords = inspect.signature(self.fn).parameters.values()
        allowed = [p.name for p in keywords if p.kind is inspect.Parameter.KEYWORD_ONLY]
        for name, value in options.items():
            if name not in allowed:
                raise TypeError(f"{type(self).__name__}: unknown option {name!r}; the options are {allowed}")
            check_no_graph(type(self).__name__, name, value)
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, as_plain(value))
        self._options = tuple(options)

    def forward(self, *tensors: Any, **overrides: Any) -> Any:
        options = {name: getattr(self, name) for name in self._options}
        return self.fn(*tensors, **(options | overrides))

    def extra_repr(self) -> str:
        shown = {name: getattr(self, name) for name in self._options}
        return ", ".join(f"{k}={'<tensor>' if isinstance(v, Tensor) else repr(v)}" for k, v in shown.items())

