"""The record of a launcher's work, and the function that does it again: see core/plans.py.

While a launcher runs, a dispatch mode sees its calls of torch, and Triton's `run` its launches. What is recorded of
them becomes a Python function of straight lines, `Plan.source` (plan_source.py):

* memory is allocated anew where it is first needed, and let go after its last use;
* a view that only kernels read is an address, base plus bytes; one that torch reads is made by one `as_strided`;
* a compiled kernel is called through Triton's own C launcher, on the stream that is current then.

A launcher is not planned, and goes on as it is written, if it asks for values, uses a tensor that the record does not
know, returns one of its arguments, or passes an address as a number in a way that is not :func:`launch.odd_address`.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import plans
from ..plans import Plan
from . import c_launch
from .launch import address_in, odd_address
from .plan_source import Called, Descriptor, Known, Launched, OddAddress, Writer

_lock = threading.Lock()  # of Triton's `run`, which a recording replaces
_ALLOCATIONS = frozenset(
    getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
)
_ADDRESSES_FROM = 1 << 32  # no smaller number is an address


class Refused(Exception):
    """Why a launcher has no plan."""


def _mapped(value: Any, fn: Callable[[Any], Any]) -> Any:
    if isinstance(value, (list, tuple)):
        items = [_mapped(item, fn) for item in value]
        if hasattr(value, "_fields"):  # a kernel reads its fields by their names
            return type(value)(*items)
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {key: _mapped(item, fn) for key, item in value.items()}
    return fn(value)


class Recorder(TorchDispatchMode):
    """Writes down what happens while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Called | Launched] = []
        self.refused = ""
        self._known: dict[int, tuple[Any, Known]] = {}  # by id, with a weak reference: memory is freed as ever
        self._names = 0
        self._thread = threading.get_ident()
        self._inside = False  # of a call of torch or a launch: what that calls and launches is its own affair

    # tensors

    def name(self, tensor: Tensor, name: str | None = None, **more: Any) -> Known:
        if name is None:
            name, self._names = f"t{self._names}", self._names + 1
        known = Known(name, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, **more)
        self._known[id(tensor)] = weakref.ref(tensor), known
        return known

    def known(self, tensor: Tensor) -> Known:
        alive, known = self._known.get(id(tensor), (None, None))
        if alive is None or known is None or alive() is not tensor:
            raise Refused("it uses a tensor that none of its arguments or calls gave")
        return known

    def _alive(self) -> Iterator[tuple[Tensor, Known]]:
        for alive, known in list(self._known.values()):
            if (tensor := alive()) is not None:
                yield tensor, known

    def _taken(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.known(value)
        if isinstance(value, TensorDescriptor):
            return Descriptor(self.known(value.base), value)
        return value

    def _launch_argument(self, value: Any) -> Any:
        return self._number(value) if type(value) is int and value >= _ADDRESSES_FROM else self._taken(value)

    def _number(self, value: int) -> Any:
        """A large number of a launch: one that stands for an address, or no address at all."""
        address = address_in(value)
        for tensor, known in self._alive():
            first = tensor.data_ptr()
            last = first + max(tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size(), 1)
            if address is not None and first == address:
                return OddAddress(known)
            if first <= value < last:
                raise Refused("it passes an address as a number")
        if address:
            raise Refused("it passes an address that belongs to no tensor of the record")
        return value

    # what happens

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        before, self._inside = self._inside, True
        try:
            yield
        finally:
            self._inside = before

    def launching(self) -> contextlib.AbstractContextManager:
        return self.inside() if threading.get_ident() == self._thread else contextlib.nullcontext()

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self._inside:  # the interpreter moves a kernel's tensors by calls of torch
            return op(*args, **kwargs)
        with self.inside():
            out = op(*args, **kwargs)
        if not self.refused:
            try:
                self._record_call(op, args, kwargs, out)
            except Refused as reason:
                self.refused = str(reason)
        return out

    def _record_call(self, op: Any, args: tuple, kwargs: dict, out: Any) -> None:
        if torch.Tag.data_dependent_output in op.tags or torch.Tag.dynamic_output_shape in op.tags:
            raise Refused(f"{op} depends on values")
        if torch.Tag.inplace_view in op.tags or op.overloadpacket is torch.ops.aten.set_:
            raise Refused(f"{op} changes what a tensor is")
        outs = out if isinstance(out, (list, tuple)) else [out]
        if not all(isinstance(each, Tensor) for each in outs):
            raise Refused(f"{op} returns something else than tensors")
        if op.overloadpacket in _ALLOCATIONS:
            self.name(out, allocated=True)
            return
        taken = _mapped(args, self._taken), _mapped(kwargs, self._taken)
        if _views(op, args, outs):
            base, model = args[0], taken[0][0]
            for each in outs:
                if each is base:
                    continue
                bytes_of = each.storage_offset() * each.element_size() - base.storage_offset() * base.element_size()
                root = model.root or model
                made = (op, *taken) if each.dtype != root.dtype else None
                at = tuple(each.shape), each.stride(), each.dtype, model.offset + bytes_of
                if at == (root.size, root.stride, root.dtype, 0):
                    self._known[id(each)] = weakref.ref(each), root
                    continue
                self.name(each, root=root, offset=model.offset + bytes_of, made=made)
            return
        new = [None if self._has(each) else self.name(each) for each in outs]
        if any(new) and not all(new):
            raise Refused(f"{op} returns an argument among its results")
        self.steps.append(Called(op, *taken, None if not new[0] else new if isinstance(out, (list, tuple)) else new[0]))

    def _has(self, tensor: Tensor) -> bool:
        alive, _ = self._known.get(id(tensor), (None, None))
        return alive is not None and alive() is tensor

    def launched(self, jit: Any, compiled: Any, grid: Any, args: tuple, kwargs: dict) -> None:
        if self._inside or self.refused or threading.get_ident() != self._thread:
            return
        try:
            if callable(grid):
                raise Refused("its grid is a function")
            args, kwargs = _mapped(args, self._launch_argument), _mapped(kwargs, self._launch_argument)
            self.steps.append(Launched(jit, compiled, tuple(grid), args, kwargs))
        except Refused as reason:
            self.refused = str(reason)


def _views(op: Any, args: tuple, outs: Iterable[Tensor]) -> bool:
    """Whether all results see the memory of the first argument. An op like `contiguous` may give views or copies."""
    returns = op._schema.returns
    if not returns or any(r.alias_info is None or r.alias_info.is_write for r in returns):
        return False
    memory = args[0].untyped_storage()._cdata
    return all(each.untyped_storage()._cdata == memory for each in outs)


def record(launcher: Callable[..., Any], args: tuple, plan: Plan) -> Any:
    """The launcher's results for these arguments; its plan is made, or refused, on the way."""
    with _lock:
        recorder, writer, unpacked = Recorder(), Writer(), []
        given: list[Any] = []  # aliases: a tensor that is given twice need not be the next time
        for i, value in enumerate(args):
            if isinstance(value, (list, tuple)):
                own = [item.detach() if isinstance(item, Tensor) else item for item in value]
                names = [f"a{i}_{k}" for k in range(len(own))]
                for item, name in zip(own, names, strict=True):
                    if isinstance(item, Tensor):
                        writer.given(recorder.name(item, name))
                if any(isinstance(item, Tensor) for item in own):
                    unpacked.append(f"{', '.join(names)}, = a{i}")
                given.append(own)
            elif isinstance(value, Tensor):
                given.append(value.detach())
                writer.given(recorder.name(given[-1], f"a{i}"))
            else:
                given.append(value)
        inputs = frozenset(known.name for _, known in recorder._known.values())
        with c_launch.watched(recorder.launching, recorder.launched), recorder:
            out = launcher(*given)
        try:
            if recorder.refused:
                raise Refused(recorder.refused)
            result = _mapped(out, recorder.known)
            for step in recorder.steps:
                writer.step(step)
            for known in result if isinstance(result, (list, tuple)) else [result]:
                if (known.root or known).name in inputs:
                    raise Refused("it returns one of its arguments, or a view of one")
            text = writer.value(result)
            kept = inputs | frozenset(writer._used)
            writer.emit(f"return {text}")
        except Refused as reason:
            plan.refused = str(reason)
            return out
        if any("(stream" in line or ", stream," in line for line, _ in writer.lines):
            there = c_launch.device_of(args)  # by now another device than the launcher's may be the current one
            index = there.index if there is not None and there.type == "cuda" else driver.active.get_current_device()
            unpacked.append(f"stream = current_stream({index})")
            writer.names["current_stream"] = driver.active.get_current_stream
        plan.source = writer.source(", ".join(f"a{i}" for i in range(len(args))), unpacked, kept)
        known_names = writer.names | {
            "torch": torch, "empty_strided": torch.empty_strided, "as_strided": torch.as_strided,
            "odd_address": odd_address,
        }  # fmt: skip
        exec(compile(plan.source, f"<plan of {launcher.__name__}>", "exec"), known_names)
        plans.hooked = c_launch.hooked
        plan.replay = c_launch.on_its_device(known_names["replay"], args)
        return out
