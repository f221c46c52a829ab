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
    AdapterForgotten,
    AddRequest,
    ForgetAdapter,
    PinAdapter,
    Stop,
    UnpinAdapter,
)
from loraplex.server.engine.engine import Engine, EngineOutput, Publish
from loraplex.server.engine.request import GenerationRequest, RequestOutput
from loraplex.server.engine.stats import AdapterMemory, FreedMemory
from loraplex.server.errors import EngineError, UnavailableError

logger = logging.getLogger(__name__)


class EngineClient:
    """Runs an engine on a thread of its own and gives each request its stream of outputs.

    Make it, and call its coroutines, on one event loop.
    """

    def __init__(self, make_engine: Callable[[Publish], Engine]) -> None:
        self._loop = asyncio.get_running_loop()
        self._streams: dict[str, asyncio.Queue[RequestOutput]] = {}
        self._forgetting: dict[int, asyncio.Future[FreedMemory]] = {}
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
    def held(self) -> frozenset[str]:
        """Digests of the adapters on the device or in the host's memory."""
        return self._engine.held

    def memory(self, digest: str) -> AdapterMemory:
        """Return what an adapter takes of the memory's budgets now; zeros if it is only on the disk."""
        return self._engine.memory(digest)

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

    def forget(self, digest: str) -> asyncio.Future[FreedMemory]:
        """Drop an adapter's weights from device and host memory when its last request ends; it goes in any case.

        The result, which need not be awaited, says what came free. It is zeros for what was not there, if a pin came
        meanwhile (the adapter has a name again), and once the engine has ended.
        """
        freed = self._loop.create_future()
        if self._closed or self._failure is not None:
            freed.set_result(FreedMemory())
            return freed
        ticket = next(self._numbers)
        self._forgetting[ticket] = freed
        self._engine.submit(ForgetAdapter(digest, ticket))
        return freed

    async def close(self) -> None:
        """Stop the engine; requests that still run get an UnavailableError."""
        self._closed = True
        self._engine.submit(Stop())
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
            # The outputs of the last step were handed to the loop before the thread ended; let them arrive.
            await asyncio.sleep(0)
        self._resolve_all()

    def _run(self) -> None:
        try:
            self._engine.run()
        except Exception as error:
            logger.critical("the engine thread died", exc_info=True)
            message = f"the engine has failed and the server must be restarted: {type(error).__name__}: {error}"
            self._loop.call_soon_threadsafe(self._fail_all, message)

    def _publish(self, outputs: Sequence[EngineOutput]) -> None:
        # One call a step, not one a token: waking the loop costs more than the token.
        self._loop.call_soon_threadsafe(self._deliver, outputs)

    def _deliver(self, outputs: Sequence[EngineOutput]) -> None:
        for output in outputs:
            if isinstance(output, AdapterForgotten):
                self._resolve(output.ticket, output.freed)
            elif (stream := self._streams.get(output.request_id)) is not None:
                stream.put_nowait(output)

    def _resolve(self, ticket: int, freed: FreedMemory) -> None:
        future = self._forgetting.pop(ticket)
        if not future.done():  # whoever asked may have gone
            future.set_result(freed)

    def _resolve_all(self) -> None:
        for ticket in tuple(self._forgetting):
            self._resolve(ticket, FreedMemory())

    def _fail_all(self, message: str) -> None:
        self._failure = message
        for request_id in self._streams:
            self._deliver([RequestOutput(request_id, finished=True, error=EngineError(message))])
        self._resolve_all()
        self.on_failure()
