"""Errors travel between processes whole."""

from __future__ import annotations

import pickle

import pytest

from loraplex.adapters.binding import BindEntry, BindError, BindReport
from loraplex.adapters.errors import (
    AdapterFormatError,
    AlreadyExistsError,
    CorruptStoreError,
    FieldViolation,
    InvalidRequestError,
    LoraplexError,
    NotFoundError,
    PreconditionError,
    ResourceExhaustedError,
)

VIOLATIONS = [FieldViolation(f"field {i}", "is wrong") for i in range(5)]


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequestError(VIOLATIONS),
        NotFoundError("no"),
        AlreadyExistsError("taken"),
        PreconditionError("state", VIOLATIONS, "report"),
        AdapterFormatError("format", VIOLATIONS, "report"),
        BindError(BindReport("f", tuple(BindEntry(v.field, problem="p") for v in VIOLATIONS), "report"), "base"),
        ResourceExhaustedError("full", 2.5),
        CorruptStoreError("changed"),
    ],
)
def test_errors_survive_pickling(error: LoraplexError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
