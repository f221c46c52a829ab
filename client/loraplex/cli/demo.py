"""`loraplex demo`: the main job, end to end, on the demo model and the example adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    examples: Annotated[
        Path | None,
        typer.Option(help="Folder of the example adapters; default: the repository's.", exists=True, file_okay=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Where to write what was seen; default: bench/results/demo.json.", dir_okay=False),
    ] = None,
) -> None:
    """Serve three adapters and the base in one batch, add a fourth, merge one, and check all of it."""
    from loraplex.cli.demo_cases import find_examples
    from loraplex.cli.demo_run import run
    from loraplex.cli.termination import sigterm_raises

    folder = examples.resolve() if examples is not None else find_examples()
    with sigterm_raises():
        held = run(folder, output or folder.parents[1] / "bench" / "results" / "demo.json")
    if not held:
        raise typer.Exit(1)
