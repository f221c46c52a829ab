"""4-bit weights as bitsandbytes stores them: codes in blocks, each block with its largest absolute value.

The scales of a usual QLoRA checkpoint are themselves quantized ("nested", `compress_statistics`). They are restored to
float32 here, exactly as bitsandbytes restores them in every call: 1/16 byte a weight more, and matrices can be joined.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from loraplex.adapters.bnb import import_bitsandbytes
from loraplex.adapters.stored_quantized import STATE_PREFIX, read_state
from loraplex.server.errors import ModelLoadError

BLOCKSIZE = 64
_NESTED_BLOCKSIZE = 256


@dataclass(frozen=True)
class FourBitMatrix:
    """A weight matrix (out, in), flattened row by row and cut into blocks.

    Attributes:
        kind: "nf4" or "fp4".
        blocksize: weights that share a scale.
        shape: (out, in).
        codes: (blocks, blocksize // 2) uint8, the first weight of each pair in the high half; the last block is padded.
        absmax: (blocks,) float32.
    """

    kind: str
    blocksize: int
    shape: tuple[int, int]
    codes: torch.Tensor
    absmax: torch.Tensor

    @classmethod
    def quantize(cls, weight: torch.Tensor, kind: str) -> FourBitMatrix:
        """Quantize `weight` (out, in) where it lies, to what `bitsandbytes.nn.Linear4bit` makes of it."""
        codes, absmax = _quantize_blocks(weight.reshape(-1), kind)
        return cls(kind, BLOCKSIZE, (weight.shape[0], weight.shape[1]), codes, _restored(absmax))

    @classmethod
    def from_checkpoint(cls, tensors: Mapping[str, torch.Tensor], device: torch.device) -> FourBitMatrix:
        """Take the tensors of one quantized module: "weight", "weight.absmax", "weight.quant_map" and so on.

        Raises:
            ModelLoadError: if they are not what bitsandbytes writes.
        """
        try:
            state = read_state(tensors, device)
        except ValueError as error:
            raise ModelLoadError(f"damaged 4-bit weight: {error}") from error
        out_features, in_features = state.shape
        codes = tensors["weight"].to(device).reshape(-1).view(torch.uint8)
        padding = len(state.absmax) * state.block_size // 2 - len(codes)
        codes = torch.nn.functional.pad(codes, (0, padding)).view(len(state.absmax), -1)
        return cls(state.kind, state.block_size, (out_features, in_features), codes, state.absmax)

    @property
    def nbytes(self) -> int:
        """Memory that it takes, in bytes."""
        return self.codes.nbytes + self.absmax.nbytes

    @property
    def rows_are_whole(self) -> bool:
        """Whether every block lies within one row."""
        return self.shape[1] % self.blocksize == 0

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the values that it stands for, (out, in), rounded to `dtype`; exact in float32.

        bitsandbytes is given one block a row, because on CPUs with AVX512 it takes wrong scales where the rows it is
        told of are not made of whole blocks.
        """
        import_bitsandbytes()
        values: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            self.codes, self.absmax, self.blocksize, self.kind, (len(self.absmax), self.blocksize), dtype
        )
        return values.view(-1)[: math.prod(self.shape)].view(self.shape)


def is_four_bit(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a module's tensors in a checkpoint are 4-bit weights of bitsandbytes."""
    return any(name.startswith(STATE_PREFIX) for name in tensors)


def join(matrices: Sequence[FourBitMatrix]) -> list[FourBitMatrix]:
    """Return one matrix with the rows of all; as many as there were, where blocks would run across their ends."""
    first = matrices[0]
    alike = {(matrix.kind, matrix.blocksize, matrix.shape[1]) for matrix in matrices}
    if len(alike) > 1 or any(math.prod(matrix.shape) % matrix.blocksize for matrix in matrices):
        return list(matrices)
    shape = (sum(matrix.shape[0] for matrix in matrices), first.shape[1])
    codes, absmax = (torch.cat(parts) for parts in zip(*((m.codes, m.absmax) for m in matrices), strict=True))
    return [FourBitMatrix(first.kind, first.blocksize, shape, codes, absmax)]


def _quantize_blocks(weights: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the padded codes and the scales of consecutive weights (n,)."""
    functional = import_bitsandbytes().functional
    rest = weights.numel() % BLOCKSIZE
    whole, tail = weights[: weights.numel() - rest].view(-1, BLOCKSIZE), weights[weights.numel() - rest :]
    if weights.device.type == "cpu":
        # Imported here: a GPU needs no Numba.
        from loraplex.server.models.quantize_kernel import quantize_blocks

        parts = [quantize_blocks(whole, functional.get_4bit_type(kind, device="cpu"))]
    else:
        parts = [_bitsandbytes_blocks(whole, kind)]
    if rest:
        parts.append(_bitsandbytes_blocks(tail, kind))
    codes, absmax = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(absmax)


def _bitsandbytes_blocks(weights: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    codes, absmax = torch.ops.bitsandbytes.quantize_4bit.default(weights, BLOCKSIZE, kind, torch.uint8)
    padding = len(absmax) * BLOCKSIZE // 2 - codes.numel()
    return torch.nn.functional.pad(codes.view(-1), (0, padding)).view(len(absmax), -1), absmax


def _restored(absmax: torch.Tensor) -> torch.Tensor:
    """Return scales as they are after being quantized themselves and restored."""
    functional = import_bitsandbytes().functional
    offset = absmax.mean()
    codes, state = functional.quantize_blockwise(absmax - offset, blocksize=_NESTED_BLOCKSIZE)
    restored: torch.Tensor = functional.dequantize_blockwise(codes, state) + offset
    return restored
