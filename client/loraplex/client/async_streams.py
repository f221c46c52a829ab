"""The iterators that streaming calls return to an asyncio caller."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Generic, Self, TypeVar

import grpc

from loraplex.client.calls import Call
from loraplex.client.errors import CancelledError
from loraplex.client.merging import MergeProgress
from loraplex.client.responses import GenerationBuilder
from loraplex.client.results import Generation, GenerationPiece
from loraplex.client.retry import Attempts, wait_or_raise
from loraplex.client.streams import Start, finished_merge

ItemT = TypeVar("ItemT")


class AsyncStream(Generic[ItemT]):
    """The messages of one streaming call, sent when this is made; closing it before the end cancels the call.

    Until the first message has come, failures are tried again as the client's RetryPolicy says. Iterating raises
    LoraplexClientError. Cancelling the task that iterates cancels the call too.
    """

    def __init__(self, call: Call[ItemT], start: Start, attempts: Attempts) -> None:
        """Send `call` through `start`."""
        self.request_id = call.request_id
        self._parse = call.parse
        self._start = start
        self._attempts = attempts
        self._started = False
        self._closed = False
        self._rpc = start(attempts.remaining_s())

    def __aiter__(self) -> Self:
        """Return self."""
        return self

    async def __anext__(self) -> ItemT:
        """Wait for the next message.

        Raises:
            LoraplexClientError: when the call fails.
        """
        while not self._closed:
            try:
                message = await self._rpc.read()
            except grpc.RpcError as error:
                wait = wait_or_raise(error, self._attempts, self.request_id, repeatable=not self._started)
                await asyncio.sleep(wait)
                self._rpc = self._start(self._attempts.remaining_s())
            except asyncio.CancelledError:
                if not self._closed:
                    raise
                # Not this task was cancelled but the call, by aclose() in another one.
                raise CancelledError("the stream was closed", request_id=self.request_id) from None
            else:
                if message is grpc.aio.EOF:  # type: ignore[attr-defined]  # grpc-stubs lacks it
                    break
                self._started = True
                return self._parse(message)
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel the call unless it has ended; the server stops working on it. Iterating then ends at once."""
        self._closed = True
        self._rpc.cancel()

    async def __aenter__(self) -> Self:
        """Return self."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the stream."""
        await self.aclose()


class AsyncGenerationStream(AsyncStream[GenerationPiece]):
    """The pieces of one generation."""

    def __init__(self, call: Call[GenerationPiece], start: Start, attempts: Attempts) -> None:
        """Send `call` through `start`."""
        super().__init__(call, start, attempts)
        self._builder = GenerationBuilder(call.request_id)

    async def __anext__(self) -> GenerationPiece:
        """Wait for the next piece.

        Raises:
            LoraplexClientError: when the call fails.
        """
        return self._builder.add(await super().__anext__())

    async def collect(self) -> Generation:
        """Read what is left and return everything from the first piece on.

        Raises:
            LoraplexClientError: when the call fails.
        """
        async for _ in self:
            pass
        return self._builder.build()


class AsyncMergeStream(AsyncStream[MergeProgress]):
    """The progress of one merge."""

    _last: MergeProgress | None = None

    async def __anext__(self) -> MergeProgress:
        """Wait for the next message.

        Raises:
            LoraplexClientError: when the call fails.
        """
        self._last = await super().__anext__()
        return self._last

    async def result(self) -> MergeProgress:
        """Read what is left and return the last message: the folder that was written and the adapter's digest.

        Raises:
            LoraplexClientError: when the call fails.
        """
        async for _ in self:
            pass
        return finished_merge(self._last, self.request_id)
