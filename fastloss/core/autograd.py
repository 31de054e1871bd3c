"""Autograd under an op: what the backward keeps, the backward, and double backward through the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

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
    _ordered: Callable[[Sequence[Any]], tuple]
    _bwd_plans: Planned | None
    _wrt: list[int]
    _constant: list[int]

    @staticmethod
    def _below_autograd(op: Callable, plans: Planned | None, args: Sequence[Any]) -> Any:
        """The op's kernel at once, by its plan if it has one for these arguments: autograd's dispatch in Python costs
        more than a small kernel, and so does the dispatcher's way to a function in Python."""
        replay = None if plans is None else plans.replay(args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args) if replay is None else replay(*args)

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
        for i in self._constant:
            if needs[i]:
                raise RuntimeError(f"{self.name}: no gradient is provided for {self.inputs[i]!r}; detach it")
        if grad is None:  # nothing reaches the output (in a double backward)
            return out
        have = _saved(ctx)
        numbers = [have.pop()] if len(have) > len(self._kept) else []
        have.append(grad)
        for i in self._wrt:
            have.append(needs[i])
        have.append([])
        args = self._ordered(have)
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
