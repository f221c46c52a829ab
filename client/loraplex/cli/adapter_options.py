"""The options that several `loraplex adapter` commands share, and how their texts are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from loraplex.client import SamplingOptions

NameArgument = Annotated[str, typer.Argument(help="Adapter name, alias, or either with a version (NAME@2).")]
DescriptionOption = Annotated[str, typer.Option(help="What the adapter is for.")]
TagOption = Annotated[list[str] | None, typer.Option("--tag", help="Repeatable.")]
OwnerOption = Annotated[str, typer.Option(help="Whose it is.")]
SamplingOption = Annotated[
    list[str] | None,
    typer.Option(help="What requests that leave it unset get, as temperature=0.7; repeatable."),
]
DigestOption = Annotated[str, typer.Option(help="Refuse anything else than this digest.")]

_LISTS = {"stop": str, "stop_token_ids": int}
_SWITCHES = {"true": True, "false": False}


def read_sampling(texts: list[str] | None) -> SamplingOptions | None:
    """Read `FIELD=VALUE` texts; those of one list field add up.

    Raises:
        typer.BadParameter: for a field that there is not, or a value that it does not take.
    """
    from loraplex.client import SamplingOptions

    if not texts:
        return None
    numbers = {name: kind for name, kind in SamplingOptions.__annotations__.items() if name not in _LISTS}
    values: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            if name in _LISTS:
                values.setdefault(name, []).append(_LISTS[name](value))
            elif "bool" in numbers[name]:
                values[name] = _SWITCHES[value]
            else:
                values[name] = float(value) if "float" in numbers[name] else int(value)
        except (KeyError, ValueError) as error:
            known = ", ".join(SamplingOptions.__annotations__)
            raise typer.BadParameter(f"{text!r}: use FIELD=VALUE with {known}", param_hint="--sampling") from error
    values.update({name: tuple(values[name]) for name in _LISTS.keys() & values.keys()})
    return SamplingOptions(**values)


def read_weights(targets: list[str]) -> dict[str, float]:
    """Read `NAME` or `NAME=WEIGHT` texts.

    Raises:
        typer.BadParameter: for a weight that is no number, or a target named twice.
    """
    weights: dict[str, float] = {}
    for target in targets:
        name, _, weight = target.partition("=")
        if name in weights:
            raise typer.BadParameter(f"{name} is named twice", param_hint="TARGETS")
        try:
            weights[name] = float(weight or 1)
        except ValueError as error:
            raise typer.BadParameter(f"{weight!r} is not a number", param_hint="TARGETS") from error
    return weights
