"""`loraplex adapter ...`: what is registered on a server, and changes to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraplex.cli.adapter_alias import alias, rollback
from loraplex.cli.adapter_options import (
    DescriptionOption,
    DigestOption,
    NameArgument,
    OwnerOption,
    SamplingOption,
    TagOption,
    read_sampling,
)
from loraplex.cli.connection import DEFAULT_SERVER, JsonOption, ServerOption, connect

if TYPE_CHECKING:
    from loraplex.client import Registration

app = typer.Typer(help="Register adapters on a running server and look after them.", no_args_is_help=True)

app.command()(alias)
app.command()(rollback)

NewNameArgument = Annotated[str, typer.Argument(help="Adapter name; one that is registered gets a new version.")]


@app.command()
def register(
    name: NewNameArgument,
    source: Annotated[str, typer.Argument(help="The adapter's folder on the server, or a URL (hf://org/repo@main).")],
    description: DescriptionOption = "",
    tag: TagOption = None,
    owner: OwnerOption = "",
    sampling: SamplingOption = None,
    expected_digest: DigestOption = "",
    as_json: JsonOption = False,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Register a folder below one of the server's adapter roots, or a URL below one of its adapter sources.

    A relative path to a folder that is here too is made absolute; any other is sent as it is. What is left out stays as
    an earlier registration of the name left it.
    """
    defaults = read_sampling(sampling)
    if "://" not in source and Path(source).is_dir():
        source = str(Path(source).resolve())
    with connect(server) as client:
        registration = client.register_adapter(
            name,
            source,
            description,
            tags=tag or (),
            owner=owner,
            expected_digest=expected_digest,
            default_sampling=defaults,
        )
    _show_registration(registration, as_json)


@app.command()
def upload(
    name: NewNameArgument,
    folder: Annotated[
        Path, typer.Argument(help="The adapter's folder, on this machine.", exists=True, file_okay=False)
    ],
    description: DescriptionOption = "",
    tag: TagOption = None,
    owner: OwnerOption = "",
    sampling: SamplingOption = None,
    expected_digest: DigestOption = "",
    as_json: JsonOption = False,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Send an adapter's files to the server and register them."""
    from loraplex.cli.output import progress_bar
    from loraplex.client import UploadProgress

    defaults = read_sampling(sampling)
    with connect(server) as client, progress_bar(f"Uploading {name}", of_bytes=True) as (bar, task):

        def show(state: UploadProgress) -> None:
            bar.update(task, completed=state.bytes_sent, total=state.bytes_total)

        registration = client.upload_adapter(
            name,
            folder,
            description,
            progress=show,
            tags=tag or (),
            owner=owner,
            expected_digest=expected_digest,
            default_sampling=defaults,
        )
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
    tag: Annotated[list[str] | None, typer.Option("--tag", help="Only those with this tag; repeatable.")] = None,
    owner: Annotated[str, typer.Option(help="Only this owner's.")] = "",
    as_json: JsonOption = False,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """List the registered adapters."""
    from loraplex.cli.adapter_text import adapter_table
    from loraplex.cli.output import print_json, to_stdout

    with connect(server) as client:
        adapters = client.list_adapters(contains, tags=tag or (), owner=owner)
    if as_json:
        print_json(adapters)
    elif not adapters:
        typer.echo("no adapters", err=True)
    else:
        to_stdout().print(adapter_table(adapters))


@app.command()
def show(name: NameArgument, as_json: JsonOption = False, server: ServerOption = DEFAULT_SERVER) -> None:
    """Show one adapter, and all versions of its name."""
    from loraplex.cli.adapter_text import adapter_lines, version_table
    from loraplex.cli.output import print_json, to_stdout

    with connect(server) as client:
        adapter = client.get_adapter(name)
    if as_json:
        print_json(adapter)
        return
    for line in adapter_lines(adapter):
        typer.echo(line)
    to_stdout().print(version_table(adapter.versions))


@app.command()
def update(
    name: Annotated[str, typer.Argument(help="Adapter name.")],
    description: Annotated[str | None, typer.Option(help="What the adapter is for.")] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="Replaces all tags; repeatable.")] = None,
    no_tags: Annotated[bool, typer.Option("--no-tags", help="Take all tags away.")] = False,
    owner: Annotated[str | None, typer.Option(help="Whose it is.")] = None,
    sampling: Annotated[
        list[str] | None, typer.Option(help="Replaces all sampling defaults, as temperature=0.7; repeatable.")
    ] = None,
    no_sampling: Annotated[bool, typer.Option("--no-sampling", help="Take all sampling defaults away.")] = False,
    as_json: JsonOption = False,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Change what is told about an adapter; what is left out stays."""
    from loraplex.cli.adapter_text import adapter_lines
    from loraplex.cli.output import print_json
    from loraplex.client import SamplingOptions

    if (tag and no_tags) or (sampling and no_sampling):
        raise typer.BadParameter("give new values or take all away, not both")
    defaults = SamplingOptions() if no_sampling else read_sampling(sampling)
    with connect(server) as client:
        adapter = client.update_adapter(
            name,
            description=description,
            tags=[] if no_tags else tag or None,
            owner=owner,
            default_sampling=defaults,
        )
    if as_json:
        print_json(adapter)
        return
    for line in adapter_lines(adapter):
        typer.echo(line)


@app.command()
def unregister(
    names: Annotated[list[str], typer.Argument(help="Adapter names, or versions of them (NAME@2).")],
    drain_timeout: Annotated[
        float | None, typer.Option(min=0, help="Wait for requests that still run, this many seconds at most.")
    ] = None,
    as_json: JsonOption = False,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Take names away at once; requests in flight finish on the version they started with."""
    from loraplex.cli.output import print_json
    from loraplex.cli.sizes import format_size

    with connect(server) as client:
        gone = {
            name: client.unregister_adapter(
                name, drain_timeout_s=drain_timeout, timeout=None if drain_timeout is None else drain_timeout + 60
            )
            for name in names
        }
    if as_json:
        print_json(gone)
        return
    for name, left in gone.items():
        freed = (
            f"{format_size(left.device_bytes_freed)} of device memory, {format_size(left.host_bytes_freed)} of host "
            f"memory and {format_size(left.disk_bytes_freed)} of disk came free"
        )
        running = f"; {left.active_requests} requests still run on it" if left.active_requests else ""
        typer.echo(f"unregistered {name} ({left.digest}); {freed}{running}")


