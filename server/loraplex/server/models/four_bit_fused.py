"""The product with 4-bit weights on CPUs with AVX512-BF16: bitsandbytes' fused kernel.

The kernel reads another layout than the one that bitsandbytes stores and dequantizes. `bitsandbytes.nn.Linear4bit`
turns one into the other in place at the first forward, after which its dequantized weights are silently wrong. Here the
layout is ours: the kernel's only, with an exact way back.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable

import torch

from loraplex.adapters.bnb import import_bitsandbytes
from loraplex.server.models.four_bit import BLOCKSIZE, FourBitMatrix
from loraplex.server.models.linear import Linear

_log = logging.getLogger(__name__)

ROWS = 32  # output features that the kernel takes at a time; their codes lie together
_HALF = ROWS // 2
# The kernel rounds scales, values and results to bfloat16, each by at most 2^-9: far below this, and far from nonsense.
_TOLERANCE = 0.02

# (x, codes, (out, in), absmax, values, blocksize) -> y
FusedProduct = Callable[[torch.Tensor, torch.Tensor, tuple[int, int], torch.Tensor, torch.Tensor, int], torch.Tensor]


def repack(codes: torch.Tensor) -> torch.Tensor:
    """Return `codes` (out, in // 2) in the fused kernel's layout, (out // 32, in // 2, 32).

    For 32 outputs and a pair of inputs 2k, 2k + 1, byte 2c holds the codes of input 2k for output c (low half) and for
    output 16 + c (high half); byte 2c + 1 the same of input 2k + 1.
    """
    rows = codes.view(-1, ROWS, codes.shape[1]).transpose(1, 2)
    low, high = rows[..., :_HALF], rows[..., _HALF:]
    packed = torch.empty(rows.shape, dtype=torch.uint8)
    packed[..., 0::2] = low >> 4 | high & 0xF0
    packed[..., 1::2] = low & 0xF | high << 4
    return packed


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Return the codes (out, in // 2) that `repack` was given."""
    even, odd = packed[..., 0::2], packed[..., 1::2]
    rows = torch.cat([even << 4 | odd & 0xF, even & 0xF0 | odd >> 4], dim=-1)
    # A single group of outputs would come back as a transposed view, which bitsandbytes reads as if it were not one.
    return rows.transpose(1, 2).reshape(-1, packed.shape[1]).contiguous()


def fits(matrix: FourBitMatrix) -> bool:
    """Whether the fused kernel can take a matrix of this shape."""
    return matrix.shape[0] % ROWS == 0 and matrix.rows_are_whole


class FusedFourBitLinear(Linear):
    """Multiplies activations, rounded to bfloat16, with 4-bit weights, accumulating in float32."""

    def __init__(self, matrix: FourBitMatrix, product: FusedProduct | None = None) -> None:
        """Take a matrix that `fits`; `product` replaces bitsandbytes' kernel."""
        super().__init__(matrix.shape[1], matrix.shape[0])
        functional = import_bitsandbytes().functional
        self._kind, self._blocksize, self._absmax = matrix.kind, matrix.blocksize, matrix.absmax
        self._shape = matrix.shape
        self._packed = repack(matrix.codes.view(matrix.shape[0], -1))
        self._scales = matrix.absmax.view(matrix.shape[0], -1).t().to(torch.bfloat16).contiguous()
        self._values = functional.get_4bit_type(matrix.kind, device="cpu")
        self._product: FusedProduct = product or torch.ops.bitsandbytes.gemv_4bit.default

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T; see `Linear`."""
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], self.out_features)
        return self._product(x.contiguous(), self._packed, self._shape, self._scales, self._values, self._blocksize)

    def dequantize(self) -> torch.Tensor:
        """Return W in float32; see `Linear`."""
        codes = unpack(self._packed).view(len(self._absmax), -1)
        return FourBitMatrix(self._kind, self._blocksize, self._shape, codes, self._absmax).dequantize()

    @property
    def nbytes(self) -> int:
        """Bytes of memory; see `Linear`."""
        return self._packed.nbytes + self._scales.nbytes + self._absmax.nbytes


@functools.cache
def fused_available(kind: str) -> bool:
    """Whether this machine has the fused kernel for "nf4" or "fp4", and it calculates right (tried once a process)."""
    functional = import_bitsandbytes().functional
    return bool(functional.has_avx512bf16()) and agrees_with_dequantized(kind)


def agrees_with_dequantized(kind: str, product: FusedProduct | None = None) -> bool:
    """Try the fused kernel (or `product`) on one small random matrix; log a warning where it errs."""
    generator = torch.Generator().manual_seed(0)
    matrix = FourBitMatrix.quantize(torch.randn(3 * ROWS, 3 * BLOCKSIZE, generator=generator), kind)
    linear = FusedFourBitLinear(matrix, product)
    weight = matrix.dequantize()
    for rows in (1, 7):
        x = torch.randn(rows, matrix.shape[1], generator=generator).to(torch.bfloat16)
        expected = x.float() @ weight.t()
        try:
            error = float((linear(x).float() - expected).norm() / expected.norm())
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as failure:
            _log.warning("bitsandbytes' fused %s kernel failed (%s): weights are dequantized instead", kind, failure)
            return False
        if not math.isfinite(error) or error > _TOLERANCE:
            _log.warning(
                "bitsandbytes' fused %s kernel is off by %.1f %% here: weights are dequantized instead",
                kind,
                100 * error,
            )
            return False
    return True
