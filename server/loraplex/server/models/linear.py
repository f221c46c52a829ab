"""Matrix products with frozen weights: what every kind of `Linear` promises, and the unquantized kinds.

Knows nothing of bitsandbytes, layers or adapters.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from loraplex.server.models.compute_dtype import compute_dtype

# oneDNN blocks the weights for the number of rows it is told to expect. For one row it keeps them as they are, which is
# slow for any other number; for 2 to 512 it chooses one and the same layout, and runs any number of rows on that.
_EXPECTED_ROWS = 16
# oneDNN adds up a sum from its first to its last product. Where one product is a thousand times the others, as before
# the MLP's last projection of most models, each later one is rounded to the large one's precision: SmolLM2's logits,
# which reach 30, were off by 5e-4 with sums of 1536 (MKL, which adds up parts: 6e-5), and not with sums of 576.
_LONGEST_SUM = 1024
# MKL, behind `F.linear` in float32, sums in another order for 1 to 3 rows, and with some numbers of threads for all
# below 12 that are no multiple of four.
_ROWS_AT_ONCE, _ENOUGH_ROWS = 4, 12


class Linear(ABC):
    """A product with a frozen weight matrix, without bias.

    Semantics: y = x W^T. No row of y depends on another row of x.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        self.in_features = in_features
        self.out_features = out_features

    @abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return y (..., out_features) for x (..., in_features), a new tensor in x's dtype."""

    @abstractmethod
    def dequantize(self) -> torch.Tensor:
        """Return a new tensor W (out_features, in_features) float32: exactly what the stored weights stand for."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory that the weights take, copies for execution included, in bytes."""


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x W^T for x (..., in) and `weight` (out, in) of one dtype and device.

    A row's result in float32 on a CPU is the same to the bit whatever the number of rows, for all but odd sizes (tried:
    AVX2, outputs in multiples of 16, 1 to 16 threads): few rows are filled up with zeros.
    """
    rows = x.numel() // x.shape[-1]
    missing = -rows % _ROWS_AT_ONCE if rows < _ENOUGH_ROWS else 0
    if missing == 0 or x.dtype is not torch.float32 or not x.is_cpu:
        return F.linear(x, weight)
    filled = F.pad(x.reshape(rows, -1), (0, 0, 0, missing))
    return F.linear(filled, weight)[:rows].view(*x.shape[:-1], -1)


class DenseLinear(Linear):
    """Weights as they are, in a float dtype, on any device."""

    def __init__(self, weight: torch.Tensor) -> None:
        """Take `weight` (out, in), which is not copied."""
        super().__init__(weight.shape[1], weight.shape[0])
        self._weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T; see `Linear`."""
        return product(x.to(self._weight.dtype), self._weight).to(x.dtype)

    def dequantize(self) -> torch.Tensor:
        """Return W in float32; see `Linear`."""
        return self._weight.to(torch.float32, copy=True)

    @property
    def nbytes(self) -> int:
        """Bytes of memory; see `Linear`."""
        return self._weight.nbytes


class PrepackedLinear(Linear):
    """Float32 weights on a CPU, in oneDNN's blocked layout only; computes in float32.

    Faster than `F.linear` for 2 to 64 rows, and it sums every row's products in one order: a row's result is the same
    to the bit whatever the number of rows (tried: 1 to 513 with AVX2). For sums of up to `_LONGEST_SUM` products.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        """Copy `weight` (out, in) float32 into the blocked layout."""
        super().__init__(weight.shape[1], weight.shape[0])
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _EXPECTED_ROWS)
        self._product = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T; see `Linear`."""
        if x.dtype is not torch.float32:
            return self(x.float()).to(x.dtype)
        y: torch.Tensor = self._product(x, self._packed, None, "none", [], "")
        return y

    def dequantize(self) -> torch.Tensor:
        """Return W in float32; see `Linear`."""
        weight: torch.Tensor = self._packed.to_dense()
        return weight

    @property
    def nbytes(self) -> int:
        """Bytes of memory; see `Linear`."""
        return 4 * self.in_features * self.out_features


class StackedLinear(Linear):
    """Several products of one input, side by side in the output: for weights that cannot lie in one matrix."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        """Take `parts` in the order of their outputs; all have the same `in_features`."""
        super().__init__(parts[0].in_features, sum(part.out_features for part in parts))
        self._parts = tuple(parts)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T; see `Linear`."""
        return torch.cat([part(x) for part in self._parts], dim=-1)

    def dequantize(self) -> torch.Tensor:
        """Return W in float32; see `Linear`."""
        return torch.cat([part.dequantize() for part in self._parts])

    @property
    def nbytes(self) -> int:
        """Bytes of memory; see `Linear`."""
        return sum(part.nbytes for part in self._parts)


def dense_linear(weight: torch.Tensor) -> Linear:
    """Return the fastest product with `weight` (out, in) that is accurate; the weight's dtype is computed in."""
    short = weight.shape[1] <= _LONGEST_SUM
    if short and weight.device.type == "cpu" and weight.dtype == torch.float32 and _can_prepack():
        return PrepackedLinear(weight)
    return DenseLinear(weight)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype to multiply in where activations are `dtype`: float32 on a CPU that would emulate it."""
    if device.type == "cpu" and dtype != compute_dtype("auto", device):
        return torch.float32
    return dtype


@functools.cache
def _can_prepack() -> bool:
    """Whether this build of torch has oneDNN's prepacked product."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]
