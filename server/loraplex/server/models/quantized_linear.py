"""Products with quantized weights that any kind of quantization and any device can use: dequantize, then multiply."""

from __future__ import annotations

from typing import Protocol

import torch

from loraplex.server.models.linear import Linear, dense_linear, product


class QuantizedMatrix(Protocol):
    """A weight matrix as it is stored."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        ...

    @property
    def nbytes(self) -> int:
        """Memory that it takes, in bytes."""
        ...

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the values that it stands for, (out, in), rounded to `dtype`; exact in float32."""
        ...


class QuantizedLinear(Linear):
    """A product whose weights stay in the form in which they are stored."""

    def __init__(self, matrix: QuantizedMatrix) -> None:
        """Take `matrix`, which nothing changes from now on."""
        super().__init__(matrix.shape[1], matrix.shape[0])
        self._matrix = matrix

    def dequantize(self) -> torch.Tensor:
        """Return W in float32; see `Linear`."""
        return self._matrix.dequantize()

    @property
    def nbytes(self) -> int:
        """Bytes of memory; see `Linear`."""
        return self._matrix.nbytes


class DequantizedLinear(QuantizedLinear):
    """Multiplies with a dequantized copy, made once."""

    def __init__(self, matrix: QuantizedMatrix, dtype: torch.dtype) -> None:
        """Make the copy in `dtype`."""
        super().__init__(matrix)
        self._copy = dense_linear(matrix.dequantize(dtype))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T; see `Linear`."""
        return self._copy(x)

    @property
    def nbytes(self) -> int:
        """Bytes of memory, the copy included; see `Linear`."""
        return self._matrix.nbytes + self._copy.nbytes


class OnTheFlyLinear(QuantizedLinear):
    """Dequantizes in every call: no memory beside the stored weights and one matrix at a time."""

    def __init__(self, matrix: QuantizedMatrix, dtype: torch.dtype) -> None:
        """Multiply in `dtype`."""
        super().__init__(matrix)
        self._dtype = dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T; see `Linear`."""
        return product(x.to(self._dtype), self._matrix.dequantize(self._dtype)).to(x.dtype)
