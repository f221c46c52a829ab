"""bitsandbytes, imported without a look at a hub, and the weights that its quantization stands for."""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch

QUANTIZATIONS = ("nf4", "fp4", "int8")
BLOCK_SIZE = 64
_import_lock = threading.Lock()


def import_bitsandbytes() -> Any:
    """Return the module `bitsandbytes`.

    Where the package `kernels` is installed and the CPU has AVX512-BF16, importing bitsandbytes downloads a kernel from
    a hub. Hiding `kernels` for the time of the import prevents it; bitsandbytes then uses the kernels it comes with.
    """
    with _import_lock:
        hidden = sys.modules.get("kernels")
        sys.modules["kernels"] = None  # type: ignore[assignment]
        try:
            import bitsandbytes
        finally:
            if hidden is None:
                del sys.modules["kernels"]
            else:
                sys.modules["kernels"] = hidden
    return bitsandbytes


def round_trip(weight: torch.Tensor, quantization: str) -> torch.Tensor:
    """Return the values that `weight` (out, in) has once it is quantized, as (out, in) float32.

    nf4 and fp4: blocks of 64 values with their absolute maxima quantized once more (`compress_statistics`); int8: one
    absolute maximum per row. The quantizer gets the weight in float32, which holds bfloat16 and float16 exactly.

    Raises:
        ValueError: if `quantization` is none of `QUANTIZATIONS`.
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, not {quantization!r}")
    functional = import_bitsandbytes().functional
    source = weight.float().contiguous()
    if quantization == "int8":
        values, row_maxima, _ = functional.int8_vectorwise_quant(source)
        restored: torch.Tensor = functional.int8_vectorwise_dequant(values, row_maxima)
        return restored
    packed, state = functional.quantize_4bit(
        source, blocksize=BLOCK_SIZE, compress_statistics=True, quant_type=quantization
    )
    unpacked: torch.Tensor = functional.dequantize_4bit(packed, state)
    return unpacked
