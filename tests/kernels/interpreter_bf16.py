"""bfloat16 for Triton's interpreter, which keeps it as raw uint16 and computes on the bit patterns.

install() makes every floating-point operation widen bfloat16 to float32 (exact), run, and round the result once to
nearest even, as the hardware does. What is still wrong there, reductions of raw bfloat16, raises instead.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
COMPUTED = ("binary_op", "unary_op", "ternary_op", "create_fma", "create_rsqrt", "create_erf")


def is_bf16(value: object) -> bool:
    """Handles of a bfloat16 block or scalar; pointers to bfloat16 are not."""
    return isinstance(value, Handle) and value.dtype.scalar == tl.bfloat16


def widen(bits: np.ndarray) -> np.ndarray:
    """uint16 bit patterns -> the float32 of the same value."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """Real values -> uint16 bit patterns, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16).reshape(np.shape(values))


def _in_float32(method: Callable) -> Callable:
    @functools.wraps(method)
    def computed(self, *args):
        if not any(map(is_bf16, args)):
            return method(self, *args)
        out = method(self, *[Handle(widen(a.data), tl.float32) if is_bf16(a) else a for a in args])
        if out.data.dtype == np.bool_:  # a comparison
            return Handle(out.data, tl.int1)
        return Handle(narrow(out.data), tl.bfloat16)

    return computed


def _dot(method: Callable) -> Callable:
    def dot(self, a, b, d, *rest):
        a, b = (Handle(widen(t.data), tl.float32) if is_bf16(t) else t for t in (a, b))
        if not is_bf16(d):
            return method(self, a, b, d, *rest)
        return Handle(narrow(method(self, a, b, Handle(widen(d.data), tl.float32), *rest).data), tl.bfloat16)

    return dot


def _cast(method: Callable) -> Callable:
    def cast(self, src, dst_type, *rest):
        to_bf16 = dst_type.scalar == tl.bfloat16
        if is_bf16(src) == to_bf16 or src.dtype.scalar.is_fp8() or dst_type.scalar.is_fp8():
            return method(self, src, dst_type, *rest)
        if to_bf16:
            return Handle(narrow(src.data.astype(np.float32)), tl.bfloat16)
        return Handle(widen(src.data).astype(interpreter._get_np_dtype(dst_type)), dst_type.scalar)

    return cast


def _refuses_bf16(method: Callable) -> Callable:
    def reduced(self, values):
        if any(is_bf16(v.handle) for v in (values if isinstance(values, tuple) else (values,))):
            raise TypeError(
                "a reduction of raw bfloat16 adds bit patterns in the interpreter: convert to float32 first"
            )
        return method(self, values)

    return reduced


def install() -> None:
    """Patches the interpreter of this process, once."""
    builder = interpreter.InterpreterBuilder
    if hasattr(builder, "get_bf16"):
        return
    for name in COMPUTED:
        setattr(builder, name, _in_float32(getattr(builder, name)))
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(builder, name, _cast(getattr(builder, name)))
    builder.create_dot = _dot(builder.create_dot)
    builder.get_bf16 = lambda self, value: Handle(narrow(np.array([value], np.float32)), tl.bfloat16)
    base = interpreter.ReduceScanOpInterface
    base.apply = _refuses_bf16(base.apply)


def patch_once() -> None:
    """Triton's language is the interpreter's for good.

    The interpreter searches all of it at every launch and at every call of a device function, and so spends a third of
    its time.
    """
    everything = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
    interpreter._patch_lang(everything)
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
    # a table of all dtypes, made anew for every constant; types are equal by their names and have no hash
    found, known = interpreter._get_np_dtype, {}

    def once(kind):
        if kind.name not in known:
            known[kind.name] = found(kind)
        return known[kind.name]

    interpreter._get_np_dtype = once
