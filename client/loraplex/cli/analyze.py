"""`loraplex analyze ...`: which rank is worth it, what an adapter makes of its rank, and how methods compare."""

from __future__ import annotations

import typer

from loraplex.cli.analyze_adapter import analyze_adapter
from loraplex.cli.analyze_methods import analyze_methods
from loraplex.cli.analyze_ranks import analyze_ranks

app = typer.Typer(help="Find out what an adapter makes of its rank, and what to train.", no_args_is_help=True)
app.command("adapter")(analyze_adapter)
app.command("ranks")(analyze_ranks)
app.command("methods")(analyze_methods)
