"""What the engine tells its observer: plain numbers, once a step and once a request. Knows no metrics system."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Protocol

from loraplex.server.engine.request import FinishReason


@dataclass(frozen=True)
class TokenStats:
    """One generated token; the name is "" for the base. Latencies in seconds, None where they do not apply."""

    adapter_name: str
    prompt_tokens: int
    """Tokens of the request's prompt with its first token, else 0."""
    time_to_first_token_s: float | None
    inter_token_s: float | None


@dataclass(frozen=True)
class StepStats:
    """The engine after one step."""

    duration_s: float
    num_running: int
    num_waiting: int
    num_rows: int
    num_tokens: int
    """Tokens computed, prompts included."""
    num_adapters: int
    """Distinct adapters in the batch; the base does not count."""
    tokens: tuple[TokenStats, ...]
    """One entry for each token that the step generated."""
    kv_cache_usage: float
    prefix_queries: int
    """Since start, in tokens; like `prefix_hits` and `num_preemptions`."""
    prefix_hits: int
    num_preemptions: int


@dataclass(frozen=True)
class RequestStats:
    """One choice that has ended, for whatever reason; times in seconds, None where that point was never reached."""

    adapter_name: str
    finish_reason: FinishReason
    prompt_tokens: int
    generation_tokens: int
    cached_tokens: int
    e2e_s: float
    queue_s: float | None
    adapter_wait_s: float | None
    """Of the time in the queue: since the first row that only its adapter was missing for; None if it was there."""
    prefill_s: float | None
    decode_s: float | None


@dataclass(frozen=True)
class AdapterMemory:
    """What one adapter takes of the two budgets now, in bytes."""

    device_bytes: int = 0
    host_bytes: int = 0


@dataclass(frozen=True)
class FreedMemory:
    """What came free of the two budgets when an adapter was forgotten, in bytes."""

    device_bytes: int = 0
    host_bytes: int = 0


@dataclass(frozen=True)
class TierStats:
    """One tier of the adapter memory; bytes, and events since the start."""

    adapters: int
    used_bytes: int
    peak_bytes: int
    capacity_bytes: int
    loads: int
    evictions: int


@dataclass(frozen=True)
class MemoryStats:
    """The adapter memory; `shared_bytes` are in both tiers' sums and exist once (the device is the CPU)."""

    device: TierStats
    host: TierStats
    shared_bytes: int


@dataclass(frozen=True)
class LoadStats:
    """One adapter that came into a tier: "host", read from the disk, checked and packed, or "device", copied there."""

    tier: str
    seconds: float


class EngineObserver(Protocol):
    """Called on the engine thread; must return quickly and never raise."""

    def on_step(self, stats: StepStats) -> None:
        """Take the figures of one step."""

    def on_request(self, stats: RequestStats) -> None:
        """Take the figures of one ended choice."""

    def on_queue(self, num_running: int, num_waiting: int, kv_cache_usage: float) -> None:
        """Take the queue's lengths and the share of KV blocks in use when there is nothing to run."""

    def on_adapters(self, running: Set[str], waiting: Set[str]) -> None:
        """Take the names of the adapters that have rows, and some of those that are waited for, when they change."""

    def on_memory(self, stats: MemoryStats, loads: Sequence[LoadStats]) -> None:
        """Take the state of the adapter memory whenever it changes, and the loads since the last time."""


class NullObserver:
    """Takes everything and keeps nothing."""

    def on_step(self, stats: StepStats) -> None:
        """Do nothing."""

    def on_request(self, stats: RequestStats) -> None:
        """Do nothing."""

    def on_queue(self, num_running: int, num_waiting: int, kv_cache_usage: float) -> None:
        """Do nothing."""

    def on_adapters(self, running: Set[str], waiting: Set[str]) -> None:
        """Do nothing."""

    def on_memory(self, stats: MemoryStats, loads: Sequence[LoadStats]) -> None:
        """Do nothing."""
