"""Many adapters in small budgets beside a few, through the server's engine: scheduler, tiers, captured steps.

Adapters are read from the host's memory in place of a disk, and packed, copied and evicted as ever.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from loraplex.adapters.binding import BoundAdapter, ModuleWeights
from loraplex.bench.gpu.figures import BenchSize, compute_dtype
from loraplex.bench.gpu.random_model import random_model
from loraplex.bench.gpu.stage import attention_kernels, random_weights
from loraplex.bench.gpu.step_model import DecoderShape
from loraplex.server.config import EngineConfig
from loraplex.server.engine.build import build_engine
from loraplex.server.engine.commands import AddRequest, Stop
from loraplex.server.engine.engine import Engine, EngineOutput
from loraplex.server.engine.limits import kv_cache_shape
from loraplex.server.engine.request import GenerationRequest, RequestOutput, SamplingParams
from loraplex.server.engine.stats import NullObserver
from loraplex.server.lora.host_pool import pinned_nbytes
from loraplex.server.lora.packing import packed_nbytes
from loraplex.server.models.loader import LoadedModel
from loraplex.server.tokenizer import Tokenizer

FEW = 5
PROMPT = 30
DEVICE_SHARE, HOST_SHARE = 0.02, 0.10


def measure_many(shape: DecoderShape, device: torch.device, size: BenchSize) -> dict[str, Any]:
    """Return tokens per second with many adapters, cold and warm, with few, and the shares of the latter."""
    model = random_model(shape, "nf4", attention_kernels(), device, dtype=compute_dtype(device))
    load = _loader(model)
    each = packed_nbytes(load("adapter-0"), model.decoder.sites, model.dtype)
    every, length = size.adapters * each, PROMPT + size.max_tokens + 2
    pinned = pinned_nbytes(each) / each if device.type == "cuda" else 1.0  # what the host's tier counts
    block_bytes = kv_cache_shape(model, EngineConfig()).block_bytes
    config = EngineConfig(
        max_num_seqs=size.rows,
        max_num_batched_tokens=max(512, size.rows),
        max_model_len=length,
        max_waiting=size.requests,
        kv_cache_memory=(size.rows + 1) * (length // EngineConfig.block_size + 2) * block_bytes,
        adapter_device_memory=int(every * DEVICE_SHARE),
        adapter_host_memory=int(every * HOST_SHARE * pinned),
        enable_prefix_caching=False,
    )
    few = _rates(model, config, load, _popularity(FEW, size), size)
    many = _rates(model, config, load, _popularity(size.adapters, size), size)
    return {
        "few_tok_s": few,
        "many_tok_s": many,
        "many_adapters_percent": 100 * many[1] / few[1],
        "many_adapters_cold_percent": 100 * many[0] / few[1],
        "adapters_bytes": every,
    }


def _rates(
    model: LoadedModel,
    config: EngineConfig,
    load: Callable[[str], BoundAdapter],
    adapters: Sequence[int],
    size: BenchSize,
) -> tuple[float, float]:
    """Return tokens per second of the same requests twice: on a cold engine, and again."""
    answers = _Answers()
    engine = build_engine(model, _tokenizer(model.vocab_size), config, load, NullObserver(), answers)
    rates = []
    for turn in range(2):
        started = time.perf_counter()
        for number, adapter in enumerate(adapters):
            params = SamplingParams(max_tokens=size.max_tokens, ignore_eos=True, temperature=0.0, seed=0)
            prompt = tuple((number * 31 + at) % model.vocab_size for at in range(PROMPT))
            name = f"{turn}-{number}"
            engine.submit(AddRequest(GenerationRequest(name, prompt, params, adapter_digest=f"adapter-{adapter}")))
        answers.wait(engine, len(adapters) * (turn + 1))
        rates.append(len(adapters) * size.max_tokens / (time.perf_counter() - started))
    engine.submit(Stop())
    engine.run()
    del engine
    gc.collect()
    return rates[0], rates[1]


class _Answers:
    """Counts what is finished.

    Raises, from `wait`, the first error that a request ended with.
    """

    def __init__(self) -> None:
        self._finished = 0
        self._error: Exception | None = None

    def __call__(self, outputs: Sequence[EngineOutput]) -> None:
        for output in outputs:
            if isinstance(output, RequestOutput) and output.finished:
                self._finished += 1
                self._error = self._error or output.error

    def wait(self, engine: Engine, count: int) -> None:
        while self._finished < count:
            if not engine.step():
                time.sleep(1e-4)  # the loading threads need the interpreter
            if self._error is not None:
                raise self._error


def _loader(model: LoadedModel) -> Callable[[str], BoundAdapter]:
    """Return a loader of adapters that share their numbers: there is no place for thousands of random ones."""
    shared = random_weights(model, 8, ("q", "v"), 0, torch.device("cpu"))
    modules = {name: ModuleWeights(w.a, w.b, scaling=w.scaling) for name, w in shared.modules.items()}
    return lambda digest: BoundAdapter(digest, modules)


def _popularity(adapters: int, size: BenchSize) -> list[int]:
    """Return each request's adapter: Zipf with s = 1."""
    weights = 1 / np.arange(1, adapters + 1)
    drawn = np.random.default_rng(0).choice(adapters, size.requests, p=weights / weights.sum())
    return [int(adapter) for adapter in drawn]


def _tokenizer(vocab: int) -> Tokenizer:
    """Return one that has a text for every token."""
    fast = FastTokenizer(models.WordLevel({f"t{number}": number for number in range(vocab)}, unk_token="t0"))
    fast.decoder = decoders.Fuse()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast))  # type: ignore[no-untyped-call]
