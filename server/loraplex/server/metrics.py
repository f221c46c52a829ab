"""The Prometheus metrics: vLLM's stems under the prefix `loraplex_`, fed by the engine's observer calls.

Per-adapter series are bounded: the first `MAX_ADAPTER_LABELS` adapters to be seen get their own, the rest share
`other`; the base model is `base`, a name that no adapter can take. Knows prometheus_client and the engine's
statistics; nothing about requests or tensors.
"""

from __future__ import annotations

import threading
import time
from collections import Counter as TallyCounter
from collections import deque
from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server

from loraplex.server.engine.request import FinishReason
from loraplex.server.engine.stats import LoadStats, MemoryStats, RequestStats, StepStats
from loraplex.server.lora_requests import LoraRequests

PREFIX = "loraplex_"
BASE_LABEL = "base"
OTHER_LABEL = "other"
MAX_ADAPTER_LABELS = 100
WINDOW_S = 10.0

# Bounds from vLLM, so that its dashboards can be used as they are.
_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_INTER_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20)
_REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)
_LOAD_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class TokenRate:
    """Tokens per second over a sliding window of seconds; may be read from any thread."""

    def __init__(self, window_s: float = WINDOW_S, clock: Callable[[], float] = time.monotonic) -> None:
        """Start empty.

        Raises:
            ValueError: if `window_s` is not positive.
        """
        if window_s <= 0:
            raise ValueError(f"window_s must be positive, got {window_s}")
        self._window_s = window_s
        self._clock = clock
        self._events: deque[tuple[float, int]] = deque()
        self._total = 0
        self._lock = threading.Lock()

    def add(self, tokens: int) -> None:
        """Count tokens that were generated now."""
        with self._lock:
            self._events.append((self._clock(), tokens))
            self._total += tokens
            self._expire()

    def value(self) -> float:
        """Return the rate: over the window, or since the window's first token if that is more recent (at least 1 s)."""
        with self._lock:
            self._expire()
            if not self._events:
                return 0.0
            return self._total / max(1.0, self._clock() - self._events[0][0])

    def _expire(self) -> None:
        oldest = self._clock() - self._window_s
        while self._events and self._events[0][0] < oldest:
            self._total -= self._events.popleft()[1]


