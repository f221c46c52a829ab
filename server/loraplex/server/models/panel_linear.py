"""`Linear` for weights in panels: int8 and 4-bit weights as bitsandbytes defines them, and rounded weights for lm_head.

The stored integers are the only copy of the weights; `dequantize` finds the exact way back.
"""

from __future__ import annotations

import functools
import logging
import math

import torch
import torch.nn.functional as F

from loraplex.adapters.bnb import import_bitsandbytes
from loraplex.server.models import panels
from loraplex.server.models.four_bit import FourBitMatrix
from loraplex.server.models.int8 import SMALLEST_SCALE, Int8Matrix
from loraplex.server.models.integer_product import IntegerProduct, integer_products_available
from loraplex.server.models.linear import Linear

_log = logging.getLogger(__name__)

BLOCK = 64  # inputs that share a scale in 4-bit and rounded weights
# Activations of 16 bits times 8-bit weights: up to 512 sums have room in 32 bits. Threads share the blocks out.
_INT8_BLOCK = 192
_INT8_LARGEST = 127
_LARGEST = 2**12 - 1  # of the integers that stand for 4-bit codes and rounded weights: leaves activations 13 bits
_CHUNK_WEIGHTS = 1 << 20  # rounded at a time
# Integers of 12 and 13 bits are off by 1e-4; beyond this something else is wrong.
_TOLERANCE = 1e-3


class PanelLinear(Linear):
    """A product with weights in panels; activations are rounded to 13 to 16 bits, see `IntegerProduct`."""

    def __init__(self, product: IntegerProduct, shape: tuple[int, int]) -> None:
        super().__init__(shape[1], shape[0])
        self._product = product
        self._shape = shape

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T; see `Linear`."""
        if x.dtype is torch.float32 and x.ndim == 2 and x.is_contiguous():
            return self._product(x)  # what a decoder asks; the rest would cost as much as calling the product does
        y = self._product(x.reshape(-1, self.in_features).to(torch.float32).contiguous())
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of memory; see `Linear`."""
        return self._product.codes.nbytes + self._product.scales.nbytes


class Int8PanelLinear(PanelLinear):
    """Multiplies with 8-bit weights."""

    def __init__(self, matrix: Int8Matrix) -> None:
        """Take `matrix`, whose weights are copied."""
        codes, scales = panels.pack(matrix.codes), panels.pack_scales(matrix.scale.unsqueeze(1))
        product = IntegerProduct(codes, scales, matrix.shape, _INT8_BLOCK, 1 / _INT8_LARGEST, _INT8_LARGEST)
        super().__init__(product, matrix.shape)

    def dequantize(self) -> torch.Tensor:
        """Return W in float32; see `Linear`."""
        scale = panels.unpack_scales(self._product.scales, self.out_features).squeeze(1)
        return Int8Matrix(panels.unpack(self._product.codes, self._shape), scale).dequantize()


class FourBitPanelLinear(PanelLinear):
    """Multiplies with 4-bit weights, each code's value rounded to 1/4095 of its block's largest."""

    def __init__(self, matrix: FourBitMatrix) -> None:
        """Take a matrix that `fits_panels`, whose weights are copied."""
        values = import_bitsandbytes().functional.get_4bit_type(matrix.kind, device="cpu")
        out_features = matrix.shape[0]
        self._kind, self._repeats = matrix.kind, matrix.blocksize // BLOCK
        scales = matrix.absmax.view(out_features, -1).repeat_interleave(self._repeats, dim=1)
        product = IntegerProduct(
            panels.pack_four_bit(matrix.codes.view(out_features, -1)),
            panels.pack_scales(scales),
            matrix.shape,
            BLOCK,
            1 / _LARGEST,
            _LARGEST,
            (values * _LARGEST).round(),
        )
        super().__init__(product, matrix.shape)

    def dequantize(self) -> torch.Tensor:
        """Return W in float32; see `Linear`."""
        repeated = panels.unpack_scales(self._product.scales, self.out_features)
        # A view with gaps would be read as if it had none.
        scales = repeated[:, :: self._repeats].reshape(-1).contiguous()
        codes = panels.unpack_four_bit(self._product.codes, self.out_features).view(len(scales), -1)
        return FourBitMatrix(self._kind, self._repeats * BLOCK, self._shape, codes, scales).dequantize()


class RoundedPanelLinear(PanelLinear):
    """Multiplies with weights rounded to 1/4095 of the largest of each 64 of a row, 16 times finer than bfloat16's."""

    def __init__(self, weight: torch.Tensor) -> None:
        """Round `weight` (out, in), of any float dtype."""
        out_features, in_features = weight.shape
        blocks = -(-in_features // BLOCK)
        codes = torch.empty(out_features, blocks * BLOCK, dtype=torch.int16)
        scales = torch.empty(out_features, blocks)
        step = max(1, _CHUNK_WEIGHTS // in_features)
        for first in range(0, out_features, step):
            rows = F.pad(weight[first : first + step].float(), (0, -in_features % BLOCK)).view(-1, blocks, BLOCK)
            largest = rows.abs().amax(dim=2)
            factor = _LARGEST / largest.clamp(min=SMALLEST_SCALE)
            codes[first : first + step] = rows.mul_(factor.unsqueeze(2)).round_().view(-1, blocks * BLOCK)
            scales[first : first + step] = largest
        packed = panels.pack(codes[:, :in_features])
        shape = (out_features, in_features)
        product = IntegerProduct(packed, panels.pack_scales(scales), shape, BLOCK, 1 / _LARGEST, _LARGEST)
        super().__init__(product, shape)

    def dequantize(self) -> torch.Tensor:
        """Return the rounded W in float32; see `Linear`."""
        scales = panels.unpack_scales(self._product.scales, self.out_features)
        values = panels.unpack(self._product.codes, self._shape).float()
        return values.mul_(scales.repeat_interleave(BLOCK, dim=1)[:, : self.in_features]).div_(_LARGEST)


def fits_panels(matrix: FourBitMatrix) -> bool:
    """Whether each 64 inputs have one scale."""
    return matrix.rows_are_whole and matrix.blocksize % BLOCK == 0


@functools.cache
def panels_available(kind: str) -> bool:
    """Whether this CPU multiplies "nf4", "fp4", "int8" or "int16" weights in panels, and rightly (tried once)."""
    return integer_products_available() and agrees_with_dequantized(kind)


def agrees_with_dequantized(kind: str) -> bool:
    """Try the product on one small random matrix; log a warning where it errs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3 * panels.OUTPUTS + 1, 3 * BLOCK, generator=generator)
    linear = _panel_linear(weight, kind)
    expected_weight = linear.dequantize()
    for rows in (1, 7, 20):
        x = torch.randn(rows, weight.shape[1], generator=generator)
        expected = x @ expected_weight.t()
        error = float((linear(x) - expected).norm() / expected.norm())
        if not math.isfinite(error) or error > _TOLERANCE:
            _log.warning("the integer product with %s weights is off by %.1f %% here: not used", kind, 100 * error)
            return False
    return True


def _panel_linear(weight: torch.Tensor, kind: str) -> PanelLinear:
    if kind == "int16":
        return RoundedPanelLinear(weight)
    if kind == "int8":
        return Int8PanelLinear(Int8Matrix.quantize(weight))
    return FourBitPanelLinear(FourBitMatrix.quantize(weight, kind))
