"""Sends calls over a channel: deadlines, retries, typed errors. Knows nothing about what the calls mean."""

from __future__ import annotations

import math
import time
from typing import TypeVar

import grpc

from loraplex.client.calls import Call
from loraplex.client.channel import ChannelOptions, Stubs
from loraplex.client.retry import NO_RETRY, Attempts, RetryPolicy, wait_or_raise
from loraplex.client.streams import Start
from loraplex.client.uploads import Upload

ResultT = TypeVar("ResultT")


def attempts_of(call: Call[ResultT], policy: RetryPolicy, timeout: float) -> Attempts:
    """Return the tries of `call`, with the deadline `timeout` seconds (infinity: none) from now.

    Raises:
        ValueError: if `timeout` is not above 0.
    """
    if math.isnan(timeout) or timeout <= 0:
        raise ValueError(f"a timeout is a number of seconds above 0, got {timeout}")
    return Attempts(policy if call.retried else NO_RETRY, timeout)


class Transport:
    """One sync channel. Threads may share it."""

    def __init__(
        self, target: str, policy: RetryPolicy, options: ChannelOptions, credentials: grpc.ChannelCredentials | None
    ) -> None:
        """Open a channel to `target`, in plain text unless there are `credentials`; connects with the first call."""
        arguments = options.for_target(target)
        self._channel = (
            grpc.insecure_channel(target, options=arguments)
            if credentials is None
            else grpc.secure_channel(target, credentials, options=arguments)
        )
        self._stubs = Stubs(self._channel)
        self._policy = policy

    def unary(self, call: Call[ResultT], timeout: float, upload: Upload | None = None) -> ResultT:
        """Send `call` and return its result; `upload` is its request where that is a stream.

        Raises:
            LoraplexClientError: when the call fails.
        """
        attempts = attempts_of(call, self._policy, timeout)
        method = call.method(self._stubs)
        while True:
            request = call.request if upload is None else iter(upload)
            try:
                return call.parse(method(request, timeout=attempts.remaining_s(), metadata=call.metadata))
            except grpc.RpcError as error:
                if upload is not None and upload.failure is not None:
                    raise upload.failure from error
                repeatable = upload is None or upload.repeatable
                time.sleep(wait_or_raise(error, attempts, call.request_id, repeatable=repeatable))

    def opener(self, call: Call[ResultT], timeout: float) -> tuple[Start, Attempts]:
        """Return what a stream needs: how to send `call`, and its tries."""
        attempts = attempts_of(call, self._policy, timeout)
        method = call.method(self._stubs)
        return lambda left: method(call.request, timeout=left, metadata=call.metadata), attempts

    def close(self) -> None:
        """Close the channel; calls that still run are cancelled."""
        self._channel.close()
