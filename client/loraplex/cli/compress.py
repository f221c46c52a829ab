"""`loraplex adapter compress`: one adapter of smaller rank out of one or several, here, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from loraplex.cli.connection import JsonOption
from loraplex.cli.sizes import format_size
from loraplex.cli.weights import parse_weights

if TYPE_CHECKING:
    from rich.table import Table

    from loraplex.adapters.compressed_folder import CompressReport


def compress(
    adapters: Annotated[list[str], typer.Argument(help="Adapter folders; several as FOLDER=WEIGHT, which are added.")],
    output: Annotated[Path, typer.Option(help="The folder to write.")],
    rank: Annotated[int | None, typer.Option(help="Rank of each module at most.", min=1)] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Share of each module's squared singular values to keep, e.g. 0.99; ranks then differ."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Default: that of the first adapter.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write an adapter that is as close as its rank allows, and say what is lost per module and in all."""
    import torch

    from loraplex.adapters.compress import Budget
    from loraplex.adapters.compressed_folder import compress_adapters
    from loraplex.adapters.disk import parents_made
    from loraplex.cli.output import print_json, to_stdout

    if rank is None and energy is None:
        raise typer.BadParameter("give a rank, an energy, or both", param_hint="--rank")
    weights = parse_weights(adapters, "ADAPTERS")
    with parents_made(output):
        report = compress_adapters(
            [(Path(folder), weight) for folder, weight in weights.items()],
            output,
            Budget(rank, energy),
            getattr(torch, dtype) if dtype else None,
        )
    if as_json:
        print_json(report)
        return
    to_stdout().print(_table(report))
    typer.echo(
        f"{report.output}: {report.relative_error:.3%} of the whole update is lost, "
        f"{format_size(report.source_bytes)} became {format_size(report.bytes)}"
    )


def _table(report: CompressReport) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Lost of each module's update (Frobenius norm)")
    table.add_column("module", overflow="fold")
    for column in ("rank before", "rank", "lost"):
        table.add_column(column, justify="right")
    for module in report.modules:
        table.add_row(escape(module.module), str(module.source_rank), str(module.rank), f"{module.relative_error:.3%}")
    return table
