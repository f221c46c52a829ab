"""The errors that a caller can cause or meet, each once, with what to do about it.

Shared by adapters and server. Knows nothing about gRPC: the server maps each class to a status code and details.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FieldViolation:
    """One field of a request and what is wrong with it."""

    field: str
    description: str


class LoraplexError(Exception):
    """Base of the typed errors; `str(error)` is the message that the caller reads."""


class InvalidRequestError(LoraplexError, ValueError):
    """A request that can never succeed as it is: one or more fields are wrong."""

    def __init__(self, violations: Sequence[FieldViolation]) -> None:
        """Join `violations` into the message.

        Raises:
            ValueError: if `violations` is empty.
        """
        if not violations:
            raise ValueError("an InvalidRequestError names at least one field")
        self.violations = tuple(violations)
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))

    def __reduce__(self) -> tuple[type[InvalidRequestError], tuple[tuple[FieldViolation, ...]]]:
        """Say how to make it again, so that it can come from another process."""
        return type(self), (self.violations,)

    @classmethod
    def of(cls, field: str, description: str) -> InvalidRequestError:
        """Return the error for a single field."""
        return cls([FieldViolation(field, description)])


class NotFoundError(LoraplexError, LookupError):
    """No adapter, alias or report of that name."""


class AlreadyExistsError(LoraplexError):
    """The name, alias or output folder is taken by something else."""


class PreconditionError(LoraplexError):
    """The system is not in the state the call needs: an adapter that does not fit, exports that are off.

    `violations` holds the findings (all of them; the transport shortens), `report_id` names the stored report.
    """

    def __init__(self, message: str, violations: Sequence[FieldViolation] = (), report_id: str = "") -> None:
        self.violations = tuple(violations)
        self.report_id = report_id
        super().__init__(message)


class ResourceExhaustedError(LoraplexError):
    """The waiting queue or a memory budget is full; worth a retry after `retry_after_s` seconds if that is set."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class AdapterFormatError(PreconditionError):
    """A folder that does not hold an adapter we can serve; `violations` names each file, config key or tensor."""

    def __init__(self, message: str, violations: Sequence[FieldViolation] = (), report_id: str = "") -> None:
        """Put the first three of `violations` behind `message`."""
        shown = [f"{v.field}: {v.description}" for v in violations[:3]]
        if len(violations) > len(shown):
            shown.append(f"and {len(violations) - len(shown)} more")
        super().__init__(": ".join([message, "; ".join(shown)]) if shown else message, violations, report_id)

    @classmethod
    def of(cls, subject: str, description: str) -> AdapterFormatError:
        """Return the error for a single file, key or tensor."""
        return cls("the adapter cannot be used", [FieldViolation(subject, description)])


class CorruptStoreError(LoraplexError):
    """Stored adapter weights that are no longer what their digest says."""


class SourceError(PreconditionError):
    """A place that an adapter was to come from and that cannot be read: no driver, no answer, too much."""
