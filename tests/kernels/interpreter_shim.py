"""Repairs to Triton's interpreter (3.6 to 3.9), so that a kernel computes on a CPU what it computes on a GPU.

The stock interpreter truncates float32 to bfloat16 instead of rounding, multiplies bfloat16 bit patterns as
integers and never fires device assertions. Here the conversion rounds to nearest even, arithmetic on a
bfloat16 value that was not upcast is an error (it is a mistake on AMD as well), dots of bfloat16 operands are
computed in float32, and int32 overflow is reported.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    return np.where(is_nan, (bits >> 16) | 0x40, rounded).astype(np.uint16).reshape(np.shape(values))


def to_float32(values: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(values).astype(np.uint32) << 16).view(np.float32).reshape(np.shape(values))


def install() -> None:
    """Patch the interpreter of this process. Triton must have been imported with TRITON_INTERPRET=1."""
    builder: Any = interpreter.InterpreterBuilder
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)
    convert, dot, binary = interpreter._convert_float, builder.create_dot, builder.binary_op

    def convert_float(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            return to_bfloat16(values)
        if source == tl.bfloat16 and target == tl.float32:
            return to_float32(values)
        return convert(values, source, target, rounding)

    def upcast(handle: Any) -> Any:
        if handle.dtype.scalar == tl.bfloat16:
            return interpreter.TensorHandle(to_float32(handle.data), tl.float32)
        return handle

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, upcast(a), upcast(b), *rest)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if left.dtype.scalar == tl.bfloat16:
            raise TypeError("arithmetic on bfloat16: upcast to float32 at the load")
        return binary(self, left, right, op)

    interpreter._convert_float = convert_float
    builder.create_dot = create_dot
    builder.binary_op = binary_op
