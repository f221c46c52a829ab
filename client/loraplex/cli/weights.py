"""Adapters with weights as people write them: `sql`, `sql=0.5`."""

from __future__ import annotations

from collections.abc import Sequence

import typer


def parse_weights(adapters: Sequence[str], option: str) -> dict[str, float]:
    """Return name or folder to weight, 1 where none is given. What follows the last `=` is the weight.

    Raises:
        typer.BadParameter: naming `option`, for a weight that is no number, or a name given twice.
    """
    found: dict[str, float] = {}
    for text in adapters:
        name, equals, number = text.rpartition("=")
        weighted = bool(equals and name)
        try:
            weight = float(number) if weighted else 1.0
        except ValueError as error:
            raise typer.BadParameter(f"{number!r} in {text!r} is no weight", param_hint=option) from error
        name = name if weighted else text
        if name in found:
            raise typer.BadParameter(f"{name} is given twice", param_hint=option)
        found[name] = weight
    return found
