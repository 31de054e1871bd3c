"""Autograd under an op: what the backward keeps, the backward, and double backward through the reference."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import plans
from .plans import Planned

_PLAIN = frozenset((type(None), bool, int, float, str))  # no tensors in these: a look-up, on every call's way


def transformed() -> bool:
    """A functorch transform or forward-mode AD is active: `register_autograd` serves neither, the reference does."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of an argument: of itself, or of a list of them."""
    if isinstance(value, Tensor):
        return [value]
    return [v for v in value if isinstance(v, Tensor)] if isinstance(value, (list, tuple)) else []


def _save(ctx: Any, values: Sequence[Any]) -> None:
    """Keep values for the backward, the tensors (and lists of them) where autograd can watch them."""
    plain, places, lists = list(values), [], []
    tensors: list[Tensor] = []
    for k, value in enumerate(plain):
        if type(value) in _PLAIN:
            continue
        if isinstance(value, Tensor):
            places.append(k)
            tensors.append(value)
            plain[k] = None
        elif own := _tensors(value):
            lists.append((k, own))
            plain[k] = None
    for _, own in lists:
        tensors += own
    ctx.save_for_backward(*tensors)
    ctx.kept = plain, places, [(k, len(own)) for k, own in lists] if lists else lists


def _saved(ctx: Any) -> list[Any]:
    tensors, (plain, places, lists) = ctx.saved_tensors, ctx.kept
    values, first = plain.copy(), len(places)
    for k, tensor in zip(places, tensors):  # noqa: B905 what lists held follows
        values[k] = tensor
    for k, length in lists:
        values[k] = list(tensors[first : first + length])
        first += length
    return values


def _no_gradient(like: Any) -> Any:
    """What autograd takes for an argument without a gradient: None, or a list of None for a list of tensors (or of
    their needs for gradients)."""
    tensors = isinstance(like, list) and all(isinstance(item, (Tensor, bool)) for item in like)
    return [None] * len(like) if tensors else None