@app.command()
def pin(name: NameArgument, as_json: JsonOption = False, server: ServerOption = DEFAULT_SERVER) -> None:
    """Keep an adapter's weights on the device: a name's whichever version is current, or those of one version."""
    from loraplex.cli.output import print_json

    with connect(server) as client:
        adapter = client.pin_adapter(name)
    if as_json:
        print_json(adapter)
    else:
        typer.echo(f"pinned {adapter.name} ({adapter.digest})")


@app.command()
def unpin(name: NameArgument, as_json: JsonOption = False, server: ServerOption = DEFAULT_SERVER) -> None:
    """Let an adapter's weights be evicted again."""
    from loraplex.cli.output import print_json

    with connect(server) as client:
        adapter = client.unpin_adapter(name)
    if as_json:
        print_json(adapter)
    else:
        typer.echo(f"unpinned {adapter.name} ({adapter.digest})")


@app.command()
def report(
    subject: Annotated[
        str, typer.Argument(help="The id that a refused registration gave, or the name or digest of an adapter.")
    ],
    as_json: JsonOption = False,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Show why an adapter does not fit the base model, or where each tensor of one that fits goes."""
    from loraplex.cli.output import print_json
    from loraplex.client import NotFoundError

    with connect(server) as client:
        try:
            found = client.get_bind_report(subject)
        except NotFoundError:
            found = client.get_bind_report(client.get_adapter(subject).digest)
    if as_json:
        print_json(found)
        return
    for entry in found.problems:
        typer.echo(f"{entry.subject}: {entry.problem}")
    for entry in () if found.problems else found.entries:
        lora = f" (rank {entry.rank}, scaling {entry.scaling:g})" if entry.rank else ""
        typer.echo(f"{entry.subject} -> {entry.module}{lora}")
    typer.echo(f"{len(found.problems)} of {len(found.entries)} entries do not fit {found.base_fingerprint}", err=True)


def _show_registration(registration: Registration, as_json: bool) -> None:
    from loraplex.cli.output import print_json

    if as_json:
        print_json(registration)
        return
    adapter, before = registration.adapter, registration.previous_digest
    again = f", before: {before}" if before and before != adapter.digest else ""
    typer.echo(f"registered {adapter.name}@{adapter.version} ({adapter.digest}, rank {adapter.rank}{again})")
