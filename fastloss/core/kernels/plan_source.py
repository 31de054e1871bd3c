"""The source of a plan: Python's lines from the steps of a record, which recorder.py writes down."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from . import c_launch


@dataclass(eq=False)
class Known:
    """A tensor of the record. Views have a `root`, the tensor whose memory they see, `offset` bytes from its first."""

    name: str
    size: tuple
    stride: tuple
    dtype: torch.dtype
    device: torch.device
    allocated: bool = False
    root: Known | None = None
    offset: int = 0
    made: tuple | None = None  # of a view with a dtype of its own: (op, arguments)


@dataclass(eq=False)
class Called:
    """A call of torch: results that are new (None: known before), function, arguments."""

    op: Any
    args: tuple
    kwargs: dict
    out: Any


@dataclass(eq=False)
class Launched:
    """A launch: the kernel as Triton's decorator made it and, if it is compiled, what that came to."""

    jit: Any
    compiled: Any
    grid: tuple
    args: tuple
    kwargs: dict


@dataclass(eq=False)
class Descriptor:
    base: Known
    of: TensorDescriptor


@dataclass(eq=False)
class OddAddress:
    of: Known


@dataclass
class Writer:
    """Lines of Python from the steps of a record."""

    lines: list[tuple[str, frozenset[str]]] = field(default_factory=list)
    names: dict[str, Any] = field(default_factory=dict)  # of the constants
    _made: set[str] = field(default_factory=set)
    _addressed: set[str] = field(default_factory=set)
    _used: set[str] = field(default_factory=set)

    def emit(self, text: str, defines: Iterable[str] = ()) -> None:
        self._made.update(defines)
        self.lines.append((text, frozenset(self._used | set(defines))))
        self._used.clear()

    def constant(self, value: Any) -> str:
        name = f"c{len(self.names)}"
        self.names[name] = value
        return name

    def given(self, known: Known) -> None:
        self._made.add(known.name)

    def tensor(self, known: Known) -> str:
        """The name of a tensor, made here if it is an allocation or a view that is needed for the first time."""
        if known.name not in self._made:
            outer, self._used = self._used, set()  # a line of its own comes before the one in work
            if known.allocated:
                self.emit(f"{known.name} = {self.allocation(known)}", (known.name,))
            elif known.made is not None:
                op, args, kwargs = known.made
                self.emit(f"{known.name} = {self.function(op)}({self.arguments(args, kwargs)})", (known.name,))
            else:
                root = known.root
                assert root is not None
                base, start = self.tensor(root), str(known.offset // known.dtype.itemsize)
                if not root.allocated:
                    start = f"{base}.storage_offset() + {start}"
                self.emit(
                    f"{known.name} = as_strided({base}, {_literal(known.size)}, {_literal(known.stride)}, {start})",
                    (known.name,),
                )
            self._used = outer
        self._used.add(known.name)
        return known.name

    def allocation(self, known: Known) -> str:
        layout = f"{_literal(known.size)}, {_literal(known.stride)}"
        # what torch.compile's graphs allocate by: on the current device, and never filled for the sake of determinism
        fast = getattr(torch._C._dynamo.guards, f"_empty_strided_{known.device.type}", None)
        if fast is None or torch.are_deterministic_algorithms_enabled():
            return f"empty_strided({layout}, dtype={known.dtype}, device={self.constant(known.device)})"
        return f"{self.constant(fast)}({layout}, {known.dtype})"

    def address(self, known: Known) -> str:
        root = known.root or known
        name, at = self.tensor(root), f"p_{root.name}"
        if at not in self._addressed:
            self._addressed.add(at)
            outer, self._used = self._used, {name}
            self.emit(f"{at} = {name}.data_ptr()")
            self._used = outer
        return f"{at} + {known.offset}" if known.offset else at

    def function(self, op: Any) -> str:
        return self.constant(getattr(op, "_op", op))

    def value(self, value: Any, addresses: bool = False) -> str:
        """A value as Python's source; of a kernel's arguments tensors are addresses."""
        if isinstance(value, Known):
            return self.address(value) if addresses else self.tensor(value)
        if isinstance(value, OddAddress):
            root = value.of.root or value.of
            self.tensor(root)
            return f"odd_address({self.address(value.of)})"
        if isinstance(value, tuple):
            items = f"({''.join(self.value(item, addresses) + ', ' for item in value)})"
            named = hasattr(value, "_fields") and not addresses  # the C launcher takes fields in order
            return f"{self.constant(type(value))}(*{items})" if named else items
        if isinstance(value, list):
            return f"[{', '.join(self.value(item, addresses) for item in value)}]"
        if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
            return repr(value)
        if isinstance(value, torch.dtype):
            return str(value)
        if isinstance(value, Descriptor):
            d = value.of
            return f"{self.constant(TensorDescriptor)}({self.tensor(value.base)}, {_literal(d.shape)}, " \
                   f"{_literal(d.strides)}, {_literal(d.block_shape)}, {d.padding!r})"  # fmt: skip
        return self.constant(value)

    def arguments(self, args: tuple, kwargs: dict) -> str:
        named = (f"{key}={self.value(item)}" for key, item in kwargs.items())
        return ", ".join([*map(self.value, args), *named])

    def step(self, step: Called | Launched) -> None:
        if isinstance(step, Launched):
            if not c_launch.write(self, step):
                jit = self.constant(step.jit)
                self.emit(f"{jit}[{_literal(step.grid)}]({self.arguments(step.args, step.kwargs)})")
            return
        text = f"{self.function(step.op)}({self.arguments(step.args, step.kwargs)})"
        if step.out is None:
            self.emit(text)
        elif isinstance(step.out, list):
            names = [known.name for known in step.out]
            self.emit(f"{''.join(name + ', ' for name in names)}= {text}", names)
        else:
            self.emit(f"{step.out.name} = {text}", (step.out.name,))

    def source(self, parameters: str, unpacked: list[str], kept: frozenset[str]) -> str:
        """The function, which lets go of each tensor after the last line that uses it."""
        last = {name: at for at, (_, used) in enumerate(self.lines) for name in used}
        text = [f"def replay({parameters}):", *unpacked]
        for at, (line, used) in enumerate(self.lines):
            text.append(line)
            if done := sorted(name for name in used if last[name] == at and name not in kept):
                text.append(f"del {', '.join(done)}")
        return "\n    ".join(text) + "\n"


def _literal(numbers: Iterable[int]) -> str:
    return f"({''.join(f'{int(n)}, ' for n in numbers)})"
