"""Puts an engine together from a loaded model and the operator's budgets."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from loraplex.adapters.binding import BoundAdapter, ModuleWeights
from loraplex.server.config import EngineConfig
from loraplex.server.engine.block_manager import BlockManager
from loraplex.server.engine.engine import Engine, EngineParts, Publish
from loraplex.server.engine.kv_cache import KVCache, KVCacheShape
from loraplex.server.engine.model_runner import ForwardPass, ModelRunner
from loraplex.server.engine.request import GenerationRequest, SamplingParams
from loraplex.server.engine.scheduler import ScheduledSequence, Scheduler
from loraplex.server.engine.sequence import Sequence
from loraplex.server.engine.stats import EngineObserver
from loraplex.server.errors import ModelLoadError
from loraplex.server.lora.ops.interface import make_lora_ops
from loraplex.server.lora.packer import Packer
from loraplex.server.lora.packing import pack_adapter
from loraplex.server.lora.tiers import AdapterTiers
from loraplex.server.models.loader import LoadedModel
from loraplex.server.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Of a prompt that every kernel has something to do for, also those that leave short ones to others.
WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class EngineLimits:
    """What follows from model and budgets together."""

    max_model_len: int
    num_blocks: int
    kv_cache_bytes: int


def engine_limits(model: LoadedModel, config: EngineConfig) -> EngineLimits:
    """Divide the KV memory into blocks, and bound the context by them.

    Raises:
        ModelLoadError: if the KV memory does not hold one sequence of the asked-for length.
    """
    shape = kv_cache_shape(model, config)
    num_blocks = config.kv_cache_memory // shape.block_bytes
    capacity = num_blocks * config.block_size
    wanted = config.max_model_len or min(model.max_model_len, capacity)
    if wanted > model.max_model_len:
        raise ModelLoadError(
            f"--max-model-len {wanted} exceeds the model's own context of {model.max_model_len} tokens"
        )
    if num_blocks < 1 or wanted > capacity:
        raise ModelLoadError(
            f"--kv-cache-memory {config.kv_cache_memory} bytes holds {capacity} tokens, fewer than one sequence of "
            f"{max(wanted, config.block_size)}; raise it or lower --max-model-len"
        )
    return EngineLimits(wanted, num_blocks, num_blocks * shape.block_bytes)


def kv_cache_shape(model: LoadedModel, config: EngineConfig) -> KVCacheShape:
    """Return the cache's shape for this model, in its compute dtype."""
    decoder = model.decoder.config
    return KVCacheShape(decoder.num_layers, decoder.num_kv_heads, decoder.head_dim, config.block_size, model.dtype)


def adapter_dtype(model: LoadedModel, config: EngineConfig) -> torch.dtype:
    """Return the dtype in which adapter weights are kept on the device."""
    return model.dtype if config.adapter_dtype == "auto" else getattr(torch, config.adapter_dtype)


def build_engine(
    model: LoadedModel,
    tokenizer: Tokenizer,
    config: EngineConfig,
    load_adapter: Callable[[str], BoundAdapter],
    observer: EngineObserver,
    publish: Publish,
) -> Engine:
    """Allocate the memory, compile what is compiled at first use, and return an engine ready to `run`.

    `load_adapter` gives the bound weights of a digest; it is called on a background thread.

    Raises:
        ModelLoadError: if the KV memory is too small.
    """
    limits = engine_limits(model, config)
    device = torch.device(model.device)
    dtype = adapter_dtype(model, config)

    packer = Packer(model.decoder.sites, dtype, model.decoder.base, pinned=device.type != "cpu")
    blocks = BlockManager(
        limits.num_blocks,
        config.block_size,
        base_fingerprint=model.base.fingerprint,
        caching=config.enable_prefix_caching,
    )
    slots = AdapterTiers(
        lambda digest: packer.pack(load_adapter(digest)),
        config.adapter_device_memory,
        config.adapter_host_memory,
        device=device,
        on_load=lambda: engine.wake(),  # which is made after the tiers
    )
    kv_cache = KVCache(kv_cache_shape(model, config), limits.num_blocks, device)
    lora_ops = make_lora_ops(device)
    runner = ModelRunner(_forward_pass(model, device), kv_cache, lora_ops, device)
    _warm_up(runner, model, dtype, device)
    parts = EngineParts(
        runner=runner,
        scheduler=Scheduler(config, blocks, slots),
        blocks=blocks,
        slots=slots,
        tokenizer=tokenizer,
        eos_token_ids=frozenset(model.eos_token_ids),
        max_model_len=limits.max_model_len,
    )
    engine = Engine(parts, publish, observer)
    logger.info(
        "engine: %d KV blocks of %d tokens (%.0f MiB), context %d, adapter memory %.0f MiB (host %.0f) as %s",
        limits.num_blocks,
        config.block_size,
        limits.kv_cache_bytes / 2**20,
        limits.max_model_len,
        config.adapter_device_memory / 2**20,
        config.adapter_host_memory / 2**20,
        str(dtype).removeprefix("torch."),
    )
    return engine


def _forward_pass(model: LoadedModel, device: torch.device) -> ForwardPass:
    if device.type != "cpu":
        return model.decoder
    from loraplex.server.models.captured import CapturedDecoder

    return CapturedDecoder(model.decoder)


def _warm_up(runner: ModelRunner, model: LoadedModel, dtype: torch.dtype, device: torch.device) -> None:
    """Run a decode and a prompt with an adapter on every layer, so that what compiles at first use does so now.

    What it leaves in the first KV block is overwritten before it is read.
    """
    modules = {
        module: ModuleWeights(torch.zeros(1, site.in_features), torch.zeros(end - start, 1), scaling=1.0)
        for site in model.decoder.sites
        for module, (start, end) in site.targets.items()
    }
    adapter = pack_adapter(BoundAdapter("warm-up", modules), model.decoder.sites, dtype, device)
    rows = []
    prompt = (0,) * min(WARM_UP_TOKENS, model.max_model_len)
    for computed in (len(prompt) - 1, 0):
        request = GenerationRequest("warm-up", prompt, SamplingParams(seed=0), adapter_digest=adapter.digest)
        seq = Sequence(request, choice=0, arrival_s=0.0)
        seq.block_table = [0] * len(prompt)
        seq.num_computed_tokens = computed
        rows.append(ScheduledSequence(seq, seq.num_uncomputed_tokens))
    runner.run(rows, lambda digest: 0, {0: adapter})