def picker(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple]:
    """What picks these items of a sequence into a tuple."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda values: tuple(values[k] for k in places)


class Prepared:
    """What all forward calls with one plan have in common: which arguments are tensors, what is kept, and backwards."""

    def __init__(self, op: Differentiable, args: Sequence[Any]) -> None:
        self.op, self.places = op, [i for i, value in enumerate(args) if isinstance(value, Tensor)]
        kept = [i for i in op._kept if i in self.places or i >= len(args)]
        plain = [None if i in kept else args[i] for i in op._kept]
        self.inputs, self.keep = picker(self.places), picker(kept)
        self.kept: tuple[list[Any], list[int], list[Any]] = (
            plain,
            [op._kept.index(i) for i in kept],
            [],
        )  # as `_save` has it
        self.backwards: dict[tuple, _Backward] = {}  # by needs

    def flags(self, needs: Sequence[bool]) -> list[bool]:
        """The needs of all inputs from those of the tensors."""
        flags = [False] * len(self.op.inputs)
        for place, flag in zip(self.places, needs, strict=True):
            flags[place] = flag
        return flags

    def backward(self, ctx: Any, grad: Tensor | None) -> tuple:
        if grad is None or torch.is_grad_enabled():
            return self.inputs(self.op._gradients(ctx, self.flags(ctx.needs_input_grad[2:]), grad))
        backward = self.backwards.get(needs := ctx.needs_input_grad)
        if backward is None:
            backward = self.backwards[needs] = _Backward(self, self.flags(needs[2:]))
        return backward(ctx.saved_tensors, grad)


class _Backward:
    """The backward of such calls with one set of needs: where its arguments and gradients go, and its replays."""

    def __init__(self, of: Prepared, flags: Sequence[bool]) -> None:
        op, (plain, places, _) = of.op, of.kept
        op._check_needs(flags)
        have: list[Any] = [*plain, None, *(flags[i] for i in op._wrt), []]
        given = [*places, len(plain)]  # of `have`: what the call gives, the rest is known
        known = [k for k in range(len(have)) if k not in given]
        self.op, self.known = op, tuple(have[k] for k in known)
        self.arguments = picker([(given + known).index(k) for k in op._order])
        needed = [i if flags[i] else None for i in of.places]
        self.gradients = picker([len(op._wrt) if i is None else op._wrt.index(i) for i in needed])
        self.replays: dict[tuple, Callable[..., Any]] = {}  # by the signature of what is given

    def __call__(self, saved: tuple, grad: Tensor) -> tuple:
        given = (*saved, grad)
        args = self.arguments(given + self.known)
        key = None if plans.watched() or not plans.ENABLED else plans.signature_of_tensors(given)
        replay = None if key is None else self.replays.get(key)
        if replay is not None:
            got = replay(*args)
        else:
            op = self.op
            got = op._below_autograd(op.bwd, op._bwd_plans, args)
            if key is not None and op._bwd_plans is not None and (plan := op._bwd_plans.ready(args)) is not None:
                if len(self.replays) >= plans.MOST:
                    self.replays.clear()
                self.replays[key] = plan.replay  # type: ignore[assignment]
        return self.gradients((got, None) if isinstance(got, Tensor) else (*got, None))


class Differentiable:
    """The autograd of an op, of its forward and of its backward, from what :class:`Op` says of both."""

    name: str
    reference: Callable
    bwd_reference: Callable | None
    grads: tuple[str, ...]
    inputs: list[str]
    fwd: Any
    bwd: Any
    _bwd_traced: Any
    _bwd_wants: list[str]
    _kept: list[int]
    _order: list[int]
    _bwd_plans: Planned | None
    _wrt: list[int]
    _constant: list[int]

    @staticmethod
    def _below_autograd(op: Callable, plans: Planned | None, args: Sequence[Any]) -> Any:
        """The op's kernel at once, by its plan if it has one for these arguments: autograd's dispatch in Python costs
        more than a small kernel, and so does the dispatcher's way to a function in Python."""
        if plans is not None and (plan := plans.ready(args)) is not None:
            return plan.replay(*args)  # type: ignore[misc]
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

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
        values, kept = (*inputs, *outputs), list(numbers)
        kept[:0] = map(values.__getitem__, self._kept)
        _save(ctx, kept)
        return outputs

    def _backward(self, ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
        return tuple(self._gradients(ctx, ctx.needs_input_grad, grad))

    def _gradients(self, ctx: Any, flags: Sequence[Any], grad: Tensor | None) -> list[Any]:
        """The gradient of each input that needs one by its flag, or by a list of them for a list of tensors."""
        needs, out = flags, [None] * len(flags)
        if list in map(type, flags):
            needs = [any(flag) if isinstance(flag, list) else flag for flag in flags]
            out = [_no_gradient(flag) for flag in flags]
        self._check_needs(needs)
        if grad is None:  # nothing reaches the output (in a double backward)
            return out
        have = _saved(ctx)
        numbers = [have.pop()] if len(have) > len(self._kept) else []
        have.append(grad)
        for i in self._wrt:
            have.append(needs[i])
        have.append([])
        args = [have[k] for k in self._order]
        if numbers or torch.is_grad_enabled():
            got = (self._bwd_traced if numbers else self.bwd)(*args, *numbers)
        else:
            got = self._below_autograd(self.bwd, self._bwd_plans, args)
        if isinstance(got, list):
            rest = iter(got)
            got = [[next(rest) for _ in flags[i]] if needs[i] else None for i in self._wrt]
        for i, gradient in zip(self._wrt, (got,) if isinstance(got, Tensor) else got, strict=True):
            if needs[i]:
                out[i] = gradient
        return out

    def _check_needs(self, needs: Sequence[bool]) -> None:
        for i in self._constant:
            if needs[i]:
                raise RuntimeError(f"{self.name}: no gradient is provided for {self.inputs[i]!r}; detach it")

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
            raise RuntimeError(
                f"{self.name}: double backward is not provided (it would need {missing}); "
                "use_backend('reference') differentiates any number of times"
            )
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
