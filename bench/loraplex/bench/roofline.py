"""What the machine can do at most: memory bandwidth and product rates, and what they allow for a step of W16.

Measured with torch alone; a bound is the work of the step over the rate, whatever software does it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.table import Table

READ_BYTES = 512 * 2**20
SIDE = 1024
REPETITIONS = 9
# SmolLM2-135M: weights of the layers, of lm_head, and of a token's keys and values; W16's adapters.
LAYER_WEIGHTS, HEAD_WEIGHTS = 106_168_320, 28_311_552
CACHED_PER_TOKEN = 2 * 30 * 192
ADAPTER_WEIGHTS = {"ranks 8 to 64": 146_534_400, "rank 8": 39_075_840}
ROWS, CONTEXT = 16, 94
"""Of W16: a request has 30 tokens at first and 158 at last."""


def measure_roofline() -> dict[str, Any]:
    """Return GB/s of reading, and GFLOP/s of float32, bfloat16 and int8 products, with torch's threads."""
    numbers = torch.ones(READ_BYTES // 4)
    read_s = _best(lambda: numbers.sum())
    operations = 2 * SIDE**3 / 1e9
    products = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = torch.randn(SIDE, SIDE).to(dtype), torch.randn(SIDE, SIDE).to(dtype)
        products[name] = round(operations / _best(_multiplying(torch.mm, a, b)), 1)
    a8, b8 = (torch.randint(-127, 127, (SIDE, SIDE), dtype=torch.int8) for _ in range(2))
    products["int8"] = round(operations / _best(_multiplying(torch._int_mm, a8, b8)), 1)
    return {
        "threads": torch.get_num_threads(),
        "read_gb_s": round(READ_BYTES / read_s / 1e9, 1),
        "product_gflop_s": products,
    }


def step_bounds(measured: Mapping[str, Any]) -> dict[str, float]:
    """Return what each part of a decode step of 16 rows takes at least, in milliseconds.

    Weights are read once for all rows, every adapter and every row's keys and values once; the last two in bfloat16.
    """
    per_byte = 1e3 / (measured["read_gb_s"] * 1e9)
    weights = LAYER_WEIGHTS + HEAD_WEIGHTS
    flop = 2 * ROWS * weights / 1e9
    bounds = {
        "reading int8 weights": weights * per_byte,
        "reading NF4 weights, lm_head in bfloat16": (LAYER_WEIGHTS * (0.5 + 4 / 64) + 2 * HEAD_WEIGHTS) * per_byte,
        "reading keys and values": 2 * CACHED_PER_TOKEN * ROWS * CONTEXT * per_byte,
    }
    for ranks, count in ADAPTER_WEIGHTS.items():
        bounds[f"reading 16 adapters, {ranks}"] = 2 * count * per_byte
    for name, rate in measured["product_gflop_s"].items():
        bounds[f"products in {name}"] = 1e3 * flop / rate
    return {name: round(ms, 2) for name, ms in bounds.items()}


def roofline_table(document: Mapping[str, Any]) -> Table:
    """Show rates and bounds."""
    table = Table(title=f"What this machine can do with {document['threads']} threads")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("reading, GB/s", f"{document['read_gb_s']:.1f}")
    for name, rate in document["product_gflop_s"].items():
        table.add_row(f"products in {name}, GFLOP/s", f"{rate:.0f}")
    for name, ms in document["step_bounds_ms"].items():
        table.add_row(f"a step of W16, at least: {name}, ms", f"{ms:.2f}")
    return table


def _multiplying(multiply: Callable[..., torch.Tensor], a: torch.Tensor, b: torch.Tensor) -> Callable[[], object]:
    return lambda: multiply(a, b)


def _best(function: Callable[[], object]) -> float:
    """Return the lower quartile of several calls' seconds, after one that is not counted."""
    function()
    times = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.quantiles(times, n=4)[0]
