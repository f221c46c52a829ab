"""The product with 4-bit weights on a GPU, for the numbers of rows at which a kernel of ours is the faster one.

bitsandbytes multiplies single rows well, and for hundreds of rows decoding all weights into memory first costs little
beside the product. Between them lie the decode steps of a busy server. The kernel reads another layout than
bitsandbytes does, so that there are two copies of the codes: 0.56 bytes a weight more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from loraplex.adapters.four_bit import code_values
from loraplex.server.models import triton_four_bit_kernel as kernel
from loraplex.server.models.four_bit import BLOCKSIZE, FourBitMatrix
from loraplex.server.models.linear import Linear

OUTPUTS = 64  # of a tile of weights
HALF = BLOCKSIZE  # inputs of half a tile, which share a scale
# Programs that read weights at a time: two for each of an H100's 132 multiprocessors.
_PROGRAMS = 264
_MAX_SPLITS = 8
_TOKENS = (16, 32, 64)  # of a tile of x; matrix products take 16 at least
_WARPS, _STAGES = 4, 3
_ADDED = 1024  # numbers that one program adds up


@dataclass(frozen=True)
class RowRange:
    """The numbers of rows, from `first` to `last`, that the kernel is used for; none if `last` is smaller."""

    first: int
    last: int

    def __contains__(self, rows: int) -> bool:
        return self.first <= rows <= self.last


# Where bitsandbytes 0.50 does neither of what it does well, by its own description; measure with `choose_rows`.
DEFAULT_ROWS = RowRange(5, 64)


@dataclass(frozen=True)
class PackedFourBit:
    """A matrix (out, in) in the kernel's layout, filled up with zeros to whole tiles.

    Attributes:
        codes: (out blocks, in blocks, OUTPUTS, HALF) uint8; see the kernel.
        scales: (2 * in blocks, 64 * out blocks) float32, of every HALF inputs.
        shape: (out, in).
    """

    codes: torch.Tensor
    scales: torch.Tensor
    shape: tuple[int, int]

    @classmethod
    def pack(cls, matrix: FourBitMatrix) -> PackedFourBit:
        """Copy a matrix that `fits`."""
        out_features, in_features = matrix.shape
        codes = _padded(matrix.codes.view(out_features, in_features // 2), OUTPUTS, HALF)
        # One number a byte, in the order of the inputs: (out blocks, OUTPUTS, in blocks, 2, HALF).
        numbers = torch.stack((codes >> 4, codes & 0xF), dim=-1).view(-1, OUTPUTS, codes.shape[1] // HALF, 2, HALF)
        packed = numbers[..., 0, :] | numbers[..., 1, :] << 4
        scales = matrix.absmax.view(out_features, -1).repeat_interleave(matrix.blocksize // HALF, dim=1)
        return cls(
            packed.transpose(1, 2).contiguous(),
            _padded(scales, OUTPUTS, 2).t().contiguous(),
            (out_features, in_features),
        )

    @property
    def splits(self) -> tuple[int, int]:
        """How many programs share the inputs of an output, and how many tiles each takes; no matter how many rows."""
        blocks, chunks = self.codes.shape[:2]
        wanted = max(1, min(_PROGRAMS // blocks, _MAX_SPLITS, chunks))
        each = -(-chunks // wanted)
        return -(-chunks // each), each

    @property
    def nbytes(self) -> int:
        """Memory that it takes, in bytes."""
        return self.codes.nbytes + self.scales.nbytes


def fits(matrix: FourBitMatrix) -> bool:
    """Whether each 64 inputs of an output have one scale."""
    return matrix.rows_are_whole and matrix.blocksize % HALF == 0


class TritonFourBitLinear(Linear):
    """Multiplies bfloat16 activations, for some numbers of rows, with weights that are decoded in registers.

    A weight is rounded to bfloat16 as bitsandbytes rounds it; sums are in float32. Everything else, other activations
    too, is left to another product with the same weights.
    """

    def __init__(self, matrix: FourBitMatrix, other: Linear, rows: RowRange = DEFAULT_ROWS) -> None:
        """Take a matrix that `fits`, copied into the kernel's layout, and the product for the other numbers of rows."""
        super().__init__(matrix.shape[1], matrix.shape[0])
        self._packed = PackedFourBit.pack(matrix)
        self._values = code_values(matrix.kind).to(matrix.codes.device)
        self._other = other
        self.rows = rows
        """Which numbers of rows go through the kernel; may be changed between calls."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T; see `Linear`."""
        rows = x.numel() // self.in_features
        if rows not in self.rows or x.dtype is not torch.bfloat16:
            return self._other(x)
        return self.fused(x.reshape(rows, self.in_features)).view(*x.shape[:-1], self.out_features)

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T from the kernel, whatever the number of rows.

        Shape:
            x: (T, in_features) bfloat16, unit stride along the features. Result: (T, out_features) bfloat16.
        """
        packed, tokens = self._packed, x.shape[0]
        blocks, chunks = packed.codes.shape[:2]
        splits, each = packed.splits
        y = torch.empty(tokens, self.out_features, dtype=x.dtype, device=x.device)
        parts = y
        if splits > 1:
            parts = torch.empty(splits, *y.shape, dtype=torch.float32, device=x.device)
        block_t = next((size for size in _TOKENS if size >= tokens), _TOKENS[-1])
        kernel.four_bit_kernel[(blocks, -(-tokens // block_t), splits)](
            *(x, x.stride(0), packed.codes, packed.scales, self._values, parts, self.out_features, y.numel()),
            *(tokens, self.in_features, self.out_features, packed.scales.shape[1], chunks, each),
            OUTPUTS=OUTPUTS,
            HALF=HALF,
            BLOCK_T=block_t,
            num_warps=_WARPS,
            num_stages=_STAGES,
        )
        if splits > 1:
            kernel.add_parts_kernel[(-(-y.numel() // _ADDED),)](parts, y, y.numel(), splits, BLOCK=_ADDED)
        return y

    def dequantize(self) -> torch.Tensor:
        """Return W in float32; see `Linear`."""
        return self._other.dequantize()

    @property
    def nbytes(self) -> int:
        """Bytes of memory, both layouts; see `Linear`."""
        return self._packed.nbytes + self._values.nbytes + self._other.nbytes


def choose_rows(counts: Sequence[int], ours: Callable[[int], float], other: Callable[[int], float]) -> RowRange:
    """Return the longest run of row counts for which ours takes less time.

    Args:
        counts: numbers of rows to try, ascending.
        ours: seconds that `TritonFourBitLinear.fused` takes for so many rows.
        other: seconds that the product beside it takes.
    """
    best: list[int] = []
    run: list[int] = []
    for count in counts:
        run = [*run, count] if ours(count) < other(count) else []
        best = max(best, run, key=len)
    return RowRange(best[0], best[-1]) if best else RowRange(1, 0)


def _padded(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return a matrix with zeros up to multiples of `rows` and `columns`."""
    return F.pad(matrix, (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows))
