"""What follows from model and budgets together: how many KV blocks, and how long a context."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loraplex.server.config import EngineConfig
from loraplex.server.engine.kv_cache import KVCacheShape
from loraplex.server.engine.memory_plan import DeviceMemory, MemoryPlan, StepSize, check_plan, plan_memory
from loraplex.server.engine.step_shapes import step_shapes
from loraplex.server.errors import ModelLoadError
from loraplex.server.models.loader import LoadedModel

SITE_GROUPS = 2
"""Of steps with adapters: those for q, k and v alone, and those for any layer's products."""


@dataclass(frozen=True)
class EngineLimits:
    """The engine's size; `plan` is how a GPU's memory was divided, None on a CPU."""

    max_model_len: int
    num_blocks: int
    kv_cache_bytes: int
    plan: MemoryPlan | None = None


def engine_limits(model: LoadedModel, config: EngineConfig, memory: DeviceMemory | None = None) -> EngineLimits:
    """Divide the KV memory into blocks, and bound the context by them; `memory` is a GPU's with the weights in it.

    Raises:
        ModelLoadError: if the KV memory does not hold one sequence of the asked-for length, or the GPU not all budgets.
    """
    shape = kv_cache_shape(model, config)
    plan = None if memory is None else _plan(model, config, memory)
    if plan is None:
        nbytes = config.kv_cache_memory or config.CPU_KV_CACHE_MEMORY
    else:
        nbytes = config.kv_cache_memory or max(plan.kv_cache, 0)
        check_plan(plan, max(nbytes, shape.block_bytes))
    spare = 1 if plan is not None and plan.graphs else 0  # for rows that fill up a captured step
    num_blocks = nbytes // shape.block_bytes - spare
    capacity = num_blocks * config.block_size
    wanted = config.max_model_len or min(model.max_model_len, capacity)
    if wanted > model.max_model_len:
        raise ModelLoadError(
            f"--max-model-len {wanted} exceeds the model's own context of {model.max_model_len} tokens"
        )
    if num_blocks < 1 or wanted > capacity:
        raise ModelLoadError(
            f"--kv-cache-memory of {nbytes} bytes holds {capacity} tokens, fewer than one sequence of "
            f"{max(wanted, config.block_size)}; raise it or lower --max-model-len"
            + (f"\n{plan.render()}" if plan is not None else "")
        )
    return EngineLimits(wanted, num_blocks, num_blocks * shape.block_bytes, plan)


def kv_cache_shape(model: LoadedModel, config: EngineConfig) -> KVCacheShape:
    """Return the cache's shape for this model, in its compute dtype."""
    decoder = model.decoder.config
    return KVCacheShape(decoder.num_layers, decoder.num_kv_heads, decoder.head_dim, config.block_size, model.dtype)


def adapter_dtype(model: LoadedModel, config: EngineConfig) -> torch.dtype:
    """Return the dtype in which adapter weights are kept on the device."""
    return model.dtype if config.adapter_dtype == "auto" else getattr(torch, config.adapter_dtype)


def _plan(model: LoadedModel, config: EngineConfig, memory: DeviceMemory) -> MemoryPlan:
    return plan_memory(
        memory,
        config.gpu_memory_utilization,
        weights=model.weight_bytes,
        adapters=config.adapter_device_memory,
        config=model.decoder.config,
        size=StepSize(config.max_num_batched_tokens, config.max_num_seqs, model.dtype.itemsize),
        graphs=len(step_shapes(config.max_num_seqs, SITE_GROUPS)) if config.cuda_graphs else 0,
    )
