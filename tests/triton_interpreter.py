"""Where Triton kernels run in tests: on a GPU if there is one, else in Triton's interpreter, with NumPy.

The interpreter keeps bfloat16 as 16-bit integers. It multiplies those integers in `dot`, and cuts numbers off instead
of rounding them (Triton 3.6 and 3.7); both are put right here, in the interpreter's own terms, so that kernels need no
detours for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = DEVICE.type == "cpu"


def widened(bits: np.ndarray) -> np.ndarray:
    """Return bfloat16 numbers, given as uint16, in float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    """Return float32 numbers rounded to the nearest bfloat16, to even in the middle, as uint16."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16).reshape(np.shape(values))


def _mend() -> None:
    from triton import language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    handle: Any = interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        kinds = (src.dtype.scalar, dst_type.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            return handle(widened(src.data), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            return handle(narrowed(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (handle(widened(m.data), tl.float32) if m.dtype.scalar == tl.bfloat16 else m for m in (a, b))
        return dot(self, a, b, *rest)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot


if INTERPRETED:
    _mend()
