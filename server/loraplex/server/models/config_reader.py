"""Reads a model's `config.json` strictly: a value of the wrong kind is an error that names it, never a guess.

A missing key has the default of the family, which is that of transformers (a parity test compares the two): importing
transformers' own configuration classes takes about four seconds, half of what starting a server may take.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraplex.server.errors import ModelLoadError


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`.

    Raises:
        ModelLoadError: if the file is missing, unreadable, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelLoadError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ModelLoadError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values


class ConfigReader:
    """Typed access to a configuration with defaults; every method raises ModelLoadError for a value that is wrong."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], where: str = "config.json") -> None:
        self._values = {**defaults, **values}
        self._where = where

    def get(self, key: str) -> Any:
        """Return the value as it is, None where there is none."""
        return self._values.get(key)

    def error(self, key: str, wanted: str) -> ModelLoadError:
        """Return the error that says what `key` should be."""
        return ModelLoadError(f"{self._where}: {key} must be {wanted}, got {self._values.get(key)!r}")

    def integer(self, key: str) -> int:
        """Return a positive integer."""
        value = self._values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(key, "a positive integer")
        return value

    def integer_or(self, key: str, default: int) -> int:
        """Return a positive integer, or `default` where the value is missing or null."""
        return default if self._values.get(key) is None else self.integer(key)

    def number(self, key: str) -> float:
        """Return a positive number."""
        value = self._values.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise self.error(key, "a positive number")
        return float(value)

    def number_or(self, key: str, default: float) -> float:
        """Return a positive number, or `default` where the value is missing or null."""
        return default if self._values.get(key) is None else self.number(key)

    def optional_number(self, key: str) -> float | None:
        """Return a positive number or None."""
        return None if self._values.get(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        """Return true or false; null counts as false."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, "true or false")
        return bool(value)

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """Return a list of `length` positive numbers."""
        value = self._values.get(key)
        if (
            not isinstance(value, list)
            or len(value) != length
            or not all(isinstance(item, int | float) and item > 0 for item in value)
        ):
            raise self.error(key, f"a list of {length} positive numbers")
        return tuple(float(item) for item in value)