class Metrics:
    """All series of one server, in a registry of their own; an `EngineObserver`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self._adapter_labels: set[str] = set()
        self._rate = TokenRate(clock=clock)
        self._most_adapters = 0
        self._seen: TallyCounter[str] = TallyCounter()  # totals of the engine that the counters have
        self._define_tokens()
        self._define_latencies()
        self._define_state()
        self._define_adapters()

    def serve(self, host: str, port: int) -> tuple[int, Callable[[], None]]:
        """Answer `/metrics` on a thread; return the port that was taken and a function that stops it.

        Raises:
            OSError: if the port is taken.
        """
        httpd, thread = start_http_server(port, addr=host, registry=self.registry)

        def stop() -> None:
            httpd.shutdown()
            httpd.server_close()
            thread.join()

        return int(httpd.server_port), stop

    def set_model(self, labels: dict[str, str]) -> None:
        """Publish what is served, as labels of `loraplex_model_info`."""
        self._model_info.info({"version": version("loraplex"), **labels})

    def set_max_rows(self, count: int) -> None:
        """Publish how many rows, and so how many adapters, a step can have."""
        self._lora_requests.max_adapters = count

    def set_registered(self, count: int) -> None:
        """Publish how many adapters are registered."""
        self._adapters.labels("disk").set(count)

    def forget_adapter(self, name: str) -> None:
        """Remove the series of an adapter that is not registered any more; its label may go to another."""
        self._adapter_labels.discard(name)
        for family in (self._generation, self._prompt):
            with suppress(KeyError):  # an adapter that was never used has no series
                family.remove(name)

    def on_step(self, stats: StepStats) -> None:
        """Take the figures of one step."""
        self._step_tokens.observe(stats.num_tokens)
        self._step_s.observe(stats.duration_s)
        self._step_adapters.observe(stats.num_adapters)
        self._most_adapters = max(self._most_adapters, stats.num_adapters)
        self._step_adapters_max.set(self._most_adapters)
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._kv_usage.set(stats.kv_cache_usage)
        self._advance("queries", stats.prefix_queries, self._prefix_queries)
        self._advance("hits", stats.prefix_hits, self._prefix_hits)
        self._advance("preemptions", stats.num_preemptions, self._preemptions)
        if stats.tokens:
            self._rate.add(len(stats.tokens))
        for token in stats.tokens:
            label = self._label(token.adapter_name)
            self._generation.labels(label).inc()
            if token.prompt_tokens:
                self._prompt.labels(label).inc(token.prompt_tokens)
            if token.time_to_first_token_s is not None:
                self._first_token.observe(token.time_to_first_token_s)
            if token.inter_token_s is not None:
                self._inter_token.observe(token.inter_token_s)

    def on_request(self, stats: RequestStats) -> None:
        """Take the figures of one ended choice."""
        self._requests.labels(stats.finish_reason.value).inc()
        if stats.adapter_wait_s is not None:
            self._cold_starts.inc()
            self._adapter_wait.observe(stats.adapter_wait_s)
        if stats.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
            return
        self._e2e.observe(stats.e2e_s)
        times = ((self._queue, stats.queue_s), (self._prefill, stats.prefill_s), (self._decode, stats.decode_s))
        for histogram, value in times:
            if value is not None:
                histogram.observe(value)

    def on_queue(self, num_running: int, num_waiting: int, kv_cache_usage: float) -> None:
        """Take the queue's lengths and the share of KV blocks in use when no step runs."""
        self._running.set(num_running)
        self._waiting.set(num_waiting)
        self._kv_usage.set(kv_cache_usage)

    def on_adapters(self, running: Set[str], waiting: Set[str]) -> None:
        """Take the names of the adapters that have rows and of those that are waited for."""
        self._lora_requests.update(running, waiting)

    def on_memory(self, stats: MemoryStats, loads: Sequence[LoadStats]) -> None:
        """Take the state of the adapter memory, and the loads since the last time."""
        for tier, figures in (("device", stats.device), ("host", stats.host)):
            self._adapters.labels(tier).set(figures.adapters)
            self._adapter_bytes.labels(tier).set(figures.used_bytes)
            self._adapter_peak.labels(tier).set(figures.peak_bytes)
            self._adapter_capacity.labels(tier).set(figures.capacity_bytes)
            self._advance(f"{tier} loads", figures.loads, self._adapter_loads.labels(tier))
            self._advance(f"{tier} evictions", figures.evictions, self._adapter_evictions.labels(tier))
        self._adapter_shared.set(stats.shared_bytes)
        self._pool_slots_used.set(stats.device.adapters)
        self._pool_utilization.set(stats.device.used_bytes / max(1, stats.device.capacity_bytes))
        for load in loads:
            self._adapter_load_s.labels(load.tier).observe(load.seconds)

    def _label(self, adapter_name: str) -> str:
        if not adapter_name:
            return BASE_LABEL
        if adapter_name not in self._adapter_labels:
            if len(self._adapter_labels) >= MAX_ADAPTER_LABELS:
                return OTHER_LABEL
            self._adapter_labels.add(adapter_name)
        return adapter_name

    def _advance(self, key: str, total: int, counter: Counter) -> None:
        counter.inc(total - self._seen[key])
        self._seen[key] = total

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
        return Histogram(PREFIX + name, text, labels, registry=self.registry, buckets=buckets)

    def _define_tokens(self) -> None:
        self._generation = self._counter("generation_tokens", "Tokens generated, by adapter.", ("adapter",))
        self._prompt = self._counter(
            "prompt_tokens", "Prompt tokens of requests that got a first token, by adapter.", ("adapter",)
        )
        rate = self._gauge("generation_tokens_per_second", f"Tokens generated a second over the last {WINDOW_S:g} s.")
        rate.set_function(self._rate.value)
        self._requests = self._counter("request_success", "Choices that ended, by reason.", ("finished_reason",))
        self._step_tokens = self._histogram("iteration_tokens_total", "Tokens computed in one step.", _STEP_TOKENS)
        self._prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")

    def _define_latencies(self) -> None:
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token, in seconds.", _FIRST_TOKEN_S
        )
        self._inter_token = self._histogram(
            "inter_token_latency_seconds", "Time between two tokens of one choice, in seconds.", _INTER_TOKEN_S
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token, in seconds.", _REQUEST_S)
        self._queue = self._histogram("request_queue_time_seconds", "Arrival to admission, in seconds.", _REQUEST_S)
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "Admission to first token, in seconds.", _REQUEST_S
        )
        self._decode = self._histogram("request_decode_time_seconds", "First to last token, in seconds.", _REQUEST_S)
        self._step_s = self._histogram("step_duration_seconds", "One engine step, in seconds.", _INTER_TOKEN_S)

    def _define_state(self) -> None:
        self._running = self._gauge("num_requests_running", "Sequences that hold a row.")
        self._waiting = self._gauge("num_requests_waiting", "Sequences that wait for a row.")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "Share of the KV blocks in use; 1 is all.")
        self._preemptions = self._counter("num_preemptions", "Sequences that gave their blocks back while running.")
        self._model_info = Info(PREFIX + "model", "What is served.", registry=self.registry)

    def _define_adapters(self) -> None:
        self._adapters = self._gauge("adapters", "Adapters by tier; disk are the registered ones.", ("tier",))
        self._adapter_bytes = self._gauge("adapter_memory_bytes", "Bytes of adapter weights by tier.", ("tier",))
        self._adapter_capacity = self._gauge("adapter_memory_capacity_bytes", "Budget of the tier in bytes.", ("tier",))
        self._adapter_peak = self._gauge(
            "adapter_memory_peak_bytes", "Most bytes of adapter weights since the start, by tier.", ("tier",)
        )
        self._adapter_shared = self._gauge(
            "adapter_memory_shared_bytes", "Bytes that both tiers count and that exist once: the device is the CPU."
        )
        self._adapter_loads = self._counter("adapter_loads", "Adapters that were brought into the tier.", ("tier",))
        self._adapter_evictions = self._counter("adapter_evictions", "Adapters that left it for others.", ("tier",))
        self._adapter_load_s = self._histogram(
            "adapter_load_seconds",
            "Bringing an adapter into the tier, in seconds: from the disk, checked and packed; or onto the device.",
            _LOAD_S,
            ("tier",),
        )
        self._cold_starts = self._counter(
            "adapter_cold_starts", "Choices that could have had a row and waited for their adapter."
        )
        self._adapter_wait = self._histogram(
            "request_adapter_wait_time_seconds",
            "From the row a cold start could have had to the one it got, in seconds.",
            _LOAD_S,
        )
        self._lora_requests = LoraRequests(PREFIX + "lora_requests_info")
        self.registry.register(self._lora_requests)
        self._pool_slots_used = self._gauge("lora_pool_slots_used", "Adapters on the device; slots have no fixed size.")
        self._pool_utilization = self._gauge("lora_pool_utilization", "Share of the device's adapter memory in use.")
        self._step_adapters = self._histogram(
            "iteration_adapters", "Distinct adapters in one step; the base does not count.", (0, 1, 2, 4, 8, 16, 32, 64)
        )
        self._step_adapters_max = self._gauge(
            "iteration_adapters_max", "Most distinct adapters that shared one step since the start."
        )
        for tier in ("disk", "host", "device"):
            self._adapters.labels(tier).set(0)
