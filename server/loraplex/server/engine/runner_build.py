"""Makes what runs the steps: cache, operators and, on a GPU, captured steps; and runs one, so that all is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from loraplex.adapters.binding import BoundAdapter, ModuleWeights
from loraplex.server.config import EngineConfig
from loraplex.server.engine.accelerator import Accelerator
from loraplex.server.engine.graphed_forward import CaptureBudget, GraphedForward
from loraplex.server.engine.kv_cache import KVCache
from loraplex.server.engine.limits import EngineLimits, adapter_dtype, kv_cache_shape
from loraplex.server.engine.model_runner import ModelRunner
from loraplex.server.engine.request import GenerationRequest, SamplingParams
from loraplex.server.engine.scheduler import ScheduledSequence
from loraplex.server.engine.sequence import Sequence as EngineSequence
from loraplex.server.engine.step_buffers import StepLimits
from loraplex.server.errors import ModelLoadError
from loraplex.server.lora.ops.interface import StaticLoraOps, make_lora_ops
from loraplex.server.lora.packing import pack_adapter
from loraplex.server.lora.weights import LinearSite
from loraplex.server.models.loader import LoadedModel

# Of prompts that together give every kernel something to do, also those that leave short ones to others: on a GPU, the
# LoRA kernels for long ones.
WARM_UP_TOKENS = (16,)
GPU_WARM_UP_TOKENS = (16, 80)

_HOST = torch.device("cpu")


def build_runner(
    model: LoadedModel, config: EngineConfig, limits: EngineLimits, gpu: Accelerator | None
) -> ModelRunner:
    """Allocate the KV cache, capture what is captured, compile the rest, and return the runner.

    Raises:
        ModelLoadError: if a GPU has no memory for it, with the plan.
    """
    try:
        with nullcontext() if gpu is None else gpu.current():
            runner = _make_runner(model, config, limits, gpu)
            for tokens in WARM_UP_TOKENS if gpu is None else GPU_WARM_UP_TOKENS:
                _warm_up(runner, model, adapter_dtype(model, config), tokens)
            return runner
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        plan = "" if limits.plan is None else f", which was planned so:\n{limits.plan.render()}"
        raise ModelLoadError(
            "the device ran out of memory at start. Lower --gpu-memory-utilization or --kv-cache-memory, or end what "
            f"else uses it{plan}\n{error}"
        ) from error


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether the device had no memory: torch's allocator says so by its type, the driver and cuBLAS in words only."""
    told = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in told)


def _make_runner(
    model: LoadedModel, config: EngineConfig, limits: EngineLimits, gpu: Accelerator | None
) -> ModelRunner:
    device, shape = torch.device(model.device), kv_cache_shape(model, config)
    ops, plan = make_lora_ops(device, adapter_dtype(model, config)), limits.plan
    if gpu is None:
        from loraplex.server.models.captured import CapturedDecoder

        return ModelRunner(CapturedDecoder(model.decoder), KVCache(shape, limits.num_blocks, device), ops, device)
    if plan is None or not plan.graphs or not isinstance(ops, StaticLoraOps):
        cache = KVCache(shape, limits.num_blocks, device)
        return ModelRunner(model.decoder, cache, ops, device, gpu.current)
    cache = KVCache(shape, limits.num_blocks + 1, device)
    steps = StepLimits(config.max_num_seqs, limits.max_model_len, config.block_size, scratch_block=limits.num_blocks)
    forward = model.decoder.forward
    groups = site_groups(model.decoder.sites)
    graphed = GraphedForward(forward, cache, ops, gpu.capture_backend(), steps, model.vocab_size, device, groups)
    graphed.capture(CaptureBudget(max_bytes=plan.graphs))
    return ModelRunner(graphed, cache, graphed.lora_ops, _HOST, gpu.current)


def site_groups(sites: Sequence[LinearSite]) -> tuple[frozenset[int], ...]:
    """Return the sites of the usual adapters: of those for q, k and v alone, and of those for any layer's products.

    Steps with adapters for lm_head are rare and not captured.
    """
    attention = frozenset(index for index, site in enumerate(sites) if site.name.endswith(".qkv"))
    return attention, frozenset(range(len(sites) - 1))


def _warm_up(runner: ModelRunner, model: LoadedModel, dtype: torch.dtype, tokens: int) -> None:
    """Run a decode beside a prompt of `tokens` and alone, an adapter on every layer: what compiles at all does so now.

    What it leaves in the first KV block is overwritten before it is read.
    """
    modules = {
        module: ModuleWeights(torch.zeros(1, site.in_features), torch.zeros(end - start, 1), scaling=1.0)
        for site in model.decoder.sites
        for module, (start, end) in site.targets.items()
    }
    adapter = pack_adapter(BoundAdapter("warm-up", modules), model.decoder.sites, dtype, torch.device(model.device))
    rows = []
    prompt = (0,) * min(tokens, model.max_model_len)
    for computed in (len(prompt) - 1, 0):
        request = GenerationRequest("warm-up", prompt, SamplingParams(seed=0), adapter_digest=adapter.digest)
        seq = EngineSequence(request, choice=0, arrival_s=0.0)
        seq.block_table = [0] * len(prompt)
        seq.num_computed_tokens = computed
        rows.append(ScheduledSequence(seq, seq.num_uncomputed_tokens))
    for together in (rows, rows[:1]):
        runner.run(together, lambda digest: 0, {0: adapter})
