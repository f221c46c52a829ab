"""`loraplex analyze ...`: which rank is worth it, what an adapter makes of its rank, and how methods compare."""

from __future__ import annotations

import typer

from loraplex.cli.analyze_adapter import analyze_adapter

app = typer.Typer(
    help="Find out what an adapter makes of its rank, and which rank and method to train.", no_args_is_help=True
)
app.command("adapter")(analyze_adapter)


@app.callback()
def _group() -> None:
    """Keep `adapter` a sub-command though it is the only one."""
