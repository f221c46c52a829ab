"""bitsandbytes, imported without a look at a hub, and the weights that its quantization stands for."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
        if "bitsandbytes" not in sys.modules:
            with _kernels_hidden(), _nothing_compiled():
                import bitsandbytes  # noqa: F401
    return sys.modules["bitsandbytes"]


@contextmanager
def _kernels_hidden() -> Iterator[None]:
    hidden = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = hidden


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Keep bitsandbytes from asking for `torch.compile`, which imports torch._dynamo: 3.5 s for unused fallbacks.

    It catches the refusal and takes the plain function. Others' compilations at the same time are let through.
    """
    compile_, disable = torch.compile, torch._disable_dynamo  # type: ignore[attr-defined]

    def refuse_bitsandbytes(model: Any = None, **options: Any) -> Any:
        if str(getattr(model, "__module__", "")).startswith("bitsandbytes."):
            raise RuntimeError("not compiled, to save the import of torch._dynamo")
        return compile_(model, **options)

    def leave_as_it_is(function: Any = None, recursive: bool = True) -> Any:
        return disable(function, recursive) if function is None else function

    torch.compile, torch._disable_dynamo = refuse_bitsandbytes, leave_as_it_is  # type: ignore[assignment, attr-defined]
    try:
        yield
    finally:
        torch.compile, torch._disable_dynamo = compile_, disable  # type: ignore[attr-defined]


def round_trip(weight: torch.Tensor, quantization: str) -> torch.Tensor:
    """Return the values that `weight` (out, in) has once it is quantized, as (out, in) float32.

    nf4 and fp4: blocks of 64 values with their absolute maxima quantized once more (`compress_statistics`); int8: one
    absolute maximum per row, of the weight in float16, as `Linear8bitLt` and the server have it. The 4-bit quantizer
    gets float32, which holds bfloat16 and float16 exactly.

    Raises:
        ValueError: if `quantization` is none of `QUANTIZATIONS`.
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, not {quantization!r}")
    functional = import_bitsandbytes().functional
    source = weight.float().contiguous()
    if quantization == "int8":
        values, row_maxima, _ = functional.int8_vectorwise_quant(weight.half().contiguous())
        restored: torch.Tensor = functional.int8_vectorwise_dequant(values, row_maxima)
        return restored
    packed, state = functional.quantize_4bit(
        source, blocksize=BLOCK_SIZE, compress_statistics=True, quant_type=quantization
    )
    absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    # One block a row: on CPUs with AVX512, bitsandbytes takes wrong scales where rows are not made of whole blocks.
    shape = (len(absmax), BLOCK_SIZE)
    codes = torch.nn.functional.pad(packed.view(-1), (0, math.prod(shape) // 2 - packed.numel())).view(shape[0], -1)
    blocks: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        codes, absmax, BLOCK_SIZE, quantization, shape, torch.float32
    )
    return blocks.view(-1)[: weight.numel()].view(weight.shape)
