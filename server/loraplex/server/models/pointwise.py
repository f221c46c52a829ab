"""Norms, rotation and gates on a CPU by compiled kernels; same meaning as the PyTorch ones beside which they stand.

Activations are float32 or bfloat16 and contiguous. Each call has an argument block of its own, so that several threads
may use one object.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass

import torch

from loraplex.server.models.pointwise_kernel import NUM_ARGUMENTS, pointwise_kernel
from loraplex.server.native.team import Kernel
from loraplex.server.native.workspace import empty, team_size

# Work for fewer numbers than this is done before a second thread is awake.
_PARALLEL_NUMBERS = 1 << 15

_Block = ctypes.c_int64 * NUM_ARGUMENTS
_NORM = struct.Struct("7q")
_ROTATE = struct.Struct("7q")
_GATE = struct.Struct("5q")


def _call(kernel: Kernel, block: ctypes.Array[ctypes.c_int64], numbers: int) -> None:
    kernel(ctypes.addressof(block), team_size(numbers >= _PARALLEL_NUMBERS))


class CpuRmsNorm:
    """Implements `Norm`: `x / sqrt(mean(x^2) + eps) * weight`, and the addition before it in the same pass."""

    def __init__(self, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> None:
        """Take the weight, (features,), as it is to be multiplied, and the dtype of activations."""
        self._weight = weight.float().contiguous()
        self._eps = torch.tensor([eps], dtype=torch.float32)
        self._constants = (self._weight.data_ptr(), self._eps.data_ptr(), weight.shape[0])
        self._dtype = dtype
        self._kernel = pointwise_kernel("norm", dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalized `x`; (T, features)."""
        return self._run(x, 0)

    def add(self, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """Add `delta` to `x` in place and return the normalized sum."""
        assert delta.is_contiguous(), "a product's output is contiguous"
        assert delta.dtype is self._dtype, "a product's output has the dtype of activations"
        assert delta.shape == x.shape, "a product's output is as wide as the residual stream"
        return self._run(x, delta.data_ptr())

    def _run(self, x: torch.Tensor, delta: int) -> torch.Tensor:
        assert x.is_contiguous(), "the residual stream is contiguous"
        assert x.dtype is self._dtype, "the residual stream has the dtype of activations"
        out = empty(*x.shape, dtype=x.dtype)
        block = _Block()
        _NORM.pack_into(block, 0, x.shape[0], x.data_ptr(), delta, out.data_ptr(), *self._constants)
        _call(self._kernel, block, x.numel())
        return out


@dataclass(frozen=True)
class CpuRotation:
    """Implements `Rotation`; `angles` is (T, rotary_dim) float32, the cosines and then the sines of each token."""

    angles: torch.Tensor

    def apply(self, heads: torch.Tensor) -> torch.Tensor:
        """Rotate (T, heads, head_dim) in place; the heads of a token lie side by side."""
        tokens, count, size = heads.shape
        assert heads.stride()[1:] == (size, 1), "heads are slices of a packed product"
        assert tokens == self.angles.shape[0], "every token has its angles"
        block = _Block()
        half = self.angles.shape[1] // 2
        _ROTATE.pack_into(
            block, 0, tokens, heads.data_ptr(), heads.stride(0), count, size, half, self.angles.data_ptr()
        )
        _call(pointwise_kernel("rotate", heads.dtype), block, heads.numel())
        return heads


class CpuGate:
    """`activation(gate) * up` for gate and up side by side, (T, 2n) to (T, n)."""

    def __init__(self, *, gelu: bool) -> None:
        """Take GELU in its tanh form, or SiLU."""
        self._gelu = gelu

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the gated values."""
        assert x.is_contiguous(), "a product's output is contiguous"
        tokens, width = x.shape[0], x.shape[1] // 2
        out = empty(tokens, width, dtype=x.dtype)
        block = _Block()
        _GATE.pack_into(block, 0, tokens, x.data_ptr(), out.data_ptr(), width, self._gelu)
        _call(pointwise_kernel("gate", x.dtype), block, x.numel())
        return out
