"""How quantized weights are multiplied on this machine: as they are stored, or from a dequantized copy."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from loraplex.server.errors import ModelLoadError
from loraplex.server.models.four_bit_fused import fused_available
from loraplex.server.models.int8 import dynamic_int8_available
from loraplex.server.models.linear import product_dtype
from loraplex.server.models.panel_linear import panels_available

QUANTIZATIONS = ("none", "nf4", "fp4", "int8")
WEIGHT_EXECUTIONS = ("auto", "packed", "dequantized")

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# The rest is for the KV cache, adapters, activations and whatever else runs on the machine.
_SHARE_FOR_COPIES = 0.5


def choose_weight_execution(
    requested: str,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device,
    num_weights: int,
    available: int | None = None,
) -> str:
    """Return "packed" or "dequantized" for `requested` "auto"; other values come back as they are.

    "auto" is "packed" where a kernel multiplies packed weights, else "dequantized" where copies of all `num_weights`
    weights fit in half of the memory that is free, else "packed". Call it once for a model, with all its weights: a
    layer at a time would find room for itself until none is left.

    Args:
        requested: one of `WEIGHT_EXECUTIONS`.
        quantization: one of `QUANTIZATIONS`.
        dtype: of activations.
        device: where the weights are.
        num_weights: how many weights will be quantized.
        available: free memory in bytes; None asks the machine.

    Raises:
        ModelLoadError: for an unknown value.
    """
    _check("weight_execution", requested, WEIGHT_EXECUTIONS)
    _check("quantization", quantization, QUANTIZATIONS)
    if requested != "auto":
        return requested
    if quantization == "none" or has_kernel(quantization, dtype, device):
        return "packed"
    free = available_memory() if available is None else available
    copies = num_weights * product_dtype(dtype, device).itemsize
    return "dequantized" if copies <= free * _SHARE_FOR_COPIES else "packed"


def has_kernel(quantization: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packed weights are multiplied without being dequantized in memory first.

    Kernels round activations or scales, so float32 activations, whose point is to be exact, never go through them on a
    CPU. On a GPU, bitsandbytes' 4-bit kernels are exact in float32 too.
    """
    if device.type != "cpu":
        return quantization != "int8" or dtype != torch.float32
    if dtype != torch.bfloat16:
        return False
    if quantization == "int8":
        return panels_available("int8") or dynamic_int8_available()
    return panels_available(quantization) or fused_available(quantization)


def available_memory(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """Return how many bytes of memory this process may still take: the machine's free ones, or its container's.

    Where the system does not say, half of the machine's memory.
    """
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        limit = int((cgroup / "memory.max").read_text(encoding="ascii"))
        used = int((cgroup / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        # No container, or one without a limit, whose memory.max says "max".
        return free
    return max(0, min(free, limit - used))


def _check(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ModelLoadError(f"unknown {option} {value!r}: {', '.join(known)}")
