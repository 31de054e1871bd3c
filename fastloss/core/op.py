"""Registration of ops, and the choice of a backend for each call.

Core knows no loss, and no other file touches `torch.library` but the one of what ranks exchange. A loss file describes
its op with NamedTuples and two typed functions that compute shapes only (they are the schema and the fake kernel at
once); C++ and Triton add implementations to that schema; the eager reference serves every other case:

    class Inputs(NamedTuple): ...           # what the op takes; Grads: of which inputs it gives gradients

    def _pixel_fwd(x: Inputs) -> Tensor: ...
    def _pixel_bwd(grad: Tensor, x: Inputs, needs: Needs) -> Grads: ...
    def pixel_reference(x: Inputs) -> Tensor: ...

    op = Op("pixel", fwd=_pixel_fwd, bwd=_pixel_bwd, reference=pixel_reference, grads=Grads._fields)
    op(*Inputs(image, image_pred, ...))     # cpp, triton or reference, whichever the call should have
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from . import backends, explanation
from .autograd import _PLAIN, Differentiable, Prepared, _tensors, transformed
from .backends import is_interpreting
from .planned_calls import Replayed, watch
from .plans import Plan, Planned
from .structs import flattened
from .traced import parameters_of, take_out_numbers, with_numbers, with_parameter

NAMESPACE = "fastloss"
_LIB = Library(NAMESPACE, "DEF")
_OPS: dict[str, Op] = {}
_CANNOT_SERVE = "backend {!r} is forced (FASTLOSS_BACKEND or use_backend) but cannot serve {}: {}"


class Op(Differentiable):
    """A differentiable op with an eager reference and, where they exist, C++ and Triton kernels.

    `fwd` and `bwd` carry the schema in their type hints and compute shapes only. `bwd` asks by parameter name for
    what it needs: `grad` (of the first output), any forward input, any name in `outputs`, `needs_<input>` flags, and
    `incoming` (gradients to add, for a tap; here none); it returns one tensor per name in `grads`, an empty one
    (`numel() == 0`) where it was not needed. Inputs may be lists of tensors; where those in `grads` are, `bwd` returns
    one list: the gradients of each needed input in turn.
    All of them, the launchers too, may take and return NamedTuples: see :mod:`structs`. Only what `bwd` takes is kept
    for it: where it does without some inputs, it takes a smaller NamedTuple than `Inputs`, with fields of these names.
    `outputs` names the tensors `fwd` returns; only the first is differentiable and leaves the op.
    `reference` takes the same arguments as `fwd`. `triton` names the module in `fastloss`, family first, whose
    `<name>_fwd` and `<name>_bwd` launch the kernels. `bwd_reference`, `bwd` in differentiable torch, is for an op with
    piecewise constant gradients (L1: a sign), which saves no inputs for its backward: double backward then
    differentiates it by `grad` alone, instead of `reference` by the inputs. An op without kernels has its gradients
    from autograd through `reference`.
    `declines` takes the arguments of `fwd` and says, in a sentence, why no kernel computes this call, or None.
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
        declines: Callable[..., str | None] | None = None,
        bwd_reference: Callable | None = None,
    ) -> None:
        fwd, bwd, reference = flattened(fwd), flattened(bwd), flattened(reference)
        self.name, self.reference, self.grads, self.outputs = name, reference, grads, outputs
        self.bwd_reference = flattened(bwd_reference) if bwd_reference else None
        self.declines = flattened(declines) if declines else _takes_all
        self.inputs = list(inspect.signature(fwd).parameters)
        self._bwd_wants = list(inspect.signature(bwd).parameters)
        self._kept = [i for i, name in enumerate((*self.inputs, *outputs)) if name in self._bwd_wants]
        # `_backward` has (what was kept, grad, needs_* flags, incoming): where in that each argument of `bwd` is.
        have = [*((*self.inputs, *outputs)[i] for i in self._kept), "grad", *(f"needs_{n}" for n in grads), "incoming"]
        self._order = [have.index(name) for name in self._bwd_wants]
        self._wrt = [self.inputs.index(name) for name in grads]
        self._constant = [i for i in range(len(self.inputs)) if i not in self._wrt]
        self._fwd_plans = self._define(f"{name}_fwd", fwd, triton)
        self._bwd_plans = self._define(f"{name}_bwd", bwd, triton)
        qualified = f"{NAMESPACE}::{name}"
        torch.library.register_autograd(f"{qualified}_fwd", self._backward, setup_context=self._setup, lib=_LIB)
        torch.library.register_autograd(
            f"{qualified}_bwd", self._double_backward, setup_context=self._setup_bwd, lib=_LIB
        )
        namespace = getattr(torch.ops, NAMESPACE)
        self.fwd = getattr(namespace, f"{name}_fwd").default
        self.bwd = getattr(namespace, f"{name}_bwd").default
        kinds = [p.annotation for p in parameters_of(fwd)]
        self._lists = [i for i, kind in enumerate(kinds) if kind == list[Tensor]]
        self._floats = [i for i, kind in enumerate(kinds) if kind in (float, list[float])]
        if self._floats:
            self._define_traced(fwd, bwd)
        has_cpp = torch._C._dispatch_has_kernel_for_dispatch_key(f"{qualified}_fwd", "CPU")
        self.kernels = {"cpp": has_cpp and not is_interpreting(), "triton": triton is not None, "cuda": False}
        self._function = self._autograd_function()
        self._planned_function: Any = type(name, (_PlannedFunction,), {})
        _OPS[name] = self

    def _autograd_function(self) -> Any:
        """The same autograd as the dispatcher's at a third of its time on the host.

        It sees no tensors within lists: so those of an op with lists stand in its arguments one by one, after the
        lengths of the lists.
        """
        keep, gradients, below, op, plans = self._keep, self._gradients, self._below_autograd, self.fwd, self._fwd_plans

        def forward(ctx: Any, *args: Any) -> Tensor:
            out = below(op, plans, args)
            return keep(ctx, args, (out,) if isinstance(out, Tensor) else out)[0]

        def forward_of_lists(ctx: Any, lengths: list[int | None], *flat: Any) -> Tensor:
            ctx.lengths = lengths
            return forward(ctx, *_grouped(flat, lengths))

        def backward_of_lists(ctx: Any, grad: Tensor | None) -> tuple:
            flags = _grouped(ctx.needs_input_grad[1:], ctx.lengths)
            return None, *_one_by_one(gradients(ctx, flags, grad), ctx.lengths)

        both = (forward_of_lists, backward_of_lists) if self._lists else (forward, self._backward)
        methods = {"forward": staticmethod(both[0]), "backward": staticmethod(both[1])}
        return type(self.name, (torch.autograd.Function,), methods)

    @staticmethod
    def _define(name: str, fake: Callable, triton: str | None) -> Planned | None:
        schema = torch.library.infer_schema(fake, mutates_args=())
        _LIB.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIB)
        if triton is None:
            return None

        def launch(*args: Any) -> Any:  # Triton is imported on the first call
            kernels = importlib.import_module(f"..{triton}", __package__)
            return flattened(getattr(kernels, name))(*args)

        launch.__name__ = name
        planned = Planned(launch)

        def registered(*args: Any, **kwargs: Any) -> Any:
            return planned(*inspect.signature(fake).bind(*args, **kwargs).args) if kwargs else planned(*args)

        for key in ("CUDA", "CPU") if is_interpreting() else ("CUDA",):
            _LIB.impl(name, registered, key)
        return planned

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

    def outputs_of(self, args: tuple) -> tuple:
        """All that the forward's kernel returns, the saved tensors too, without autograd."""
        return self._below_autograd(self.fwd, self._fwd_plans, args)

    def gradients(self, have: dict[str, Any], grad: Tensor) -> tuple:
        """What the backward's kernel makes of `grad`, the forward's inputs and outputs and the needs, all by name."""
        with_grad = have | {"grad": grad, "incoming": []}
        got = self._below_autograd(self.bwd, self._bwd_plans, [with_grad[name] for name in self._bwd_wants])
        return (got,) if isinstance(got, Tensor) else got

    def _traced_call(self, args: tuple) -> Any:
        """The call in a graph that is being compiled: its floats may be inputs of the graph."""
        rest, numbers = take_out_numbers(args, self._floats)
        return self.fwd(*args) if numbers is None else self._fwd_traced(*rest, numbers)

    def why_reference(self, *args: Any) -> str | None:
        """Why this call is computed by PyTorch operators whatever kernels there are; None where kernels may do it."""
        if transformed():
            return "torch.func transforms and forward-mode AD go through PyTorch operators"
        if any(t.dtype == torch.float64 for a in args if type(a) not in _PLAIN for t in _tensors(a)):
            return "float64 is computed by PyTorch operators"
        return self.declines(*args)

    def backend(self, *args: Any) -> str:
        """The backend this call gets; a forced one that is missing raises. Every call of a loss passes here, so the
        checks stand in line; :meth:`why_reference` says the first of them in words and must keep in step."""
        name, first, double = "reference", None, False
        for value in args:
            if type(value) in _PLAIN:
                continue
            for tensor in (value,) if isinstance(value, Tensor) else _tensors(value):
                first = tensor if first is None else first
                double = double or tensor.dtype == torch.float64
        assert first is not None
        device = first.device
        if double or transformed() or (self.declines is not _takes_all and self.declines(*args) is not None):
            pass
        elif (forced := backends.state.forced) is not None:
            name = forced
            why = None if name == "reference" else backends.why_not(name, device, self.kernels[name], self.name)
            if why is not None:
                raise RuntimeError(_CANNOT_SERVE.format(name, self.name, why))
        else:
            for one in backends.fitting(device):
                if self.kernels[one] and backends.state.missing[one] is None:
                    name = one
                    break
            else:
                backends.say_kernels_are_missing(device)
        if explanation.depth:
            explanation.note(self, args, name)
        return name

    def __call__(self, *args: Any, backend: str | None = None) -> Tensor:
        """`backend`: what :meth:`backend` says of this call, where the caller has asked already."""
        if (backend or self.backend(*args)) == "reference":
            self._refuse_if_forced(args)
            return self.reference(*args)
        if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
            out = self._differentiable(args)
        else:
            device = _tensors(args[0])[0].device.type
            off = torch.is_autocast_enabled(device)  # kernels choose their own precision
            with torch.autocast(device, enabled=False) if off else contextlib.nullcontext():
                out = self._differentiable(args)
        return out if isinstance(out, Tensor) else out[0]

    def _refuse_if_forced(self, args: tuple) -> None:
        """Raise where another backend is forced and declines this call, with its reason."""
        forced = backends.state.forced
        if forced in (None, "reference") or transformed() or (why := self.declines(*args)) is None:
            return
        if all(t.dtype != torch.float64 for a in args if type(a) not in _PLAIN for t in _tensors(a)):
            raise RuntimeError(_CANNOT_SERVE.format(forced, self.name, why))

    def _differentiable(self, args: tuple) -> Any:
        if torch.compiler.is_compiling():
            return self._traced_call(args)
        if not torch.is_grad_enabled():
            return self._below_autograd(self.fwd, self._fwd_plans, args)
        if not self._lists:
            plan = None if self._fwd_plans is None else self._fwd_plans.ready(args)
            if plan is None:
                return self._function.apply(*args)
            if plan.autograd is None:
                plan.autograd = Prepared(self, args)
            out = self._planned_function.apply(plan, args, *plan.autograd.inputs(args))
            if watch.replayed is not None:
                watch.replayed.append(Replayed(self, plan, args, out))
            return out
        lengths = [len(value) if i in self._lists else None for i, value in enumerate(args)]
        return self._function.apply(lengths, *_one_by_one(args, lengths))


