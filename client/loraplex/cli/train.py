"""`loraplex train`: from a data file to an adapter, and on to a running server if wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from loraplex.cli.connection import JsonOption


def train(
    config: Annotated[
        Path | None, typer.Option(help="A train.yaml; options below take the place of what it says.", dir_okay=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The base: hub id, Hugging Face folder, GGUF file, or demo.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="A JSONL, CSV or Parquet file, or a hub data set (owner/name or owner/name:config)."),
    ] = None,
    output: Annotated[str | None, typer.Option(help="The adapter's folder, which must not exist.")] = None,
    task: Annotated[
        Literal["causal-lm", "sequence-classification"] | None, typer.Option(help="What is learned.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of the adapter.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Default: twice the rank.")] = None,
    dropout: Annotated[float | None, typer.Option(help="In front of A.")] = None,
    targets: Annotated[str | None, typer.Option(help="Module names with commas between them, or all-linear.")] = None,
    quantization: Annotated[
        Literal["none", "nf4", "fp4", "int8"] | None, typer.Option(help="Of the frozen base; nf4 is QLoRA.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="At its peak.")] = None,
    epochs: Annotated[float | None, typer.Option(help="How often each row is seen.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps, in place of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a forward pass.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a row at most.")] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal adapters on one machine.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any other field of train.yaml, as YAML. Repeatable."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    register: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Register the adapter in this server when it is done.")
    ] = "",
    name: Annotated[str, typer.Option(help="To register it under; default: the output folder's.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Train a LoRA adapter, measure it on held-out rows, and register it in a running server.

    Ctrl-C saves a checkpoint at the end of the step and stops; a second one stops at once.
    """
    from loraplex.cli import train_run
    from loraplex.cli.output import print_json

    if name and not register:
        raise typer.BadParameter("goes with --register", param_hint="--name")
    given: dict[str, Any] = {
        "model": model,
        "data": data,
        "output_dir": output,
        "task": task,
        "rank": rank,
        "alpha": alpha,
        "dropout": dropout,
        "target_modules": _names(targets),
        "quantization": quantization,
        "learning_rate": learning_rate,
        "epochs": epochs,
        "max_steps": max_steps,
        "per_device_batch_size": batch_size,
        "max_length": max_length,
        "seed": seed,
    }
    overrides = {field: value for field, value in given.items() if value is not None}
    made = train_run.read_config(config, overrides | train_run.parse_settings(settings or []))
    done = train_run.run(made, resume=resume, register=register, name=name)
    if done is None:
        raise typer.Exit(130)
    if as_json:
        print_json(done.to_json())
    else:
        train_run.show(done)
        typer.echo(done.result.output_dir)


def _names(text: str | None) -> list[str] | str | None:
    if text is None or text == "all-linear":
        return text
    return [name.strip() for name in text.split(",") if name.strip()]
