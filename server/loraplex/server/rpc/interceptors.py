"""One interceptor: typed errors become gRPC statuses, every call has a request id, and the log tells how it ended."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any, TypeAlias

import grpc
import grpc.aio

from loraplex.server.errors import EngineError, LoraplexError
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
            return grpc.unary_unary_rpc_method_handler(_unary(handler.unary_unary, method, given_id), **serializers)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(_stream(handler.unary_stream, method, given_id), **serializers)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(_unary(handler.stream_unary, method, given_id), **serializers)
        return handler


def _metadata_id(details: grpc.HandlerCallDetails) -> str:
    for key, value in details.invocation_metadata:
        if key == REQUEST_ID_KEY and isinstance(value, str):
            return value[:MAX_REQUEST_ID]
    return ""


def _unary(inner: Any, method: str, given_id: str) -> Callable[[Any, Context], Awaitable[Any]]:
    async def call(request: Any, context: Context) -> Any:
        begin = _begin(request, context, given_id)
        try:
            response = await inner(request, context)
        except Exception as error:
            await _abort(error, context, method, begin)
        _log_end(method, "OK", begin)
        return response

    return call


def _stream(inner: Any, method: str, given_id: str) -> Callable[[Any, Context], AsyncIterator[Any]]:
    async def call(request: Any, context: Context) -> AsyncIterator[Any]:
        begin = _begin(request, context, given_id)
        try:
            async for response in inner(request, context):
                yield response
        except Exception as error:
            await _abort(error, context, method, begin)
        _log_end(method, "OK", begin)

    return call


def _begin(request: Any, context: Context, given_id: str) -> float:
    request_id = str(getattr(request, "request_id", ""))[:MAX_REQUEST_ID] or given_id or uuid.uuid4().hex
    current_request_id.set(request_id)
    context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))
    return time.monotonic()


async def _abort(error: Exception, context: Context, method: str, begin: float) -> None:
    """End the call with the status of `error`; never returns, because aborting raises.

    Raises:
        grpc.aio.AbortError: always; an error that was aborted already is passed on.
    """
    if isinstance(error, grpc.aio.AbortError):
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
