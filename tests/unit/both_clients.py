"""One way for tests to drive the sync and the asyncio client alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from loraplex.client import AsyncClient, Client, RetryPolicy

FAST = RetryPolicy(max_attempts=4, initial_backoff_s=0.01, max_backoff_s=0.05)


class Both:
    """One way to drive either client: the sync one runs on threads."""

    def __init__(self, kind: str, target: str, **settings: Any) -> None:
        self.is_async = kind == "async"
        settings = {"retry": FAST, "timeout": 20.0, **settings}
        self.client: Any = AsyncClient(target, **settings) if self.is_async else Client(target, **settings)

    async def call(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        if self.is_async:
            return await getattr(self.client, method)(*arguments, **keywords)
        return await asyncio.to_thread(getattr(self.client, method), *arguments, **keywords)

    async def items(self, stream: Any) -> AsyncIterator[Any]:
        if self.is_async:
            async for item in stream:
                yield item
            return
        end = object()
        while (item := await asyncio.to_thread(next, stream, end)) is not end:
            yield item

    async def finish(self, stream: Any, method: str) -> Any:
        return await getattr(stream, method)() if self.is_async else await asyncio.to_thread(getattr(stream, method))

    async def close_stream(self, stream: Any) -> None:
        await stream.aclose() if self.is_async else stream.close()

    async def close(self) -> None:
        await self.client.close() if self.is_async else self.client.close()
