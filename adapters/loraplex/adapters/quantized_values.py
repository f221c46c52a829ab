"""The weights that a quantization stands for: what a server computes with that was given unquantized weights."""

from __future__ import annotations

import torch

from loraplex.adapters import four_bit
from loraplex.adapters.bnb import import_bitsandbytes

QUANTIZATIONS = (*four_bit.KINDS, "int8")


def round_trip(weight: torch.Tensor, quantization: str) -> torch.Tensor:
    """Return the values that `weight` (out, in) has once it is quantized, as (out, in) float32.

    nf4 and fp4: blocks of 64 values with their absolute maxima quantized once more (`compress_statistics`); int8: one
    absolute maximum per row, of the weight in float16, as `Linear8bitLt` and the server have it.

    Raises:
        ValueError: if `quantization` is none of `QUANTIZATIONS`, or a weight is not finite.
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, not {quantization!r}")
    if quantization == "int8":
        functional = import_bitsandbytes().functional
        values, row_maxima, _ = functional.int8_vectorwise_quant(weight.half().contiguous())
        restored: torch.Tensor = functional.int8_vectorwise_dequant(values, row_maxima)
        return restored
    blocks = four_bit.quantize(weight, quantization)
    return blocks.values(four_bit.nest(blocks.absmax).restored())
