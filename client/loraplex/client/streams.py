"""The iterators that streaming calls return to a sync caller."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import grpc

from loraplex.client.calls import Call
from loraplex.client.errors import InternalError
from loraplex.client.merging import MergeProgress
from loraplex.client.responses import GenerationBuilder
from loraplex.client.results import Generation, GenerationPiece
from loraplex.client.retry import Attempts, wait_or_raise

ItemT = TypeVar("ItemT")
Start = Callable[[float | None], Any]
"""Sends the call with this many seconds to go (None: no limit) and returns gRPC's call object."""


class Stream(Generic[ItemT]):
    """The messages of one streaming call, sent when this is made; closing it before the end cancels the call.

    Until the first message has come, failures are tried again as the client's RetryPolicy says. Iterating raises
    LoraplexClientError.
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

    def __iter__(self) -> Self:
        """Return self."""
        return self

    def __next__(self) -> ItemT:
        """Wait for the next message.

        Raises:
            LoraplexClientError: when the call fails.
        """
        while not self._closed:
            try:
                message = next(self._rpc)
            except grpc.RpcError as error:
                time.sleep(wait_or_raise(error, self._attempts, self.request_id, repeatable=not self._started))
                self._rpc = self._start(self._attempts.remaining_s())
            else:
                self._started = True
                return self._parse(message)
        raise StopIteration

    def close(self) -> None:
        """Cancel the call unless it has ended; the server stops working on it. Iterating then ends at once."""
        self._closed = True
        self._rpc.cancel()

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the stream."""
        self.close()


class GenerationStream(Stream[GenerationPiece]):
    """The pieces of one generation."""

    def __init__(self, call: Call[GenerationPiece], start: Start, attempts: Attempts) -> None:
        """Send `call` through `start`."""
        super().__init__(call, start, attempts)
        self._builder = GenerationBuilder(call.request_id)

    def __next__(self) -> GenerationPiece:
        """Wait for the next piece.

        Raises:
            LoraplexClientError: when the call fails.
        """
        return self._builder.add(super().__next__())

    def collect(self) -> Generation:
        """Read what is left and return everything from the first piece on.

        Raises:
            LoraplexClientError: when the call fails.
        """
        for _ in self:
            pass
        return self._builder.build()


class MergeStream(Stream[MergeProgress]):
    """The progress of one merge."""

    _last: MergeProgress | None = None

    def __next__(self) -> MergeProgress:
        """Wait for the next message.

        Raises:
            LoraplexClientError: when the call fails.
        """
        self._last = super().__next__()
        return self._last

    def result(self) -> MergeProgress:
        """Read what is left and return the last message: the folder that was written and the adapter's digest.

        Raises:
            LoraplexClientError: when the call fails.
        """
        for _ in self:
            pass
        return finished_merge(self._last, self.request_id)


def finished_merge(last: MergeProgress | None, request_id: str) -> MergeProgress:
    """Return `last` if it is a merge's last message.

    Raises:
        InternalError: if it is not: the stream ended early.
    """
    if last is None or not last.output_path:
        raise InternalError("the merge ended without saying what it wrote", request_id=request_id)
    return last
