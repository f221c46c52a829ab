"""What `transport` does, over an asyncio channel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TypeVar

import grpc

from loraplex.client.calls import Call
from loraplex.client.channel import ChannelOptions, Stubs
from loraplex.client.retry import Attempts, RetryPolicy, wait_or_raise
from loraplex.client.streams import Start
from loraplex.client.transport import attempts_of
from loraplex.client.uploads import Upload
from loraplex.v1 import adapter_pb2

ResultT = TypeVar("ResultT")


class AsyncTransport:
    """One asyncio channel, opened by the first call, on whose event loop all others must be made."""

    def __init__(
        self, target: str, policy: RetryPolicy, options: ChannelOptions, credentials: grpc.ChannelCredentials | None
    ) -> None:
        """Keep how to reach `target`: in plain text unless there are `credentials`."""
        self._target = target
        self._arguments = options.for_target(target)
        self._credentials = credentials
        self._policy = policy
        self._channel: grpc.aio.Channel | None = None
        self._stubs: Stubs | None = None

    async def unary(self, call: Call[ResultT], timeout: float, upload: Upload | None = None) -> ResultT:
        """Send `call` and return its result; `upload` is its request where that is a stream.

        Raises:
            LoraplexClientError: when the call fails.
        """
        attempts = attempts_of(call, self._policy, timeout)
        method = call.method(self._open())
        while True:
            request = call.request if upload is None else _off_the_loop(upload)
            try:
                return call.parse(await method(request, timeout=attempts.remaining_s(), metadata=call.metadata))
            except grpc.RpcError as error:
                if upload is not None and upload.failure is not None:
                    raise upload.failure from error
                repeatable = upload is None or upload.repeatable
                await asyncio.sleep(wait_or_raise(error, attempts, call.request_id, repeatable=repeatable))

    def opener(self, call: Call[ResultT], timeout: float) -> tuple[Start, Attempts]:
        """Return what a stream needs: how to send `call`, and its tries."""
        attempts = attempts_of(call, self._policy, timeout)
        method = call.method(self._open())
        return lambda left: method(call.request, timeout=left, metadata=call.metadata), attempts

    async def close(self) -> None:
        """Close the channel; calls that still run are cancelled."""
        if self._channel is not None:
            await self._channel.close(None)

    def _open(self) -> Stubs:
        # Not in __init__: gRPC ties a channel to the loop it was made on, and a client may be made before its loop.
        if self._stubs is None:
            self._channel = (
                grpc.aio.insecure_channel(self._target, options=self._arguments)
                if self._credentials is None
                else grpc.aio.secure_channel(self._target, self._credentials, options=self._arguments)
            )
            self._stubs = Stubs(self._channel)
        return self._stubs


async def _off_the_loop(upload: Upload) -> AsyncIterator[adapter_pb2.UploadAdapterRequest]:
    """Yield the messages of `upload`, reading the files on a thread."""
    messages = iter(upload)
    while (message := await asyncio.to_thread(next, messages, None)) is not None:
        yield message
