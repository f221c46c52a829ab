"""The typed errors that a caller meets, read from a gRPC status and its `google.rpc` details.

They mirror the server's errors by name; the server's own classes are not imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_status import rpc_status

REQUEST_ID_KEY = "x-request-id"
ERROR_DOMAIN = "loraplex"


@dataclass(frozen=True)
class FieldViolation:
    """One field of a request, or one part of an adapter, and what is wrong with it."""

    field: str
    description: str


@dataclass(frozen=True)
class ErrorDetails:
    """What a status carries beside code and message.

    `violations` may be shortened by the server: `violation_count` counts all of them, and `report_id` names the stored
    report (`get_bind_report`). `retry_after_s` is None where the server did not say that a retry helps.
    """

    violations: tuple[FieldViolation, ...] = ()
    violation_count: int = 0
    report_id: str = ""
    retry_after_s: float | None = None
    reason: str = ""


class LoraplexClientError(Exception):
    """Base of the typed errors, and the error for codes that have no class of their own; `str(error)` is its message.

    Attributes:
        message: what went wrong, for people.
        code: the gRPC status code.
        request_id: of the failed call; the server's log carries it too.
        reason: a constant for programs, from the server's ErrorInfo; may be empty.
    """

    default_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        code: grpc.StatusCode | None = None,
        request_id: str = "",
        details: ErrorDetails | None = None,
    ) -> None:
        """Keep what the status said; `code` defaults to the class's own."""
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.request_id = request_id
        self.details = details or ErrorDetails()

    @property
    def reason(self) -> str:
        """The reason in the server's ErrorInfo."""
        return self.details.reason


class InvalidRequestError(LoraplexClientError, ValueError):
    """A request that can never succeed as it is: one or more fields are wrong."""

    default_code = grpc.StatusCode.INVALID_ARGUMENT

    @classmethod
    def of(cls, field: str, description: str) -> InvalidRequestError:
        """Return the error for a single field, found wrong before anything was sent."""
        details = ErrorDetails(violations=(FieldViolation(field, description),), violation_count=1)
        return cls(f"{field}: {description}", details=details)

    @property
    def violations(self) -> tuple[FieldViolation, ...]:
        """The fields that are wrong."""
        return self.details.violations


class NotFoundError(LoraplexClientError, LookupError):
    """No adapter, alias or report of that name."""

    default_code = grpc.StatusCode.NOT_FOUND


class AlreadyExistsError(LoraplexClientError):
    """The name, alias or output folder is taken by something else."""

    default_code = grpc.StatusCode.ALREADY_EXISTS


class PreconditionError(LoraplexClientError):
    """The server is not in the state that the call needs: an adapter that does not fit, exports that are off."""

    default_code = grpc.StatusCode.FAILED_PRECONDITION

    @property
    def violations(self) -> tuple[FieldViolation, ...]:
        """The findings, at most 20 of `violation_count`."""
        return self.details.violations

    @property
    def violation_count(self) -> int:
        """How many findings there are in all."""
        return self.details.violation_count

    @property
    def report_id(self) -> str:
        """Names the whole report, for `get_bind_report`; empty if there is none."""
        return self.details.report_id


class ResourceExhaustedError(LoraplexClientError):
    """A queue or a budget is full, or a message is too large."""

    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED

    @property
    def retry_after_s(self) -> float | None:
        """Seconds after which a retry makes sense; None if it does not."""
        return self.details.retry_after_s


class UnavailableError(LoraplexClientError):
    """No server there, or it is starting or draining."""

    default_code = grpc.StatusCode.UNAVAILABLE


class DeadlineError(LoraplexClientError, TimeoutError):
    """The timeout passed before the answer was complete."""

    default_code = grpc.StatusCode.DEADLINE_EXCEEDED


class CancelledError(LoraplexClientError):
    """The call was cancelled: by the server, or by closing it while another thread or task waited for it."""

    default_code = grpc.StatusCode.CANCELLED


class InternalError(LoraplexClientError):
    """The server failed for a reason that is its own."""

    default_code = grpc.StatusCode.INTERNAL


_BY_CODE: Mapping[grpc.StatusCode, type[LoraplexClientError]] = {
    kind.default_code: kind
    for kind in (
        InvalidRequestError,
        NotFoundError,
        AlreadyExistsError,
        PreconditionError,
        ResourceExhaustedError,
        UnavailableError,
        DeadlineError,
        CancelledError,
        InternalError,
    )
} | {
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequestError,
    grpc.StatusCode.UNKNOWN: InternalError,
    grpc.StatusCode.DATA_LOSS: InternalError,
}


def error_from_rpc(error: grpc.RpcError, request_id: str = "") -> LoraplexClientError:
    """Return the typed error for a failed call, sync or asyncio.

    `request_id` is what the client sent; the server's own, where it answered one, goes before it.
    """
    code = error.code()
    kind = _BY_CODE.get(code, LoraplexClientError)
    trailers: Any = error.trailing_metadata() or ()
    request_id = next((value for key, value in trailers if key == REQUEST_ID_KEY and value), request_id)
    message = error.details() or code.name.lower().replace("_", " ")
    return kind(message, code, request_id, _details(error))


def _details(error: grpc.RpcError) -> ErrorDetails:
    """Read the details in the trailers; whatever cannot be read there is left out, the code and message stay."""
    try:
        status = rpc_status.from_call(cast(grpc.Call, error))
        return parse_details(status.details) if status is not None else ErrorDetails()
    except (ValueError, DecodeError):
        return ErrorDetails()


def parse_details(details: Iterable[Any]) -> ErrorDetails:
    """Return what the packed `google.protobuf.Any` messages of a `google.rpc.Status` say.

    Raises:
        DecodeError: if one of them is damaged.
    """
    violations: list[FieldViolation] = []
    metadata: dict[str, str] = {}
    reason, retry_after_s = "", None
    for detail in details:
        if bad_request := _unpack(detail, error_details_pb2.BadRequest):
            violations += [FieldViolation(v.field, v.description) for v in bad_request.field_violations]
        elif precondition := _unpack(detail, error_details_pb2.PreconditionFailure):
            violations += [FieldViolation(v.subject, v.description) for v in precondition.violations]
        elif retry := _unpack(detail, error_details_pb2.RetryInfo):
            retry_after_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
        elif (info := _unpack(detail, error_details_pb2.ErrorInfo)) and info.domain == ERROR_DOMAIN:
            reason, metadata = info.reason, dict(info.metadata)
    count = _count(metadata.get("violation_count", ""), violations)
    return ErrorDetails(tuple(violations), count, metadata.get("report_id", ""), retry_after_s, reason)


def _unpack(detail: Any, kind: Any) -> Any:
    """Return `detail` as a message of class `kind`, or None if it is another one."""
    message = kind()
    return message if detail.Unpack(message) else None


def _count(text: str, violations: Sequence[FieldViolation]) -> int:
    return max(int(text), len(violations)) if text.isdecimal() else len(violations)
