"""How long a training run may take: its floating-point operations over what a device manages.

A forward pass is 2 operations a weight and token, the gradients of the inputs 2 more, those of trained weights 2 more
(Kaplan et al., 2020), and checkpointing repeats the forward pass. What a GPU manages is a share of its data sheet; what
this CPU manages is measured on the spot. An estimate: within a factor of two, not within ten per cent.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from loraplex.adapters.training.architecture import ModelArchitecture
from loraplex.adapters.training.training_memory import Method

CPU = "cpu"
# Dense matrix products in 16 bits, in 10^12 operations a second, from the vendor's data sheets.
PEAK_TFLOPS: Mapping[str, float] = {
    "h100": 989.0,
    "a100": 312.0,
    "rtx4090": 165.0,
    "v100": 125.0,
    "l4": 121.0,
    "rtx3090": 71.0,
    "t4": 65.0,
}
DEVICES = (CPU, *PEAK_TFLOPS)
ACHIEVED = 0.35
"""Of the peak of large products; small models and short rows stay below."""
_DEQUANTIZING = 1.25  # forward and backward pass write every weight out once more
_MEASURED_S = 0.3


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of a run with so many `tokens`, at `tflops` managed on `device`."""

    seconds: float
    tokens: int
    flops: float
    device: str
    tflops: float


def estimate_time(
    model: ModelArchitecture,
    method: Method,
    trained: int,
    tokens: int,
    learned: int,
    device: str,
    *,
    checkpointing: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> TimeEstimate:
    """Estimate a run that trains `trained` parameters on `tokens` tokens, all epochs together.

    The output layer is computed for the `learned` ones of them only.
    """
    body = sum(module.weights for module in model.body)
    head = sum(module.weights for module in model.modules) - body
    passes = 3 if checkpointing else 2
    adapter = 0 if method == "full" else trained
    base_passes = passes + 1 if method == "full" else passes
    flops = 2.0 * (tokens * (base_passes * body + (passes + 1) * adapter) + learned * base_passes * head)
    if method == "qlora":
        flops *= _DEQUANTIZING
    tflops = cpu_tflops(dtype) if device == CPU else PEAK_TFLOPS[device]
    return TimeEstimate(flops / (ACHIEVED * tflops * 1e12), tokens, flops, device, round(tflops, 3))


def cpu_tflops(dtype: torch.dtype, size: int = 1024) -> float:
    """Multiply square matrices for a moment and return the best rate, in 10^12 operations a second."""
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    torch.mm(a, b)
    best, ends = float("inf"), time.perf_counter() + _MEASURED_S
    while time.perf_counter() < ends:
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best / 1e12
