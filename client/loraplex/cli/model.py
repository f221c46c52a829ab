"""`loraplex model ...` and how the commands that take a base model read its name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Prepare base models.", no_args_is_help=True)

DEMO = "demo"


@app.callback()
def _group() -> None:
    """Keep `import` a sub-command though it is the only one."""


@app.command("import")
def import_(
    gguf: Annotated[Path, typer.Argument(help="The GGUF file.", exists=True, dir_okay=False)],
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is there already.")] = False,
) -> None:
    """Turn a GGUF file into a Hugging Face folder with bfloat16 weights."""
    from loraplex.server.models.gguf import import_gguf

    # transformers draws the progress bars.
    typer.echo(str(import_gguf(gguf, output, overwrite=overwrite)))


def with_demo(name: str) -> str:
    """Return `name` as it is, but for "demo" the folder of the demo model, converted from its package if need be.

    Raises:
        ModelLoadError: if the demo model is not installed or cannot be converted.
    """
    if name != DEMO or Path(name).exists():
        return name
    from loraplex.server.models.demo import demo_model_path

    return str(demo_model_path())
