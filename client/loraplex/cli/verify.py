"""`loraplex adapter verify`: does the server compute what PEFT computes, and does the merged model?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loraplex.cli.connection import DEFAULT_SERVER, JsonOption, ServerOption
from loraplex.cli.model import with_demo


def verify(
    name: Annotated[str, typer.Argument(help="A registered name, an alias, or either with a version.")],
    prompts: Annotated[
        Path | None,
        typer.Option(help="Texts to answer, one a line; default: a built-in list.", exists=True, dir_okay=False),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Output tokens that each prompt gets.", min=1)] = 16,
    model: Annotated[
        str, typer.Option(help="The server's base: hub id, folder, GGUF file, or demo; default: the folder it names.")
    ] = "",
    max_mean_kl: Annotated[float, typer.Option(help="Largest mean KL of any pair, in nats.", min=0)] = 0.01,
    min_top1: Annotated[
        float, typer.Option(help="Smallest share of positions with the same best token.", min=0, max=1)
    ] = 0.95,
    as_json: JsonOption = False,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Compare the server's answers, given beside others, with PEFT on the same base and with the merged model.

    transformers and PEFT run here, in a process of their own: four bytes of memory for each parameter of the base.
    The exit status is 1 if one pair is further apart than allowed.
    """
    from loraplex.cli import verify_run
    from loraplex.cli.merge_run import read_prompts
    from loraplex.cli.output import print_json, to_stdout
    from loraplex.cli.termination import sigterm_raises

    limits = verify_run.Limits(max_mean_kl, min_top1)
    folder = with_demo(model) if model else ""
    with sigterm_raises():
        found = verify_run.run(server, name, folder, read_prompts(prompts), max_tokens, limits)
    if as_json:
        print_json(found)
    else:
        to_stdout().print(verify_run.table(found))
        if found.not_merged:
            typer.echo(f"not compared with a merged model: {found.not_merged}")
        typer.echo(f"{'passed' if found.passed else 'FAILED'}: {verify_run.describe(found)}")
    if not found.passed:
        raise typer.Exit(1)
