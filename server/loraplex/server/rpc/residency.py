"""Keeps the engine and the metrics in step with the registry: what is pinned, and what has to go."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from loraplex.adapters.records import Unregistration
from loraplex.adapters.registry import AdapterRegistry
from loraplex.server.engine.client import EngineClient
from loraplex.server.engine.stats import FreedMemory
from loraplex.server.metrics import Metrics

DEFAULT_DRAIN_S = 1.0
"""For requests that have their last token and are about to end; longer ones are waited for only if that is asked."""
FREE_S = 10.0
"""Memory that no request uses comes free between two steps of the engine."""


@dataclass(frozen=True)
class Departure:
    """What an unregistration has left running, and the bytes that have come free."""

    active_requests: int
    memory: FreedMemory
    disk_bytes: int


class Residency:
    """Tells the engine which adapters stay and which go; used on the event loop."""

    def __init__(self, registry: AdapterRegistry, engine: EngineClient, metrics: Metrics) -> None:
        self._registry = registry
        self._engine = engine
        self._metrics = metrics
        self._pinned: frozenset[str] = frozenset()
        self._leaving: set[asyncio.Task[FreedMemory]] = set()
        self.follow()

    def follow(self) -> None:
        """Pass on what is pinned now (a pin on a name follows it from version to version) and how many there are."""
        wanted = self._registry.pins.digests
        for digest in self._pinned - wanted:
            self._engine.unpin(digest)
        for digest in wanted - self._pinned:
            self._engine.pin(digest)
        self._pinned = wanted
        self._metrics.set_registered(self._registry.count())

    def dismiss(self, gone: Unregistration) -> asyncio.Task[FreedMemory]:
        """Let go of what is unregistered once the last request on it has ended, whether or not anybody waits for it."""
        self.follow()
        leaving = asyncio.create_task(self._leave(gone))
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)
        return leaving

    async def departure(
        self, gone: Unregistration, leaving: asyncio.Task[FreedMemory], drain_timeout_s: float | None
    ) -> Departure:
        """Wait for the requests on what was dismissed, at most `drain_timeout_s`, and say what has come free."""
        limit = DEFAULT_DRAIN_S if drain_timeout_s is None else drain_timeout_s
        await asyncio.wait({leaving}, timeout=limit if gone.active_requests else FREE_S)
        memory = leaving.result() if leaving.done() else FreedMemory()
        disk = sum(size for digest, size in gone.unnamed.items() if not self._registry.stock.has(digest))
        return Departure(self._registry.stock.active(gone.unnamed), memory, disk)

    def close(self) -> None:
        """Wait for nothing any more."""
        for leaving in self._leaving:
            leaving.cancel()

    async def _leave(self, gone: Unregistration) -> FreedMemory:
        # What lost its name earlier and was brought back by a request goes too, but is not this call's merit.
        for digest in self._engine.held - self._registry.digests - gone.unnamed.keys():
            self._engine.forget(digest)
        freed = await asyncio.gather(*(self._engine.forget(digest) for digest in gone.unnamed))
        await asyncio.wrap_future(self._registry.stock.drained(gone.unnamed))
        if gone.name not in self._registry.directory.names:
            # Not before: the last request's tokens would make the series anew.
            self._metrics.forget_adapter(gone.name)
        return FreedMemory(sum(one.device_bytes for one in freed), sum(one.host_bytes for one in freed))
