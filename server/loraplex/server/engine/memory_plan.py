"""Divides a GPU's memory before anything large is allocated: weights, adapters, a step's numbers, graphs, KV blocks.

Pure numbers; whoever calls asks the device. A plan that does not work out is an error that shows the plan.
"""

from __future__ import annotations

from dataclasses import dataclass

from loraplex.server.errors import ModelLoadError
from loraplex.server.models.config import DecoderConfig

GRAPH_BYTES = 8 * 2**20
"""Reserved for a captured step beside the numbers that all share: the driver's record of a few hundred launches."""
MARGIN = 1.1
"""On a step's numbers: what the allocator loses between blocks, and the workspaces of matrix libraries."""


@dataclass(frozen=True)
class DeviceMemory:
    """What the driver says, in bytes; `free` after the weights were loaded."""

    total: int
    free: int


@dataclass(frozen=True)
class StepSize:
    """The largest step: tokens in it, rows that sample, and bytes of an activation."""

    tokens: int
    rows: int
    itemsize: int


@dataclass(frozen=True)
class MemoryPlan:
    """Who gets how many bytes of a device. `others` is what the driver, this process's context and others hold."""

    total: int
    utilization: float
    others: int
    weights: int
    adapters: int
    step: int
    graphs: int

    @property
    def budget(self) -> int:
        """Bytes that may be used, `others` included."""
        return int(self.total * self.utilization)

    @property
    def kv_cache(self) -> int:
        """Bytes that are left for keys and values; negative if the rest is too large already."""
        return self.budget - self.others - self.weights - self.adapters - self.step - self.graphs

    def render(self) -> str:
        """Return the plan as lines of text, MiB each."""
        parts = {
            "the device's memory": self.total,
            f"of it --gpu-memory-utilization {self.utilization:g}": self.budget,
            "held by others and the driver": self.others,
            "weights": self.weights,
            "--adapter-device-memory": self.adapters,
            "one step's numbers": self.step,
            "captured steps": self.graphs,
            "left for keys and values": self.kv_cache,
        }
        return "\n".join(f"  {name:<36}{nbytes / 2**20:>12,.0f} MiB" for name, nbytes in parts.items())


def plan_memory(
    memory: DeviceMemory,
    utilization: float,
    *,
    weights: int,
    adapters: int,
    config: DecoderConfig,
    size: StepSize,
    graphs: int,
) -> MemoryPlan:
    """Plan for loaded `weights`, a budget for `adapters`, steps up to `size` and that many captured `graphs`."""
    captured = graphs * GRAPH_BYTES + step_bytes(config, StepSize(size.rows, size.rows, size.itemsize)) * bool(graphs)
    return MemoryPlan(
        total=memory.total,
        utilization=utilization,
        others=max(0, memory.total - memory.free - weights),
        weights=weights,
        adapters=adapters,
        step=step_bytes(config, size),
        graphs=captured,
    )


def check_plan(plan: MemoryPlan, kv_cache: int) -> None:
    """Refuse a plan without room for `kv_cache` bytes of keys and values.

    Raises:
        ModelLoadError: with the plan.
    """
    if kv_cache > plan.kv_cache:
        raise ModelLoadError(
            f"the GPU has no room for {kv_cache / 2**20:,.0f} MiB of keys and values. Raise --gpu-memory-utilization, "
            f"or lower --max-model-len, --adapter-device-memory or --max-num-batched-tokens:\n{plan.render()}"
        )


def step_bytes(config: DecoderConfig, size: StepSize) -> int:
    """Return the memory of the numbers that live at the same time in the widest part of a step.

    The residual stream, a norm's result and a product's output; qkv with what attention makes of it, or gate and up
    with the activation; the widest matrix dequantized (many rows are multiplied so); logits twice, in float32.
    """
    heads = config.num_heads * config.head_dim
    qkv = heads + 2 * config.num_kv_heads * config.head_dim
    gate_up = config.intermediate_size * (2 if config.gated_mlp else 1)
    widest = max(2 * qkv + heads, gate_up + config.intermediate_size)
    numbers = size.tokens * (3 * config.hidden_size + widest)
    numbers += config.hidden_size * max(gate_up, qkv)
    return int(MARGIN * (numbers * size.itemsize + 2 * 4 * size.rows * config.vocab_size))
