"""Which number types a model is computed in."""

from __future__ import annotations

from pathlib import Path

import torch

from loraplex.adapters.cpu_info import CPU_INFO, cpu_has_bf16
from loraplex.server.errors import ModelLoadError

_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def compute_dtype(name: str, device: torch.device, cpu_info: Path = CPU_INFO) -> torch.dtype:
    """Return the dtype for "float32", "bfloat16", "float16", or for "auto" the best that `device` computes in.

    A CPU without bfloat16 instructions emulates them many times slower than float32.

    Raises:
        ModelLoadError: for another name, or float16 on a CPU.
    """
    if name == "auto":
        if device.type == "cpu":
            return torch.bfloat16 if cpu_has_bf16(cpu_info) else torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if name not in _NAMES:
        raise ModelLoadError(f"unknown dtype {name!r}: auto, {', '.join(_NAMES)}")
    if device.type == "cpu" and name == "float16":
        raise ModelLoadError("float16 needs a GPU; on a CPU use bfloat16 or float32")
    return _NAMES[name]


def activation_dtype(compute: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of what flows between the products, which multiply in `compute`.

    Rounding the residual stream to bfloat16 after every layer does more harm than rounding the products' inputs: a mean
    KL of 2e-3 nats from exact NF4 against 7e-4 (SmolLM2). On a CPU float32 here is 2 ms of a step of 16 rows.
    """
    return torch.float32 if device.type == "cpu" else compute
