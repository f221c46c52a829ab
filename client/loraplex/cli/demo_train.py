"""`loraplex demo-train`: train a QLoRA adapter on the demo model, register it, and ask it over gRPC."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loraplex.cli.connection import DEFAULT_SERVER, ServerOption


def demo_train(
    server: ServerOption = DEFAULT_SERVER,
    examples: Annotated[
        Path | None,
        typer.Option(help="Folder of the example adapters; default: the repository's.", exists=True, file_okay=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Where to write what was seen; default: bench/results/train.json.", dir_okay=False),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Another value for a field of demo-train.yaml. Repeatable."),
    ] = None,
) -> None:
    """Train an adapter on the demo model in some minutes, compare it with the base, and serve it.

    It goes to the server if that serves the demo model; else one is started for it.
    """
    from loraplex.cli.demo_cases import find_examples
    from loraplex.cli.demo_train_run import run
    from loraplex.cli.termination import sigterm_raises
    from loraplex.cli.train_run import parse_settings

    folder = examples.resolve() if examples is not None else find_examples()
    results = output or folder.parents[1] / "bench" / "results" / "train.json"
    with sigterm_raises():
        held = run(server, folder, results, parse_settings(settings or []))
    if not held:
        raise typer.Exit(1)
