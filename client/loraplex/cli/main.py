"""The command's entry point: puts the sub-commands together. Knows nothing about what they do."""

from __future__ import annotations

from typing import Annotated

import typer

from loraplex.cli import (
    adapter,
    advise,
    analyze,
    bench,
    compress,
    demo,
    demo_train,
    generate,
    merge,
    model,
    plan,
    serve,
    train,
    verify,
)
from loraplex.cli.reporting import ReportingGroup

app = typer.Typer(
    name="loraplex",
    help="Serve many LoRA adapters from one quantized base model, batched together, over gRPC.",
    cls=ReportingGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("serve")(serve.serve)
app.command("generate")(generate.generate)
adapter.app.command("verify")(verify.verify)
adapter.app.command("compress")(compress.compress)
app.add_typer(adapter.app, name="adapter")
app.command("merge")(merge.merge)
app.command("advise")(advise.advise)
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.add_typer(analyze.app, name="analyze")
app.add_typer(model.app, name="model")
app.add_typer(bench.app, name="bench")
app.command("demo")(demo.demo)
app.command("demo-train")(demo_train.demo_train)


def _print_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="LORAPLEX_DEBUG", help="Show the traceback of errors.")
    ] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take the options that go before the sub-command; `ReportingGroup` reads `debug`."""


@app.command()
def version() -> None:
    """Show the version of this installation."""
    from importlib.metadata import version as installed_version

    typer.echo(f"loraplex {installed_version('loraplex')}")
