"""A tiny random model with a tokenizer, adapters that fit it, and a real server on a thread of its own."""

from __future__ import annotations

import asyncio
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loraplex.adapters.binding import BaseModel, BaseModule
from loraplex.client import Client
from loraplex.client.retry import NO_RETRY, RetryPolicy
from loraplex.server.config import MIB, EngineConfig, ModelConfig, ServerConfig
from loraplex.server.rpc.server import Server
from tests.adapter_factory import tensors, write_adapter
from tests.unit.tiny_tokenizers import byte_level_fast, wrap

T = TypeVar("T")

HIDDEN, INNER, LAYERS, VALUES = 32, 48, 2, 16
CONTEXT = 4096
LONG = 4000
"""Output tokens of a request that runs for seconds, longer than any test looks at it."""


def write_model(folder: Path) -> Path:
    """Write a random Llama whose greedy texts are not constant, with a byte-level tokenizer."""
    fast = byte_level_fast()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=fast.get_vocab_size(),
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)
    wrap(fast).save_pretrained(folder)
    return folder


def base_of_model() -> BaseModel:
    """The modules of `write_model`'s Llama that the tests' adapters target."""
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(LAYERS):
        shapes[f"model.layers.{layer}.self_attn.q_proj"] = (HIDDEN, HIDDEN)
        shapes[f"model.layers.{layer}.self_attn.v_proj"] = (HIDDEN, VALUES)
        shapes[f"model.layers.{layer}.mlp.down_proj"] = (INNER, HIDDEN)
    return BaseModel("tiny", "LlamaForCausalLM", "", {name: BaseModule(name, *shape) for name, shape in shapes.items()})


def fitting_adapter(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write an adapter that fits the model; adapters of different seeds answer differently."""
    return write_adapter(folder, weights=tensors(base_of_model(), seed=seed), seed=seed, **changes)


@dataclass(frozen=True)
class Folders:
    """Where a server may read and write."""

    model: Path
    adapters: Path
    state: Path
    export: Path

    def config(self, **changes: Any) -> ServerConfig:
        """Return the configuration of a server over these folders."""
        settings: dict[str, Any] = {
            "model": ModelConfig(str(self.model), dtype="float32"),
            "engine": EngineConfig(kv_cache_memory=8 * MIB, max_num_seqs=8, threads=1),
            "adapter_roots": (self.adapters,),
            "state_dir": self.state,
            "export_root": self.export,
            "port": 0,
            "metrics_port": 0,
            "grace_period_s": 5.0,
        }
        return ServerConfig(**{**settings, **changes})


class RunningServer:
    """A server with its event loop on a thread. Use as a context manager, or call `stop`."""

    def __init__(self, folders: Folders, **changes: Any) -> None:
        self.folders = folders
        self.config = folders.config(**changes)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server", daemon=True)
        self._thread.start()
        self._running = True
        try:
            self.server = self.call(Server.start(self.config))
        except BaseException:
            self._end_loop()
            raise
        self.target = f"127.0.0.1:{self.server.port}"

    def call(self, coroutine: Coroutine[Any, Any, T], timeout: float = 60) -> T:
        """Run `coroutine` on the server's loop and return its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout)

    def begin_stop(self, grace_s: float | None = None) -> Callable[[], None]:
        """Begin to stop; return what waits for it."""
        stopping = asyncio.run_coroutine_threadsafe(self.server.stop(grace_s), self._loop)

        def wait() -> None:
            stopping.result(60)
            self._end_loop()

        return wait

    def stop(self, grace_s: float | None = 0) -> None:
        """Stop and wait for it; a second call does nothing."""
        if self._running:
            self.begin_stop(grace_s)()

    def client(self, retry: RetryPolicy = NO_RETRY, **options: Any) -> Client:
        """Return a client that tries once; the first answers may wait for kernels to be compiled."""
        return Client(self.target, timeout=120, retry=retry, **options)

    def metric(self, name: str) -> float:
        """Return one series (with its labels, if it has any) as Prometheus would scrape it; 0 if it is not there."""
        url = f"http://127.0.0.1:{self.server.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as response:
            text = response.read().decode()
        found = re.search(rf"^{re.escape('loraplex_' + name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    @property
    def is_idle(self) -> bool:
        """Whether no request has a row, a place in the queue or a KV block."""
        gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return all(self.metric(gauge) == 0 for gauge in gauges)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _end_loop(self) -> None:
        self._running = False
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)


def eventually(holds: Callable[[], bool], what: str, within_s: float = 20) -> None:
    """Wait until `holds()`; it is an error if that does not come."""
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, f"did not happen within {within_s:g} s: {what}"
        time.sleep(0.02)


def greedy_ids(client: Client, adapter: str = "", **options: Any) -> tuple[int, ...]:
    """Return the tokens that answer a fixed prompt."""
    answer = client.generate("The quick brown", adapter, max_tokens=12, ignore_eos=True, **options)
    return answer.choices[0].token_ids