class _PlannedFunction(torch.autograd.Function):
    """Autograd of a call whose plan is recorded: it sees the tensors only, and what it keeps is known from the plan."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, args: tuple, *tensors: Tensor) -> Tensor:
        out = plan.replay(*args)  # type: ignore[misc]
        if isinstance(out, Tensor):
            out = (out,)
        else:
            ctx.set_materialize_grads(False)  # no zeros in the shape of what is merely saved
        ctx.prepared = plan.autograd
        ctx.kept = plan.autograd.kept
        ctx.save_for_backward(*plan.autograd.keep((*args, *out)))
        return out[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        return None, None, *ctx.prepared.backward(ctx, grad)


def _takes_all(*args: Any) -> None:
    """What `declines` is where nothing is declined."""


def _one_by_one(values: Sequence[Any], lengths: Sequence[int | None]) -> list[Any]:
    """The values, and what is in lists in the lists' place: see :func:`_grouped`."""
    flat: list[Any] = []
    for value, length in zip(values, lengths, strict=True):
        if length is None:
            flat.append(value)
        else:
            flat += value if value is not None else [None] * length
    return flat


def _grouped(flat: Sequence[Any], lengths: Sequence[int | None]) -> list[Any]:
    """The values, lists of such lengths made of those that stand one by one."""
    values, rest = [], iter(flat)
    for length in lengths:
        values.append(next(rest) if length is None else list(itertools.islice(rest, length)))
    return values
