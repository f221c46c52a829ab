"""Statuses: each typed error has its code, clients read the details back, and the trailers stay small."""

from urllib.parse import quote

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from loraplex.server.errors import (
    AlreadyExistsError,
    CancelledError,
    DeadlineError,
    EngineError,
    FieldViolation,
    InvalidRequestError,
    LoraplexError,
    ModelLoadError,
    NotFoundError,
    PreconditionError,
    ResourceExhaustedError,
    UnavailableError,
)
from loraplex.server.rpc.status import MAX_VIOLATIONS, to_status

DETAILS_KEY = "grpc-status-details-bin"
# What grpc-core and most other implementations take of metadata by default.
TRAILER_LIMIT = 8192

# Drawn text is short; repeated, it is long, and a character of it may take many bytes.
texts = st.builds(lambda part, times: part * times, st.text(max_size=20), st.sampled_from([1, 10, 300]))
violations = st.builds(
    lambda found, times: found * times,
    st.lists(st.builds(FieldViolation, texts, texts), min_size=1, max_size=6),
    st.sampled_from([1, 10]),
)


def read(error: LoraplexError) -> tuple[grpc.Status, status_pb2.Status]:
    status = to_status(error)
    ((key, value),) = status.trailing_metadata
    assert key == DETAILS_KEY
    return status, status_pb2.Status.FromString(value)


def detail(message: status_pb2.Status, kind: type) -> object | None:
    for packed in message.details:
        found = kind()
        if packed.Unpack(found):
            return found
    return None


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequestError.of("prompt", "is empty"), grpc.StatusCode.INVALID_ARGUMENT),
        (NotFoundError("no such adapter"), grpc.StatusCode.NOT_FOUND),
        (AlreadyExistsError("taken"), grpc.StatusCode.ALREADY_EXISTS),
        (PreconditionError("does not fit"), grpc.StatusCode.FAILED_PRECONDITION),
        (ResourceExhaustedError("full"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (UnavailableError("stopping"), grpc.StatusCode.UNAVAILABLE),
        (DeadlineError("late"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (CancelledError("gone"), grpc.StatusCode.CANCELLED),
        (ModelLoadError("no config"), grpc.StatusCode.FAILED_PRECONDITION),
        (EngineError("a step failed"), grpc.StatusCode.INTERNAL),
    ],
)
def test_each_error_has_its_code(error: LoraplexError, code: grpc.StatusCode) -> None:
    status, message = read(error)
    assert status.code is code
    assert message.code == code.value[0]
    assert status.details == message.message == str(error)
    info = detail(message, error_details_pb2.ErrorInfo)
    assert isinstance(info, error_details_pb2.ErrorInfo)
    assert info.domain == "loraplex"


def test_a_full_queue_says_when_to_come_back() -> None:
    _, message = read(ResourceExhaustedError("full", retry_after_s=1.5))
    retry = detail(message, error_details_pb2.RetryInfo)
    assert isinstance(retry, error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToMilliseconds() == 1500
    assert detail(read(ResourceExhaustedError("too large"))[1], error_details_pb2.RetryInfo) is None


def test_every_field_is_named() -> None:
    error = InvalidRequestError([FieldViolation("prompt", "is empty"), FieldViolation("sampling.n", "is 0")])
    bad = detail(read(error)[1], error_details_pb2.BadRequest)
    assert isinstance(bad, error_details_pb2.BadRequest)
    assert [(v.field, v.description) for v in bad.field_violations] == [("prompt", "is empty"), ("sampling.n", "is 0")]


def test_a_long_list_is_cut_and_counted() -> None:
    error = PreconditionError("no", [FieldViolation(f"t{i}", "has no place") for i in range(300)], report_id="r1")
    message = read(error)[1]
    failure = detail(message, error_details_pb2.PreconditionFailure)
    info = detail(message, error_details_pb2.ErrorInfo)
    assert isinstance(failure, error_details_pb2.PreconditionFailure)
    assert isinstance(info, error_details_pb2.ErrorInfo)
    assert len(failure.violations) == MAX_VIOLATIONS
    assert failure.violations[0].subject == "t0"
    assert dict(info.metadata) == {"violation_count": "300", "report_id": "r1"}


def test_names_of_files_that_are_no_text_are_told() -> None:
    _, message = read(InvalidRequestError.of("path", "caf\udce9 is not a folder"))
    assert message.message == "path: caf? is not a folder"


@given(texts, violations, st.sampled_from([InvalidRequestError, PreconditionError]))
def test_trailers_stay_small_whatever_the_text(text: str, found: list[FieldViolation], kind: type) -> None:
    error = InvalidRequestError(found) if kind is InvalidRequestError else PreconditionError(text, found, "r" * 32)
    status = to_status(error)
    ((_, details),) = status.trailing_metadata
    # grpc-message is percent-encoded, a -bin value base64.
    assert len(quote(status.details)) + len(details) * 4 / 3 < TRAILER_LIMIT
