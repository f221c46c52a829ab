"""The metrics: the rate's window, the bound on labels, and what an HTTP scrape returns."""

from __future__ import annotations

import socket
import urllib.request
from dataclasses import replace

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from loraplex.server.engine.request import FinishReason
from loraplex.server.engine.stats import LoadStats, MemoryStats, RequestStats, StepStats, TierStats, TokenStats
from loraplex.server.metrics import MAX_ADAPTER_LABELS, Metrics, TokenRate

MEMORY = MemoryStats(
    device=TierStats(adapters=2, used_bytes=10, peak_bytes=15, capacity_bytes=40, loads=6, evictions=4),
    host=TierStats(adapters=3, used_bytes=12, peak_bytes=20, capacity_bytes=50, loads=4, evictions=1),
    shared_bytes=8,
)


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def step(*tokens: TokenStats, **changes: float) -> StepStats:
    figures = {
        "duration_s": 0.05,
        "num_running": 3,
        "num_waiting": 2,
        "num_rows": 3,
        "num_tokens": 7,
        "num_adapters": 2,
        "kv_cache_usage": 0.25,
        "prefix_queries": 10,
        "prefix_hits": 4,
        "num_preemptions": 1,
        **changes,
    }
    return StepStats(tokens=tokens, **figures)  # type: ignore[arg-type]


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_the_rate_follows_its_window() -> None:
    clock = Clock()
    rate = TokenRate(window_s=10, clock=clock)
    assert rate.value() == 0
    for _ in range(21):
        rate.add(5)
        clock.now += 1
    assert rate.value() == pytest.approx(5, rel=0.11)
    clock.now += 60
    assert rate.value() == 0


def test_a_burst_in_the_first_second_is_not_inflated() -> None:
    clock = Clock()
    rate = TokenRate(clock=clock)
    rate.add(8)
    clock.now += 0.01
    assert rate.value() == 8


def test_tokens_are_counted_by_adapter() -> None:
    metrics = Metrics()
    metrics.on_step(step(TokenStats("", 5, 0.2, None), TokenStats("sql", 9, 0.3, None)))
    metrics.on_step(step(TokenStats("sql", 0, None, 0.04)))
    assert value(metrics, "loraplex_generation_tokens_total", adapter="base") == 1
    assert value(metrics, "loraplex_generation_tokens_total", adapter="sql") == 2
    assert value(metrics, "loraplex_prompt_tokens_total", adapter="sql") == 9
    assert value(metrics, "loraplex_time_to_first_token_seconds_count") == 2
    assert value(metrics, "loraplex_inter_token_latency_seconds_count") == 1


def test_totals_of_the_engine_become_counters() -> None:
    metrics = Metrics()
    metrics.on_step(step(prefix_queries=10, prefix_hits=4, num_preemptions=1))
    metrics.on_step(step(prefix_queries=30, prefix_hits=14, num_preemptions=1))
    assert value(metrics, "loraplex_prefix_cache_queries_total") == 30
    assert value(metrics, "loraplex_prefix_cache_hits_total") == 14
    assert value(metrics, "loraplex_num_preemptions_total") == 1


def test_adapters_past_the_bound_share_a_label() -> None:
    metrics = Metrics()
    for number in range(MAX_ADAPTER_LABELS + 5):
        metrics.on_step(step(TokenStats(f"a{number}", 1, 0.1, None)))
    assert value(metrics, "loraplex_generation_tokens_total", adapter="other") == 5
    metrics.forget_adapter("a0")
    assert value(metrics, "loraplex_generation_tokens_total", adapter="a0") is None
    metrics.on_step(step(TokenStats("late", 1, 0.1, None)))
    assert value(metrics, "loraplex_generation_tokens_total", adapter="late") == 1


def test_an_aborted_request_counts_but_has_no_latency() -> None:
    metrics = Metrics()
    metrics.on_request(RequestStats("", FinishReason.ABORT, 4, 1, 0, 9.0, 0.1, None, None, None))
    metrics.on_request(RequestStats("", FinishReason.LENGTH, 4, 8, 0, 2.0, 0.1, 0.05, 0.2, 1.7))
    assert value(metrics, "loraplex_request_success_total", finished_reason="abort") == 1
    assert value(metrics, "loraplex_request_success_total", finished_reason="length") == 1
    assert value(metrics, "loraplex_e2e_request_latency_seconds_count") == 1
    assert value(metrics, "loraplex_adapter_cold_starts_total") == 1
    assert value(metrics, "loraplex_request_adapter_wait_time_seconds_sum") == 0.05


def test_running_and_waiting_adapters_are_one_series() -> None:
    """Routers read the labels; series that pile up would tell them of adapters that left long ago."""
    metrics = Metrics()
    metrics.set_max_rows(16)
    metrics.on_adapters({"b", "a"}, {"c"})
    metrics.on_adapters({"b"}, frozenset())
    families = {f.name: f for f in text_string_to_metric_families(generate_latest(metrics.registry).decode())}
    (sample,) = families["loraplex_lora_requests_info"].samples
    assert sample.labels == {"max_lora": "16", "running_lora_adapters": "b", "waiting_lora_adapters": ""}
    assert sample.value > 0


def test_a_scrape_parses_and_has_the_tiers() -> None:
    metrics = Metrics()
    metrics.set_model({"model": "tiny", "quantization": "nf4"})
    metrics.set_registered(7)
    metrics.on_memory(MEMORY, [LoadStats("host", 0.004), LoadStats("host", 0.04), LoadStats("device", 0.0)])
    port, stop = metrics.serve("127.0.0.1", 0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            families = {f.name: f for f in text_string_to_metric_families(answer.read().decode())}
    finally:
        stop()

    def tiers(name: str, sample: str = "") -> dict[str, float]:
        found = (s for s in families[f"loraplex_{name}"].samples if s.name == f"loraplex_{sample or name}")
        return {s.labels["tier"]: s.value for s in found}

    assert tiers("adapters") == {"disk": 7, "host": 3, "device": 2}
    assert tiers("adapter_memory_bytes") == {"host": 12, "device": 10}
    assert tiers("adapter_memory_peak_bytes") == {"host": 20, "device": 15}
    assert tiers("adapter_memory_capacity_bytes") == {"host": 50, "device": 40}
    assert tiers("adapter_loads", "adapter_loads_total") == {"host": 4, "device": 6}
    assert tiers("adapter_evictions", "adapter_evictions_total") == {"host": 1, "device": 4}
    assert tiers("adapter_load_seconds", "adapter_load_seconds_count") == {"host": 2, "device": 1}
    assert tiers("adapter_load_seconds", "adapter_load_seconds_sum")["host"] == pytest.approx(0.044)
    assert families["loraplex_adapter_memory_shared_bytes"].samples[0].value == 8
    assert families["loraplex_lora_pool_slots_used"].samples[0].value == 2
    assert families["loraplex_lora_pool_utilization"].samples[0].value == 0.25
    assert families["loraplex_model_info"].samples[0].labels["quantization"] == "nf4"


def test_totals_of_the_tiers_become_counters() -> None:
    metrics = Metrics()
    metrics.on_memory(MEMORY, [])
    metrics.on_memory(replace(MEMORY, host=replace(MEMORY.host, loads=9)), [])
    assert value(metrics, "loraplex_adapter_loads_total", tier="host") == 9
    assert value(metrics, "loraplex_adapter_loads_total", tier="device") == 6


def test_a_taken_port_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="in use"):
            Metrics().serve("127.0.0.1", taken.getsockname()[1])
