"""The asyncio side of the engine: hands requests to the engine thread and its outputs to whoever waits for them.

Knows asyncio and the engine's messages; nothing about gRPC.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from itertools import count

from loraplex.server.engine.commands import (
    AbortRequest,
    AddRequest,
    ForgetAdapter,
    PinAdapter,
    Stop,
    UnpinAdapter,
)
from loraplex.server.engine.engine import Engine, Publish
from loraplex.server.engine.request import GenerationRequest, RequestOutput
from loraplex.server.errors import EngineError, UnavailableError

logger = logging.getLogger(__name__)


class EngineClient:
    """Runs an engine on a thread of its own and gives each request its stream of outputs.

    Make it, and call its coroutines, on one event loop.
    """

    def __init__(self, make_engine: Callable[[Publish], Engine]) -> None:
        self._loop = asyncio.get_running_loop()
        self._streams: dict[str, asyncio.Queue[RequestOutput]] = {}
        self._numbers = count()
        self._closed = False
        self._failure: str | None = None
        self._engine = make_engine(self._publish)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.on_failure: Callable[[], None] = lambda: None
        """Called on the event loop if the engine thread dies."""

    @property
    def resident(self) -> frozenset[str]:
        """Digests of the adapters on the device."""
        return self._engine.resident

    @property
    def active_requests(self) -> int:
        """Requests that have not got their last output."""
        return len(self._streams)

    @property
    def failed(self) -> bool:
        """Whether the engine thread has died."""
        return self._failure is not None

    def start(self) -> None:
        """Start the engine thread."""
        self._thread.start()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[RequestOutput, None]:
        """Yield the outputs of `request`, the last one with `finished` set; leaving the iterator aborts the request.

        Raises:
            UnavailableError: once the client is closed, or the engine has failed.
            LoraplexError: what the engine reports for this request.
        """
        if self._closed or self._failure is not None:
            raise UnavailableError(self._failure or "the server is stopping: it takes no new requests")
        # Callers may repeat an id (a retry does); late outputs of the first must never reach the second.
        request = replace(request, request_id=f"{request.request_id}#{next(self._numbers)}")
        outputs: asyncio.Queue[RequestOutput] = asyncio.Queue()
        self._streams[request.request_id] = outputs
        self._engine.submit(AddRequest(request))
        finished = False
        try:
            while not finished:
                output = await outputs.get()
                finished = output.finished
                if output.error is not None:
                    raise output.error
                yield output
        finally:
            if not finished:
                self._engine.submit(AbortRequest(request.request_id))
            del self._streams[request.request_id]

    def pin(self, digest: str) -> None:
        """Load an adapter and keep it on the device until `unpin`."""
        self._engine.submit(PinAdapter(digest))

    def unpin(self, digest: str) -> None:
        """Let an adapter be evicted again."""
        self._engine.submit(UnpinAdapter(digest))

    def forget(self, digest: str) -> None:
        """Drop an adapter's weights from the device when its last row ends."""
        self._engine.submit(ForgetAdapter(digest))

    async def close(self) -> None:
        """Stop the engine; requests that still run get an UnavailableError."""
        self._closed = True
        self._engine.submit(Stop())
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
            # The outputs of the last step were handed to the loop before the thread ended; let them arrive.
            await asyncio.sleep(0)

    def _run(self) -> None:
        try:
            self._engine.run()
        except Exception as error:
            logger.critical("the engine thread died", exc_info=True)
            message = f"the engine has failed and the server must be restarted: {type(error).__name__}: {error}"
            self._loop.call_soon_threadsafe(self._fail_all, message)

    def _publish(self, outputs: Sequence[RequestOutput]) -> None:
        # One call a step, not one a token: waking the loop costs more than the token.
        self._loop.call_soon_threadsafe(self._deliver, outputs)

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.put_nowait(output)

    def _fail_all(self, message: str) -> None:
        self._failure = message
        for request_id in self._streams:
            self._deliver([RequestOutput(request_id, finished=True, error=EngineError(message))])
        self.on_failure()
