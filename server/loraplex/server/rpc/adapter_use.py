"""Holds an adapter version while a call uses it, and lets go of it however the call ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Executor, Future
from contextlib import asynccontextmanager

from loraplex.adapters.records import AdapterRecord
from loraplex.adapters.registry import AdapterRegistry


@asynccontextmanager
async def adapter_use(
    registry: AdapterRegistry, name: str, executor: Executor, routing_key: str | None = None
) -> AsyncIterator[AdapterRecord]:
    """Resolve `name` and count one use of its version; a caller that goes away meanwhile leaves no use behind.

    `routing_key` chooses between an alias's targets, see `AdapterRegistry.acquire`.

    Raises:
        NotFoundError: nothing has that name.
        PreconditionError: the adapter cannot serve requests.
    """
    future = executor.submit(registry.acquire, name, routing_key)

    def release_result(acquired: Future[AdapterRecord]) -> None:
        if not acquired.cancelled() and acquired.exception() is None:
            registry.release(acquired.result().digest)

    try:
        record = await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        future.add_done_callback(release_result)
        raise
    try:
        yield record
    finally:
        # Releasing the last use of an unregistered adapter deletes files: not on the event loop.
        executor.submit(registry.release, record.digest)
