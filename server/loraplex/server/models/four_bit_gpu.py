"""The product with 4-bit weights on a GPU: bitsandbytes' own kernels."""

from __future__ import annotations

import torch

from loraplex.adapters.bnb import import_bitsandbytes
from loraplex.server.models.four_bit import FourBitMatrix
from loraplex.server.models.quantized_linear import QuantizedLinear


class GpuFourBitLinear(QuantizedLinear):
    """Calls `bitsandbytes.matmul_4bit`, which dequantizes in registers for few rows, and into memory for many."""

    def __init__(self, matrix: FourBitMatrix) -> None:
        """Take a matrix on a GPU whose `rows_are_whole`."""
        super().__init__(matrix)
        bitsandbytes = import_bitsandbytes()
        self._product = bitsandbytes.matmul_4bit
        self._codes = matrix.codes.view(-1, 1)
        self._state = bitsandbytes.functional.QuantState(
            absmax=matrix.absmax,
            shape=torch.Size(matrix.shape),
            code=bitsandbytes.functional.get_4bit_type(matrix.kind, device=matrix.codes.device),
            blocksize=matrix.blocksize,
            quant_type=matrix.kind,
            dtype=torch.float32,
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T; see `Linear`."""
        y: torch.Tensor = self._product(x, self._codes, self._state)
        return y
