"""NF4 in plain torch on any device, for machines without bitsandbytes. Equal to it but for ties and nested scales."""

from __future__ import annotations

import importlib
import math

import torch

from loraplex.adapters.four_bit import code_values
from loraplex.server.models.four_bit import BLOCKSIZE, FourBitMatrix
from loraplex.server.models.linear import Linear, product
from loraplex.server.models.quantized_linear import QuantizedLinear


def quantize(weight: torch.Tensor) -> FourBitMatrix:
    """Quantize `weight` (out, in), in a float dtype and with a multiple of 64 inputs, where it lies.

    Raises:
        ValueError: for another number of inputs.
    """
    if weight.shape[1] % BLOCKSIZE:
        raise ValueError(f"{weight.shape[1]} inputs are no multiple of {BLOCKSIZE}")
    blocks = weight.float().reshape(-1, BLOCKSIZE)
    absmax = blocks.abs().amax(1).clamp_(min=1e-38)
    values = code_values("nf4").to(weight.device)
    codes = torch.bucketize(blocks / absmax[:, None], (values[1:] + values[:-1]) / 2).to(torch.uint8)
    packed = codes[:, ::2] << 4 | codes[:, 1::2]
    return FourBitMatrix("nf4", BLOCKSIZE, (weight.shape[0], weight.shape[1]), packed, absmax)


def dequantize(matrix: FourBitMatrix, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the values of an NF4 matrix, (out, in), rounded to `dtype`."""
    values = code_values("nf4").to(matrix.codes.device)
    pairs = torch.stack((values.repeat_interleave(16), values.repeat(16)), -1)  # of every byte
    flat = (pairs[matrix.codes.int()].view(len(matrix.absmax), -1) * matrix.absmax[:, None]).to(dtype).view(-1)
    return flat[: math.prod(matrix.shape)].view(matrix.shape)


KERNEL_ROWS = 64
"""Up to which the Triton kernel multiplies here: beside it is no fast product."""


class LookedUpLinear(QuantizedLinear):
    """Dequantizes in every call, by looking values up: slow, right, and with no kernel of anybody's."""

    def __init__(self, matrix: FourBitMatrix, dtype: torch.dtype) -> None:
        """Multiply in `dtype`."""
        super().__init__(matrix)
        self._codes, self._dtype = matrix, dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T; see `Linear`."""
        return product(x.to(self._dtype), dequantize(self._codes, self._dtype)).to(x.dtype)

    def dequantize(self) -> torch.Tensor:
        """Return W in float32; see `Linear`."""
        return dequantize(self._codes)


def nf4_linear(matrix: FourBitMatrix, dtype: torch.dtype) -> Linear:
    """Return the product that is measured: the Triton kernel's, or `LookedUpLinear` where this version has none."""
    looked_up = LookedUpLinear(matrix, dtype)
    try:
        module = importlib.import_module("loraplex.server.models.triton_four_bit")
        made: Linear = module.TritonFourBitLinear(matrix, looked_up, module.RowRange(1, KERNEL_ROWS))
    except ImportError:
        return looked_up
    return made
