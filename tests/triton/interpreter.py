"""bfloat16 for the Triton interpreter, which otherwise computes on the raw 16-bit patterns, truncates when it rounds;
most of its time back, which it spends on patching a language that is patched already and on finding out again, for
every operation, that two operands of one type need no conversion; and a check that every address a kernel reads or
writes lies within one of the tensors of its launch.

A pytest plugin (`-p tests.triton.interpreter`) for runs with TRITON_INTERPRET=1; importing it is all. Kernels here
widen what they load and give bfloat16 to `tl.dot` only, so reductions and scans of bfloat16 are left as they are.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

from fastloss.core.kernels.layer_table import MOST

ARITHMETIC = (
    "fadd fsub fmul fdiv fma minimumf maximumf minnumf maxnumf fneg fabs "
    "exp exp2 log log2 sqrt precise_sqrt rsqrt sin cos"
)
COMPARISONS = "OLT OGT OLE OGE OEQ ONE ULT UGT ULE UGE UEQ UNE"


def widen(patterns: np.ndarray) -> np.ndarray:
    """bfloat16 patterns as float32."""
    return (patterns.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _is_bfloat16(value: Any) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar.name == "bf16"


def _up(value: Any) -> Any:
    return TensorHandle(widen(value.data), tl.float32) if _is_bfloat16(value) else value


def _down(value: TensorHandle) -> TensorHandle:
    return TensorHandle(narrow(value.data), tl.bfloat16)


_cast = InterpreterBuilder.cast_impl
_dot = InterpreterBuilder.create_dot
_fma = InterpreterBuilder.create_fma


def _cast_any(self: InterpreterBuilder, source: TensorHandle, dtype: tl.dtype) -> TensorHandle:
    to_bfloat16 = dtype.scalar == tl.bfloat16
    if _is_bfloat16(source):
        return source if to_bfloat16 else _cast(self, _up(source), dtype)
    return _down(_cast(self, source, tl.float32)) if to_bfloat16 else _cast(self, source, dtype)


def _cast_rounded(self: InterpreterBuilder, source: TensorHandle, dtype: tl.dtype, mode: Any) -> TensorHandle:
    return _cast_any(self, source, dtype)


def _dot_fused(
    self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, acc: TensorHandle, *rest: Any
) -> TensorHandle:
    """The chain of fused multiply-adds along k that a float32 `tl.dot` compiles to; numpy's own sums lose more."""
    a, b = _up(a), _up(b)
    if acc.dtype.scalar != tl.float32 or acc.data.ndim != 2:
        return _dot(self, a, b, acc, *rest)
    left, right, total = a.data.astype(np.float64), b.data.astype(np.float64), acc.data
    for k in range(left.shape[1]):
        total = (left[:, k, None] * right[k] + total).astype(np.float32)
    return TensorHandle(total, tl.float32)


def _widened(operation: Callable, compares: bool) -> Callable:
    def apply(self: InterpreterBuilder, *args: Any) -> TensorHandle:
        for arg in args:
            if _is_bfloat16(arg):
                result = operation(self, *map(_up, args))
                return result if compares else _down(result)
        return operation(self, *args)

    return apply


