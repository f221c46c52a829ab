"""From typed errors to gRPC status with details.

The one place that knows both. Details follow google.rpc: BadRequest, PreconditionFailure, RetryInfo and ErrorInfo.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar
from urllib.parse import quote

import grpc
from google.protobuf import any_pb2, message
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from loraplex.server.errors import (
    AlreadyExistsError,
    CancelledError,
    DeadlineError,
    FieldViolation,
    InvalidRequestError,
    LoraplexError,
    ModelLoadError,
    NotFoundError,
    PreconditionError,
    ResourceExhaustedError,
    UnavailableError,
)

M = TypeVar("M", bound=message.Message)

DOMAIN = "loraplex"
MAX_VIOLATIONS = 20
# gRPC implementations commonly refuse trailers over 8 KB; ours stay well below, details and message together.
MAX_DETAIL_BYTES = 4000
MAX_MESSAGE_CHARACTERS = 1000
# The message also travels percent-encoded, where a character can take twelve bytes.
MAX_ENCODED_MESSAGE_BYTES = 2000

# The first match counts, so a subclass stands before its base.
_CODES: tuple[tuple[type[LoraplexError], grpc.StatusCode, str], ...] = (
    (InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    (NotFoundError, grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
    (AlreadyExistsError, grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS"),
    (PreconditionError, grpc.StatusCode.FAILED_PRECONDITION, "PRECONDITION"),
    (ResourceExhaustedError, grpc.StatusCode.RESOURCE_EXHAUSTED, "RESOURCE_EXHAUSTED"),
    (UnavailableError, grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE"),
    (DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE"),
    (CancelledError, grpc.StatusCode.CANCELLED, "CANCELLED"),
    (ModelLoadError, grpc.StatusCode.FAILED_PRECONDITION, "MODEL_LOAD"),
)


def to_status(error: LoraplexError) -> grpc.Status:
    """Return the status, with details in the trailers, that tells a client what `error` says."""
    code, reason = _code_of(error)
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)
    details: list[message.Message] = [info]
    text = str(error)
    if isinstance(error, InvalidRequestError):
        details.append(_bad_request(error.violations))
    elif isinstance(error, PreconditionError):
        info.metadata["violation_count"] = str(len(error.violations))
        if error.report_id:
            info.metadata["report_id"] = error.report_id
        if error.violations:
            details.append(_precondition_failure(error.violations, "BIND" if error.report_id else "STATE"))
    elif isinstance(error, ResourceExhaustedError) and error.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=code.value[0], message=_short_message(text), details=[_any(d) for d in details])
    return rpc_status.to_status(status)


def _code_of(error: LoraplexError) -> tuple[grpc.StatusCode, str]:
    for kind, code, reason in _CODES:
        if isinstance(error, kind):
            return code, reason
    return grpc.StatusCode.INTERNAL, type(error).__name__


def _bad_request(violations: Sequence[FieldViolation]) -> error_details_pb2.BadRequest:
    fields = [
        error_details_pb2.BadRequest.FieldViolation(field=_shorten(v.field, 200), description=_shorten(v.description))
        for v in violations
    ]
    return error_details_pb2.BadRequest(field_violations=_fitting(fields))


def _precondition_failure(violations: Sequence[FieldViolation], kind: str) -> error_details_pb2.PreconditionFailure:
    found = [
        error_details_pb2.PreconditionFailure.Violation(
            type=kind, subject=_shorten(v.field, 200), description=_shorten(v.description)
        )
        for v in violations
    ]
    return error_details_pb2.PreconditionFailure(violations=_fitting(found))


def _fitting(entries: Sequence[M]) -> list[M]:
    """Return the first entries, as many as the trailers may carry; the whole list is in the bind report."""
    kept: list[M] = []
    size = 0
    for entry in entries[:MAX_VIOLATIONS]:
        size += entry.ByteSize() + 8
        if size > MAX_DETAIL_BYTES - 1500:  # the message, which is repeated outside, and the other details
            break
        kept.append(entry)
    return kept


def _shorten(text: str, limit: int = 300) -> str:
    # Names of files may hold bytes that are no text, which protobuf refuses.
    text = text.encode(errors="replace").decode()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _short_message(text: str) -> str:
    """Return as much of `text` as the trailers may carry."""
    text = _shorten(text, MAX_MESSAGE_CHARACTERS)
    while (size := len(quote(text))) > MAX_ENCODED_MESSAGE_BYTES:
        text = _shorten(text, max(1, len(text) * MAX_ENCODED_MESSAGE_BYTES // size - 2))
    return text


def _any(detail: message.Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
