"""bitsandbytes' 4-bit quantization, to the bit, without the bisection that makes its CPU version slow.

bitsandbytes 0.50 finds each weight's code with `torch.bucketize`: 3 to 20 s a thread for the 106 M weights of a 135M
model, depending on the processor. Here a table of 1024 cells gives the code at once, up to one comparison.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from loraplex.adapters.bnb import import_bitsandbytes

KINDS = ("nf4", "fp4")
BLOCK_SIZE = 64
_NESTED_BLOCK_SIZE = 256
# The closest two bounds, FP4's around its smallest values, lie 0.0026 apart, more than a cell of 2 / 1024.
_CELLS = 1024
# Blocks that are worked on at a time: 1 MB of float32, which stays in a core's cache.
_CHUNK = 4096

# QLoRA (Dettmers et al. 2023), appendix E; here, so that machines without bitsandbytes know them too.
NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class Blocks:
    """A flattened weight in blocks of equal length, the last one padded.

    Attributes:
        kind: "nf4" or "fp4".
        shape: of the weight.
        codes: (blocks, block length) uint8, one code from 0 to 15 a byte.
        absmax: (blocks,) float32, each block's largest absolute value.
    """

    kind: str
    shape: tuple[int, ...]
    codes: torch.Tensor
    absmax: torch.Tensor

    def packed(self) -> torch.Tensor:
        """Return two codes a byte, the first in the high half: (ceil(n / 2), 1) uint8, without the padding."""
        pairs = self.codes.view(-1, 2)
        count = math.prod(self.shape)
        return (pairs[:, 0] << 4 | pairs[:, 1])[: -(-count // 2)].unsqueeze(1)

    def values(self, absmax: torch.Tensor) -> torch.Tensor:
        """Return what the codes stand for under the scales `absmax` (blocks,): float32 in the weight's shape."""
        restored = torch.empty(self.codes.shape)
        for first in range(0, len(absmax), _CHUNK):
            part = self.codes[first : first + _CHUNK]
            values = code_values(self.kind).index_select(0, part.reshape(-1).int()).view(part.shape)
            torch.mul(values, absmax[first : first + _CHUNK].unsqueeze(1), out=restored[first : first + _CHUNK])
        return restored.view(-1)[: math.prod(self.shape)].view(self.shape)


@dataclass(frozen=True)
class NestedScales:
    """Scales that are quantized themselves (`compress_statistics`): 8-bit codes in blocks of 256.

    Attributes:
        codes: (blocks,) uint8.
        state: bitsandbytes' state of the 8-bit quantization.
        offset: () float32, the mean, which was taken away before.
    """

    codes: torch.Tensor
    state: object
    offset: torch.Tensor

    def restored(self) -> torch.Tensor:
        """Return (blocks,) float32."""
        functional = import_bitsandbytes().functional
        restored: torch.Tensor = functional.dequantize_blockwise(self.codes, self.state) + self.offset
        return restored


def quantize(weight: torch.Tensor, kind: str) -> Blocks:
    """Return the codes and scales that `bitsandbytes.functional.quantize_4bit` gives `weight`, of any float dtype.

    Raises:
        ValueError: if `kind` is unknown or a weight is not finite.
    """
    flat = weight.detach().reshape(-1)
    count = flat.numel()
    whole = count - count % BLOCK_SIZE
    total = -(-count // BLOCK_SIZE)
    codes, absmax = torch.empty(total, BLOCK_SIZE, dtype=torch.uint8), torch.empty(total)
    for first in range(0, whole // BLOCK_SIZE, _CHUNK):
        last = min(first + _CHUNK, whole // BLOCK_SIZE)
        block = flat[first * BLOCK_SIZE : last * BLOCK_SIZE].float().view(-1, BLOCK_SIZE)
        largest = absmax[first:last] = block.abs().amax(1)
        codes[first:last] = _codes(block * (1.0 / largest.clamp(min=1e-38)).unsqueeze(1), kind)
    if whole < count:
        # bitsandbytes divides here, where it multiplies by the inverse above.
        tail = flat[whole:].float()
        absmax[-1] = tail.abs().max().clamp(min=1e-38)
        codes[-1] = _codes(torch.nn.functional.pad(tail / absmax[-1], (0, BLOCK_SIZE - tail.numel())), kind)
    if not bool(torch.isfinite(absmax).all()):
        raise ValueError("a weight that is NaN or infinite cannot be quantized")
    return Blocks(kind, tuple(weight.shape), codes, absmax)


def nest(absmax: torch.Tensor) -> NestedScales:
    """Quantize the scales `absmax` (blocks,) as bitsandbytes does for `compress_statistics`."""
    offset = absmax.mean()
    codes, state = import_bitsandbytes().functional.quantize_blockwise(absmax - offset, blocksize=_NESTED_BLOCK_SIZE)
    return NestedScales(codes, state, offset)


@functools.cache
def code_values(kind: str) -> torch.Tensor:
    """Return the (16,) float32 values of the codes, in [-1, 1].

    Raises:
        ValueError: if `kind` is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"the kind must be one of {', '.join(KINDS)}, not {kind!r}")
    if kind == "nf4":
        return torch.tensor(NF4_VALUES)
    values: torch.Tensor = import_bitsandbytes().functional.get_4bit_type(kind, device="cpu")
    return values


@dataclass(frozen=True)
class _Table:
    """For each cell of [-1, 1]: the code below and above the bound in it; infinity where there is no bound."""

    bound: torch.Tensor
    below: torch.Tensor
    above: torch.Tensor


@functools.cache
def _table(kind: str) -> _Table:
    values = code_values(kind)
    order = torch.argsort(values)
    bounds = (values[order[:-1]] + values[order[1:]]) / 2
    cells = _cell(bounds)
    # FP4 has the value 0 twice, so two bounds at half its smallest values, and none that share a cell.
    assert len(set(cells.tolist())) == len(cells)
    bound = torch.full((_CELLS + 1,), math.inf)
    bound[cells.long()] = bounds
    below = torch.searchsorted(cells.long(), torch.arange(_CELLS + 1))
    codes = order.to(torch.uint8)
    return _Table(bound, codes[below], codes[(below + 1).clamp(max=15)])


def _cell(x: torch.Tensor) -> torch.Tensor:
    """Return the cell of each value of [-1, 1]; it never falls as x grows, which is all that is needed of it."""
    return ((x + 1) * (_CELLS / 2)).to(torch.int32)


def _codes(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the uint8 codes of the values nearest to `x`, at a bound the lower one, as bucketize has it."""
    table = _table(kind)
    # NaN has no cell; whoever calls finds it in the scales.
    flat = x.reshape(-1).nan_to_num().clamp(-1, 1)
    cell = _cell(flat)
    codes = torch.where(
        flat > table.bound.index_select(0, cell),
        table.above.index_select(0, cell),
        table.below.index_select(0, cell),
    )
    return codes.view(x.shape)