def _fused(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    """A float32 multiply-add that rounds once, as every GPU has it: float64 holds the product exactly."""
    if x.dtype.scalar != tl.float32:
        return _fma(self, x, y, z)
    exact = x.data.astype(np.float64) * y.data + z.data
    return TensorHandle(exact.astype(np.float32), tl.float32)


_patch_lang = interpreter._patch_lang
_np_dtype_of_scalar = functools.cache(interpreter._get_np_dtype)  # which makes a table of all of them each time


def _np_dtype(dtype: tl.dtype) -> np.dtype:
    return np.dtype(np.uint64) if dtype.scalar.is_ptr() else _np_dtype_of_scalar(dtype.scalar)


@functools.cache
def _languages(fn: Callable) -> tuple[ModuleType, ...]:
    """The modules of the language that a function sees."""
    return tuple(m for m in fn.__globals__.values() if inspect.ismodule(m) and m in (tl, tl.core))


def _patch_lang_once(fn: Callable) -> Any:
    """Device functions patch what their kernel, which restores it at its end, has patched before."""
    if any(tl.core.is_builtin(language.load) for language in _languages(fn)):
        return _patch_lang(fn)
    return interpreter._LangPatchScope()


# --- Time: types, shapes and constants that are made anew for every operation ---

_unwrap = tl.core._unwrap_if_constexpr
_equal = tl.dtype.__eq__
_operands = TritonSemantic.binary_op_type_checking_impl
_broadcast = TritonSemantic.broadcast_impl_value
_block_type = tl.block_type.__init__
_block_types: dict[tuple, dict] = {}
_SCALAR = (tl.constexpr(1), tl.tuple([]))


def _splat(value: tl.tensor, sizes: tuple[int, ...]) -> tl.tensor:
    dtype = value.handle.dtype
    data = np.full(sizes, value.handle.data, _np_dtype(dtype))
    return tl.tensor(TensorHandle(data, dtype), tl.block_type(value.dtype, list(sizes)))


def _broadcast_unequal(self: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Blocks of one shape as they are: the interpreter's own comparison, of a tuple with a list, finds none equal."""
    if lhs.sizes == rhs.sizes:
        return lhs, rhs
    if lhs.sizes is None:
        return _splat(lhs, rhs.sizes), rhs
    return (lhs, _splat(rhs, lhs.sizes)) if rhs.sizes is None else _broadcast(self, lhs, rhs)


_NO_CONSTEXPR = (tl.tensor, bool, int, float, tl.dtype)


def _unwrap_value(value: Any) -> Any:
    return value if isinstance(value, _NO_CONSTEXPR) else _unwrap(value)


def _equal_types(self: tl.dtype, other: Any) -> bool:
    return self is other or _equal(self, other)


@functools.lru_cache(maxsize=4096)
def _constant(value: float, dtype: tl.dtype, sizes: tuple[int, ...] | None) -> tl.tensor:
    """A number as a block of `sizes`, or as a scalar; read-only, since it is shared."""
    data = np.full(sizes or (1,), value, _np_dtype(dtype))
    data.flags.writeable = False
    return tl.tensor(TensorHandle(data, dtype), tl.block_type(dtype, list(sizes)) if sizes else dtype)


def _beside(value: tl.tensor, number: float) -> tl.tensor | None:
    """A number as a constant of the type and shape of the float32 or int32 beside it; None: left to the interpreter."""
    if value.dtype is tl.float32:
        if number != number:  # NaN is no key
            return None
        number = number or 0.0  # as the interpreter makes -0.0
    elif value.dtype is not tl.int32 or type(number) is not int or not -(2**31) <= number < 2**31:
        return None
    return _constant(number, value.dtype, value.sizes)


def _equal_operands(self: TritonSemantic, lhs: Any, rhs: Any, *rest: Any, **options: Any) -> tuple[Any, Any]:
    """Two operands of float32 or int32 as they are, but for broadcasting; a number beside one of them as a constant of
    its type. Of others the interpreter's own: a number that it makes a scalar of another type, converts, broadcasts."""
    if isinstance(lhs, tl.tensor):
        if isinstance(rhs, tl.tensor):
            if lhs.dtype is rhs.dtype and (lhs.dtype is tl.float32 or lhs.dtype is tl.int32):
                return self.broadcast_impl_value(lhs, rhs)
        elif type(rhs) in (int, float):
            constant = _beside(lhs, rhs)
            if constant is not None:
                return lhs, constant
    elif isinstance(rhs, tl.tensor) and type(lhs) in (int, float):
        constant = _beside(rhs, lhs)
        if constant is not None:
            return constant, rhs
    return _operands(self, lhs, rhs, *rest, **options)


_ARITHMETIC = {"__add__": np.add, "__radd__": np.add, "__mul__": np.multiply, "__rmul__": np.multiply,
               "__sub__": np.subtract}  # fmt: skip


def _with_semantic(obj: Any, name: str, member: Callable) -> Callable:
    """A function of the language, told which semantic it has, as the interpreter's own; without its copy of the
    arguments and its check that a semantic is there. Sums, differences and products of two float32 or int32, or of one
    and a number, are numpy's at once."""
    function = getattr(member, "__wrapped__", member)
    operation = _ARITHMETIC.get(name) if obj is tl.tensor else None

    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return function(*args, **kwargs)

    def compute(value: tl.tensor, other: Any) -> tl.tensor:
        dtype = value.dtype
        if dtype is tl.float32 or dtype is tl.int32:
            right = _beside(value, other) if type(other) in (int, float) else other
            if type(right) is tl.tensor and right.dtype is dtype:
                data = operation(value.handle.data, right.handle.data)  # broadcasts as Triton does
                result = value.type if right.sizes == value.sizes else tl.block_type(dtype, list(data.shape))
                return tl.tensor(TensorHandle(data, dtype), result)
        return call(value, other)

    return call if operation is None else compute


@functools.cache
def _members(package: Any) -> list[tuple[str, Callable]]:
    found = [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
    return [(name, _with_semantic(package, name, member)) for name, member in found]


def _patch_members(package: Any, builder: Any, scope: Any) -> None:
    """The functions of a module or class of the language, found and made once."""
    for name, member in _members(package):
        scope.set_attr(package, name, member)


def _no_assertion(self: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor, operation: Callable) -> None:
    """Nothing: the interpreter computes every sum of integers again to assert something, and asserts nothing."""


def _make_block_type(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
    sizes = tuple([s.value if isinstance(s, tl.constexpr) else s for s in shape])
    made = _block_types.get((element_ty.name, sizes))
    if made is None:
        _block_type(self, element_ty, shape)
        self.sizes, self.constants = sizes, (tl.constexpr(self.numel), tl.tuple([tl.constexpr(s) for s in sizes]))
        _block_types[element_ty.name, sizes] = dict(self.__dict__)
    else:
        self.__dict__.update(made)


def _make_tensor(self: tl.tensor, handle: TensorHandle, dtype: tl.dtype) -> None:
    self.handle, self.type, self.dtype = handle, dtype, dtype.scalar
    if dtype.is_block():
        self.sizes, (self.numel, self.shape) = dtype.sizes, dtype.constants
    else:
        self.sizes, (self.numel, self.shape) = None, _SCALAR


# --- Addresses ---

_launch = GridExecutor.__call__
_load = InterpreterBuilder.create_masked_load
_store = InterpreterBuilder.create_masked_store
_extents: list[tuple[int, int]] | None = None  # first and last byte of the tensors of a launch; None: not known


def _tensors(arg: Any) -> Iterator[torch.Tensor]:
    if isinstance(arg, torch.Tensor):
        yield arg
    elif isinstance(arg, TensorDescriptor):
        yield arg.base
    elif isinstance(arg, tuple):
        for part in arg:
            yield from _tensors(part)


def _extent(t: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (1 + last) * t.element_size() if t.numel() else t.data_ptr()


def _launch_within(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
    """A launch whose addresses are checked, unless a table of addresses is among its arguments (layer_table.py)."""
    global _extents
    tensors = list(_tensors((*args, *kwargs.values())))
    has_table = any(t.dtype == torch.int64 and t.ndim == 2 and t.shape[1] == MOST for t in tensors)
    _extents = None if has_table else [_extent(t) for t in tensors]
    try:
        _launch(self, *args, **kwargs)
    finally:
        _extents = None


def _check(ptrs: TensorHandle, mask: TensorHandle) -> None:
    if _extents is None:
        return
    read = np.asarray(mask.data).astype(bool)  # of a descriptor it is an array, not a handle
    addresses = ptrs.data if read.all() else ptrs.data[np.broadcast_to(read, ptrs.data.shape)]
    if not addresses.size:
        return
    size = ptrs.get_element_ty().primitive_bitwidth // 8
    low, high = int(addresses.min()), int(addresses.max()) + size
    if any(start <= low and high <= end for start, end in _extents):
        return
    inside = np.zeros(addresses.shape, bool)
    for start, end in _extents:
        inside |= (addresses >= start) & (addresses + size <= end)
    if not inside.all():
        raise IndexError(f"{(~inside).sum()} of {inside.size} addresses lie in no tensor of the launch")


def _load_within(
    self: InterpreterBuilder, ptrs: TensorHandle, mask: TensorHandle, *rest: Any, **more: Any
) -> TensorHandle:
    _check(ptrs, mask)
    return _load(self, ptrs, mask, *rest, **more)


def _store_within(
    self: InterpreterBuilder, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any, **more: Any
) -> None:
    _check(ptrs, mask)
    _store(self, ptrs, value, mask, *rest, **more)


def _patch() -> None:
    TritonSemantic.broadcast_impl_value = _broadcast_unequal
    TritonSemantic.binary_op_type_checking_impl = _equal_operands
    TritonSemantic.binary_op_sanitize_overflow_impl = _no_assertion
    tl.dtype.__eq__ = _equal_types
    tl.core._unwrap_if_constexpr = _unwrap_value
    tl.block_type.__init__ = _make_block_type
    tl.tensor.__init__ = _make_tensor
    GridExecutor.__call__ = _launch_within
    InterpreterBuilder.create_masked_load = _load_within
    InterpreterBuilder.create_masked_store = _store_within
    interpreter._patch_lang = _patch_lang_once
    interpreter._patch_builtin = _patch_members
    interpreter._get_np_dtype = _np_dtype
    InterpreterBuilder.cast_impl = _cast_any
    InterpreterBuilder.create_dot = _dot_fused
    InterpreterBuilder.create_fma = _fused
    for name in [f"create_{n}" for n in ARITHMETIC.split()] + [f"create_fcmp{n}" for n in COMPARISONS.split()]:
        operation = getattr(InterpreterBuilder, name, None)
        if operation is not None:
            setattr(InterpreterBuilder, name, _widened(operation, compares=name.startswith("create_fcmp")))


_patch()
