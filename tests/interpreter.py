"""bfloat16 for the Triton interpreter, which otherwise computes on the raw 16-bit patterns, truncates when it rounds;
and half of its time back, which it spends on patching a language that is patched already.

A pytest plugin (`-p tests.interpreter`) for runs with TRITON_INTERPRET=1; importing it is all. Kernels here widen what
they load and give bfloat16 to `tl.dot` only, so reductions and scans of bfloat16 are left as they are.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

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
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


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
        if not any(map(_is_bfloat16, args)):
            return operation(self, *args)
        result = operation(self, *map(_up, args))
        return result if compares else _down(result)

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


def _patch() -> None:
    interpreter._patch_lang = _patch_lang_once
    interpreter._get_np_dtype = _np_dtype
    InterpreterBuilder.cast_impl = _cast_any
    InterpreterBuilder.create_dot = _dot_fused
    InterpreterBuilder.create_fma = _fused
    for name in [f"create_{n}" for n in ARITHMETIC.split()] + [f"create_fcmp{n}" for n in COMPARISONS.split()]:
        operation = getattr(InterpreterBuilder, name, None)
        if operation is not None:
            setattr(InterpreterBuilder, name, _widened(operation, compares=name.startswith("create_fcmp")))


_patch()
