"""`loraplex adapter alias` and `rollback`: names for one adapter, or for several with weights."""

from __future__ import annotations

from typing import Annotated

import typer

from loraplex.cli.adapter_options import read_weights
from loraplex.cli.connection import DEFAULT_SERVER, JsonOption, ServerOption, connect


def alias(
    alias: Annotated[str, typer.Argument(help="The alias to make, move or delete.")],
    targets: Annotated[
        list[str] | None, typer.Argument(help="NAME or NAME@VERSION; several with weights: a@1=9 a@2=1")
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Take the alias away.")] = False,
    as_json: JsonOption = False,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Point an alias at a registered name, or at several with weights, in one step; or take it away."""
    from loraplex.cli.adapter_text import targets_text
    from loraplex.cli.output import print_json
    from loraplex.client import AliasTarget

    if delete == bool(targets):
        raise typer.BadParameter("give either targets or --delete", param_hint="TARGETS")
    weights = read_weights(targets or [])
    with connect(server) as client:
        if delete:
            client.delete_alias(alias)
            typer.echo(f"deleted the alias {alias}")
            return
        before = client.set_alias(alias, weights)
    now = [AliasTarget(name, weight) for name, weight in weights.items()]
    if as_json:
        print_json({"alias": alias, "targets": now, "previous_targets": before})
    else:
        typer.echo(f"{alias} -> {targets_text(now)}" + (f" (before: {targets_text(before)})" if before else ""))


def rollback(
    alias: Annotated[str, typer.Argument(help="The alias whose last change is taken back.")],
    as_json: JsonOption = False,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Point an alias at what it pointed at before; a second time undoes the first."""
    from loraplex.cli.adapter_text import targets_text
    from loraplex.cli.output import print_json

    with connect(server) as client:
        targets = client.rollback_alias(alias)
    if as_json:
        print_json({"alias": alias, "targets": targets})
    else:
        typer.echo(f"{alias} -> {targets_text(targets)}")
