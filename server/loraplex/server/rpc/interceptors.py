"""One interceptor: typed errors become gRPC statuses, every call has a request id, and the log tells how it ended.

It also knows which calls are running, so that a server which stops can wait for them and take no new ones.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import grpc
import grpc.aio

from loraplex.server.errors import EngineError, InvalidRequestError, LoraplexError, UnavailableError
from loraplex.server.rpc.status import to_status

logger = logging.getLogger(__name__)

REQUEST_ID_KEY = "x-request-id"
ADAPTER_DIGEST_KEY = "x-loraplex-adapter-digest"
MAX_REQUEST_ID = 128

current_request_id: ContextVar[str] = ContextVar("current_request_id")
"""The id of the call that runs in this context."""

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context = grpc.aio.ServicerContext[Any, Any]


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps every handler of loraplex.v1; leaves health and reflection alone."""

    def __init__(self) -> None:
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Return the wrapped handler of the method that is called."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith("/loraplex.v1."):
            return handler
        serializers = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        given_id = _metadata_id(handler_call_details)
        if handler.unary_unary:
            wrapped = self._unary(handler.unary_unary, method, given_id)
            return grpc.unary_unary_rpc_method_handler(wrapped, **serializers)
        if handler.unary_stream:
            stream = self._stream(handler.unary_stream, method, given_id)
            return grpc.unary_stream_rpc_method_handler(stream, **serializers)
        if handler.stream_unary:
            wrapped = self._unary(handler.stream_unary, method, given_id)
            return grpc.stream_unary_rpc_method_handler(wrapped, **serializers)
        return handler

    async def drain(self, grace_s: float) -> bool:
        """Refuse new calls and wait up to `grace_s` seconds for the running ones; return whether all ended."""
        self._draining = True
        if not self._running:
            return True
        try:
            await asyncio.wait_for(self._idle.wait(), grace_s)
        except TimeoutError:
            logger.warning("%d calls did not end within the grace time of %g s", self._running, grace_s)
            return False
        return True

    def _unary(self, inner: Any, method: str, given_id: str) -> Callable[[Any, Context], Awaitable[Any]]:
        async def call(request: Any, context: Context) -> Any:
            begin = time.monotonic()
            with self._counted():
                try:
                    self._begin(request, context, given_id)
                    response = await inner(request, context)
                except Exception as error:
                    await _abort(error, context, method, begin)
                _log_end(method, "OK", begin)
                return response

        return call

    def _stream(self, inner: Any, method: str, given_id: str) -> Callable[[Any, Context], Any]:
        # A coroutine that writes, not a generator: gRPC leaves the generator of a caller who went away to the garbage
        # collector, while a coroutine is cancelled where it waits and frees what it holds at once.
        async def call(request: Any, context: Context) -> None:
            begin = time.monotonic()
            with self._counted():
                try:
                    self._begin(request, context, given_id)
                    async with aclosing(inner(request, context)) as responses:
                        async for response in responses:
                            await context.write(response)
                except Exception as error:
                    await _abort(error, context, method, begin)
                _log_end(method, "OK", begin)

        return call

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    def _begin(self, request: Any, context: Context, given_id: str) -> None:
        """Give the call its id: the request's, else the metadata's, else a new one.

        Raises:
            InvalidRequestError: if the request's id cannot be sent back.
            UnavailableError: while the server drains.
        """
        chosen = str(getattr(request, "request_id", ""))
        usable = _is_request_id(chosen)
        request_id = chosen if usable else given_id or uuid.uuid4().hex
        current_request_id.set(request_id)
        context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))
        if chosen and not usable:
            # Trailing metadata that is no printable ASCII would break the call, with or without an answer.
            raise InvalidRequestError.of("request_id", f"takes at most {MAX_REQUEST_ID} printable ASCII characters")
        if self._draining:
            raise UnavailableError("the server is stopping: it takes no new requests; try another or try again later")


def _metadata_id(details: grpc.HandlerCallDetails) -> str:
    for key, value in details.invocation_metadata or ():
        if key == REQUEST_ID_KEY and isinstance(value, str):
            return value if _is_request_id(value) else ""
    return ""


def _is_request_id(text: str) -> bool:
    return 0 < len(text) <= MAX_REQUEST_ID and text.isascii() and text.isprintable()


async def _abort(error: Exception, context: Context, method: str, begin: float) -> None:
    """End the call with the status of `error`; never returns, because aborting raises.

    Raises:
        grpc.aio.AbortError: always; an error that was aborted already is passed on.
    """
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if context.cancelled():
        # Nobody listens any more, and gRPC refuses to abort a call that has ended.
        _log_end(method, "CANCELLED", begin, str(error))
        raise error
    if not isinstance(error, LoraplexError):
        logger.error("%s failed (request %s)", method, current_request_id.get(), exc_info=error)
        error = EngineError(f"{type(error).__name__} in the server; its log has the details")
    status = to_status(error)
    _log_end(method, status.code.name, begin, str(error))
    # Aborting replaces the trailers that were set, so the request id is added to those of the status.
    trailers = (*(status.trailing_metadata or ()), (REQUEST_ID_KEY, current_request_id.get()))
    await context.abort(status.code, status.details, trailers)


def _log_end(method: str, code: str, begin: float, problem: str = "") -> None:
    level = logging.DEBUG if code == "OK" else logging.INFO
    logger.log(
        level,
        "%s %s in %.3f s (request %s)%s",
        method.rsplit("/", 1)[-1],
        code,
        time.monotonic() - begin,
        current_request_id.get(),
        f": {problem}" if problem else "",
    )
