"""`loraplex adapter ...`: what is registered on a server, and changes to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraplex.cli.connection import DEFAULT_SERVER, JsonOption, ServerOption, connect
from loraplex.cli.sizes import format_size

if TYPE_CHECKING:
    from loraplex.client import Adapter, AliasTarget, Registration

app = typer.Typer(help="Register adapters on a running server and look after them.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(help="Adapter name.")]
DescriptionOption = Annotated[str, typer.Option(help="What the adapter is for.")]


@app.command()
def register(
    name: NameArgument,
    path: Annotated[Path, typer.Argument(help="The adapter's folder, on the server.")],
    description: DescriptionOption = "",
    as_json: JsonOption = False,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Register a folder on the server, below one of its adapter roots.

    A relative path to a folder that is here too is made absolute; any other is sent as it is.
    """
    with connect(server) as client:
        registration = client.register_adapter(name, path.resolve() if path.is_dir() else path, description)
    _show_registration(registration, as_json)


@app.command()
def upload(
    name: NameArgument,
    folder: Annotated[
        Path, typer.Argument(help="The adapter's folder, on this machine.", exists=True, file_okay=False)
    ],
    description: DescriptionOption = "",
    as_json: JsonOption = False,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Send an adapter's files to the server and register them."""
    from loraplex.cli.output import progress_bar
    from loraplex.client import UploadProgress

    with connect(server) as client, progress_bar(f"Uploading {name}", of_bytes=True) as (bar, task):

        def show(state: UploadProgress) -> None:
            bar.update(task, completed=state.bytes_sent, total=state.bytes_total)

        registration = client.upload_adapter(name, folder, description, progress=show)
    _show_registration(registration, as_json)


@app.command()
def download(
    name: NameArgument,
    folder: Annotated[Path, typer.Argument(help="A new folder, on this machine.")],
    as_json: JsonOption = False,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Write an adapter's files, as the server has them, into a new folder."""
    from loraplex.cli.output import print_json, progress_bar
    from loraplex.client import DownloadProgress

    with connect(server) as client, progress_bar(f"Downloading {name}", of_bytes=True) as (bar, task):

        def show(state: DownloadProgress) -> None:
            bar.update(task, completed=state.bytes_received, total=state.bytes_total)

        downloaded = client.download_adapter(name, folder, progress=show)
    if as_json:
        print_json(downloaded)
    else:
        typer.echo(f"downloaded {name} ({downloaded.digest}) to {downloaded.folder}")


@app.command("list")
def list_(
    contains: Annotated[str, typer.Option(help="Only names with this text in them.")] = "",
    as_json: JsonOption = False,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """List the registered adapters."""
    from loraplex.cli.output import print_json, to_stdout

    with connect(server) as client:
        adapters = client.list_adapters(contains)
    if as_json:
        print_json(adapters)
    elif not adapters:
        typer.echo("no adapters", err=True)
    else:
        to_stdout().print(_table(adapters))


@app.command()
def show(name: NameArgument, as_json: JsonOption = False, server: ServerOption = DEFAULT_SERVER) -> None:
    """Show one adapter, by name, alias or name@sha256:..."""
    from loraplex.cli.output import print_json

    with connect(server) as client:
        adapter = client.get_adapter(name)
    if as_json:
        print_json(adapter)
        return
    for label, value in (
        ("name", adapter.name),
        ("digest", adapter.digest),
        ("description", adapter.description),
        ("rank", adapter.rank),
        ("target modules", ", ".join(adapter.target_modules)),
        ("size", format_size(adapter.size_bytes)),
        ("registered", adapter.created_at.isoformat(sep=" ", timespec="seconds")),
        ("state", _state(adapter)),
        ("active requests", adapter.active_requests),
        ("aliases", ", ".join(adapter.aliases)),
    ):
        typer.echo(f"{label:<16} {value}")


@app.command()
def update(name: NameArgument, description: DescriptionOption, server: ServerOption = DEFAULT_SERVER) -> None:
    """Change an adapter's description."""
    with connect(server) as client:
        client.update_adapter(name, description=description)


@app.command()
def unregister(
    names: Annotated[list[str], typer.Argument(help="Adapter names.")], server: ServerOption = DEFAULT_SERVER
) -> None:
    """Take names away at once; requests in flight finish on the version they started with."""
    with connect(server) as client:
        for name in names:
            gone = client.unregister_adapter(name)
            typer.echo(f"unregistered {name} ({gone.digest}); {gone.active_requests} requests still run on it")


@app.command()
def pin(name: NameArgument, server: ServerOption = DEFAULT_SERVER) -> None:
    """Keep an adapter's weights on the device."""
    with connect(server) as client:
        adapter = client.pin_adapter(name)
    typer.echo(f"pinned {adapter.name} ({adapter.digest})")


@app.command()
def unpin(name: NameArgument, server: ServerOption = DEFAULT_SERVER) -> None:
    """Let an adapter's weights be evicted again."""
    with connect(server) as client:
        adapter = client.unpin_adapter(name)
    typer.echo(f"unpinned {adapter.name} ({adapter.digest})")


@app.command()
def alias(
    alias: Annotated[str, typer.Argument(help="The alias to make, move or delete.")],
    targets: Annotated[
        list[str] | None, typer.Argument(help="What it points at: NAME, NAME@VERSION, or several as TARGET=WEIGHT.")
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Take the alias away.")] = False,
    rollback: Annotated[bool, typer.Option("--rollback", help="Undo its last change.")] = False,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Point an alias at a registered name, or at several with weights, in one step; or take it away."""
    from loraplex.client import AliasTarget

    if delete + rollback + bool(targets) != 1:
        raise typer.BadParameter("give either targets, --delete or --rollback", param_hint="TARGETS")
    with connect(server) as client:
        if delete:
            client.delete_alias(alias)
            typer.echo(f"deleted the alias {alias}")
        elif rollback:
            typer.echo(f"{alias} -> {_targets_text(client.rollback_alias(alias))}")
        else:
            weights = _weights(targets or [])
            before = client.set_alias(alias, weights)
            now = _targets_text([AliasTarget(name, weight) for name, weight in weights.items()])
            typer.echo(f"{alias} -> {now}" + (f" (before: {_targets_text(before)})" if before else ""))


@app.command()
def report(
    report_id: Annotated[str, typer.Argument(help="The id that a refused registration gave.")],
    as_json: JsonOption = False,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Show why an adapter does not fit the base model, tensor by tensor."""
    from loraplex.cli.output import print_json

    with connect(server) as client:
        found = client.get_bind_report(report_id)
    if as_json:
        print_json(found)
        return
    for entry in found.problems:
        typer.echo(f"{entry.subject}: {entry.problem}")
    typer.echo(f"{len(found.problems)} of {len(found.entries)} entries do not fit {found.base_fingerprint}", err=True)


def _weights(targets: list[str]) -> dict[str, float]:
    """Read `name` or `name=weight`."""
    weights: dict[str, float] = {}
    for target in targets:
        name, _, weight = target.partition("=")
        try:
            weights[name] = float(weight or 1)
        except ValueError as error:
            raise typer.BadParameter(f"{weight!r} is not a number", param_hint="TARGETS") from error
    return weights


def _targets_text(targets: Sequence[AliasTarget]) -> str:
    """Return targets with their shares, which a single one does not need."""
    if len(targets) == 1:
        return targets[0].name
    total = sum(target.weight for target in targets)
    return ", ".join(f"{target.name} ({target.weight / total:.1%})" for target in targets)


def _show_registration(registration: Registration, as_json: bool) -> None:
    from loraplex.cli.output import print_json

    if as_json:
        print_json(registration)
        return
    adapter, before = registration.adapter, registration.previous_digest
    again = f", before: {before}" if before and before != adapter.digest else ""
    typer.echo(f"registered {adapter.name} ({adapter.digest}, rank {adapter.rank}{again})")


def _state(adapter: Adapter) -> str:
    """Return where the weights are; a pinned adapter may still be on its way to the device."""
    if adapter.pinned:
        return "pinned" if adapter.resident else "pinned, loading"
    return "resident" if adapter.resident else "stored"


def _table(adapters: list[Adapter]) -> object:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    # Folded, not cut off: names are typed in again.
    for column in ("name", "aliases", "description"):
        table.add_column(column, overflow="fold", min_width=10)
    for column in ("digest", "rank", "size", "state", "active"):
        table.add_column(column, no_wrap=True)
    for adapter in adapters:
        table.add_row(
            escape(adapter.name),
            escape(", ".join(adapter.aliases)),
            escape(adapter.description),
            adapter.digest.removeprefix("sha256:")[:8],
            str(adapter.rank),
            format_size(adapter.size_bytes),
            _state(adapter),
            str(adapter.active_requests),
        )
    return table
