"""A row that cannot be trained on, and where it stands."""

from __future__ import annotations

from loraplex.adapters.errors import FieldViolation, InvalidRequestError


class DataError(InvalidRequestError):
    """Training data that cannot be used; the violation's field is the place: file, line, and column if there is one.

    Nothing was written when it is raised: data is read as a whole before training begins.
    """

    @classmethod
    def at(cls, place: str, description: str, column: str = "") -> DataError:
        """Return the error for the row at `place` (file and line), of `column` if it is about one."""
        return cls([FieldViolation(f"{place}, {column}" if column else place, description)])
