"""Puts an engine together from a loaded model and the operator's budgets."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from loraplex.adapters.binding import BoundAdapter
from loraplex.server.config import EngineConfig
from loraplex.server.engine.accelerator import accelerator_for
from loraplex.server.engine.block_manager import BlockManager
from loraplex.server.engine.engine import Engine, EngineParts, Publish
from loraplex.server.engine.limits import EngineLimits, adapter_dtype, engine_limits
from loraplex.server.engine.runner_build import build_runner
from loraplex.server.engine.scheduler import Scheduler
from loraplex.server.engine.stats import EngineObserver
from loraplex.server.lora.packer import Packer
from loraplex.server.lora.tiers import AdapterTiers
from loraplex.server.models.loader import LoadedModel
from loraplex.server.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def device_limits(model: LoadedModel, config: EngineConfig) -> EngineLimits:
    """Return the limits on the model's device as it is now: the weights loaded, nothing else taken.

    Raises:
        ModelLoadError: as `engine_limits` does.
    """
    gpu = accelerator_for(torch.device(model.device))
    return engine_limits(model, config, None if gpu is None else gpu.memory())


def build_engine(
    model: LoadedModel,
    tokenizer: Tokenizer,
    config: EngineConfig,
    load_adapter: Callable[[str], BoundAdapter],
    observer: EngineObserver,
    publish: Publish,
    *,
    limits: EngineLimits | None = None,
) -> Engine:
    """Allocate the memory, compile what is compiled at first use, and return an engine ready to `run`.

    `load_adapter` gives the bound weights of a digest; it is called on a background thread. `limits` are those of
    `device_limits`, which are asked for if they are left out.

    Raises:
        ModelLoadError: if the KV memory is too small, or the device runs out of memory.
    """
    limits = limits or device_limits(model, config)
    device = torch.device(model.device)
    gpu = accelerator_for(device)
    dtype = adapter_dtype(model, config)
    if limits.plan is not None:
        logger.info("memory of %s:\n%s", device, limits.plan.render())

    packer = Packer(model.decoder.sites, dtype, model.decoder.base, pinned=device.type != "cpu")
    blocks = BlockManager(
        limits.num_blocks,
        config.block_size,
        base_fingerprint=model.base.fingerprint,
        caching=config.enable_prefix_caching,
    )

    def wake() -> None:
        engine.wake()  # which is made after the tiers

    slots = AdapterTiers(
        lambda digest: packer.pack(load_adapter(digest)),
        config.adapter_device_memory,
        config.adapter_host_memory,
        device=device,
        copies=None if gpu is None else gpu.copies(wake),
        on_load=wake,
    )
    parts = EngineParts(
        runner=build_runner(model, config, limits, gpu),
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
