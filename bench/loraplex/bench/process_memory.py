"""How much memory a server has in use, as Linux counts it, and how much it was given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraplex.bench.random_adapter import ModelShape

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Of a linear layer's weight. Four bits have a scale of float32 for each block of 64.
_WEIGHT_BYTES = {"nf4": 0.5 + 4 / 64, "fp4": 0.5 + 4 / 64, "int8": 1.0}


def resident_mb(pid: int) -> float:
    """Return the resident set of process `pid` in MB (10^6 bytes); 0 where the system does not say."""
    status = Path(f"/proc/{pid}/status")
    if not status.is_file():
        return 0.0
    for line in status.read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def budgets_mb(server: Mapping[str, Any], shape: ModelShape) -> dict[str, float]:
    """Return in MB (10^6 bytes) the weights as stored, and the budgets of KV cache and adapters.

    `server` is what `w16.server_summary` says; embedding and lm_head are one matrix in the compute dtype.
    """
    size = _DTYPE_BYTES[server["dtype"]]
    layers = shape.layers * sum(inputs * outputs for inputs, outputs in shape.projections().values())
    weights = layers * _WEIGHT_BYTES.get(server["quantization"], size) + server["vocab_size"] * shape.hidden * size
    cached = server["kv_blocks"] * server["kv_block_size"] * 2 * shape.layers * shape.key_value * size
    parts = {"weights": weights, "kv_cache": cached, "adapters": server["adapter_device_memory_bytes"]}
    return {name: round(count / 1e6, 1) for name, count in parts.items()}
