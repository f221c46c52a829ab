"""Sizes in bytes as people write them: 512MiB, 1.5GB, 4096."""

from __future__ import annotations

import re

import typer

_UNITS: dict[str, int] = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("", 1024), ("ib", 1024), ("b", 1000))
}
_NAMES = ("B", "KiB", "MiB", "GiB", "TiB")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


def parse_size(text: str, option: str) -> int:
    """Return the bytes that `text` says: a number and a unit.

    KiB, MiB, GiB and TiB count by 1024, and so do K, M, G and T; kB, MB, GB and TB count by 1000.

    Raises:
        typer.BadParameter: naming `option`, if `text` is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = match and _UNITS.get(match[2].lower())
    if not match or not unit:
        raise typer.BadParameter(f"{text!r} is not a size; examples: 512MiB, 1.5GiB, 4096", param_hint=option)
    return round(float(match[1]) * unit)


def format_size(size: int) -> str:
    """Return `size` bytes in the largest unit that leaves at least 1, with at most one digit after the point."""
    power = min((max(size, 1).bit_length() - 1) // 10, len(_NAMES) - 1)
    return f"{size / 1024**power:.1f}".removesuffix(".0") + _NAMES[power]
