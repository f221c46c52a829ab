"""`loraplex plan`: what training and serving will take, from the model's config alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from loraplex.cli import plan_steps
from loraplex.cli.connection import JsonOption
from loraplex.cli.model import with_demo
from loraplex.cli.sizes import format_size

if TYPE_CHECKING:
    from rich.table import Table

    from loraplex.adapters.training.architecture import ModelArchitecture
    from loraplex.adapters.training.memory import MemoryPlan
    from loraplex.adapters.training.training_memory import TrainingShape

_TRAINING, _SERVING = "Training", "Serving"


def plan(
    model: Annotated[str, typer.Argument(help="Folder, hub id, a common model (llama-2-7b, gpt2, ...) or demo.")],
    rank: Annotated[int, typer.Option(min=1, help="Of the adapters.")] = 16,
    target: Annotated[
        list[str] | None, typer.Option(help="Module to adapt; repeatable. Default: every linear one.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a forward pass.", rich_help_panel=_TRAINING)] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row.", rich_help_panel=_TRAINING)] = 512,
    accumulation: Annotated[int, typer.Option(min=1, help="Forward passes of a step.", rich_help_panel=_TRAINING)] = 1,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Compute activations twice.", rich_help_panel=_TRAINING)
    ] = False,
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], typer.Option(help="Of weights and products.")] = (
        "bfloat16"
    ),
    adapters: Annotated[int, typer.Option(min=0, help="Resident at once.", rich_help_panel=_SERVING)] = 16,
    sequences: Annotated[int, typer.Option(min=1, help="Served at once.", rich_help_panel=_SERVING)] = 16,
    context: Annotated[int, typer.Option(min=1, help="Tokens of each.", rich_help_panel=_SERVING)] = 2048,
    on_cpu: Annotated[
        bool | None, typer.Option("--cpu/--gpu", help="Default: what this machine has.", rich_help_panel=_SERVING)
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Train two steps by each method too, here.", rich_help_panel=_TRAINING)
    ] = False,
    card: Annotated[
        str,
        typer.Option("--device", help="Steps on h100, h100-pcie, h200, a100 or l4.", rich_help_panel=_SERVING),
    ] = "",
    chart: Annotated[Path | None, typer.Option(help="Draw the plan into this PNG or SVG file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say how many bytes training and serving take, part by part, from the model's config alone."""
    import torch

    from loraplex.adapters.training.architecture import read_architecture
    from loraplex.adapters.training.memory import plan_document, plan_memory
    from loraplex.adapters.training.serving_memory import ServingShape
    from loraplex.adapters.training.targets import modules_of
    from loraplex.adapters.training.training_memory import TrainingShape
    from loraplex.cli.output import print_json, to_stdout

    architecture = read_architecture(with_demo(model))
    targets = tuple(target) if target else "all-linear"
    kind = getattr(torch, dtype)
    training = TrainingShape(batch_size, length, kind, checkpointing, accumulation, rank, targets)
    serving = ServingShape(
        sequences,
        context,
        adapters,
        rank,
        modules_of(architecture, targets),
        dtype=kind,
        on_cpu=not torch.cuda.is_available() if on_cpu is None else on_cpu,
    )
    steps = None
    if card:
        wanted = plan_steps.planned_steps(sequences, context, adapters, rank, tuple(target or ()))
        shape = plan_steps.decoder_shape(architecture)
        steps = plan_steps.steps_document(shape, wanted, plan_steps.card_named(card))
    result = plan_memory(architecture, training, serving)
    if measure:
        result = _measured(result, architecture, training)
    if chart:
        from loraplex.adapters.training.memory_chart import draw_memory

        draw_memory(result, chart)
    if as_json:
        print_json(plan_document(result, training, serving) | ({"steps_on_device": steps} if steps else {}))
        return
    to_stdout().print(plan_table(result))
    if steps:
        to_stdout().print(plan_steps.steps_table(steps))


def _measured(result: MemoryPlan, architecture: ModelArchitecture, training: TrainingShape) -> MemoryPlan:
    """Return the plan with what training took here, each method in a process of its own."""
    from loraplex.adapters.training.measured_step import measure_step
    from loraplex.adapters.training.train_config import TrainConfig
    from loraplex.cli.output import to_stderr

    if architecture.origin == "built-in table":
        raise typer.BadParameter("needs weights: give a folder, a hub id or demo", param_hint="--measure")
    rows = []
    with to_stderr().status("measuring") as status:
        for row in result.rows:
            if row.purpose != "train":
                rows.append(row)
                continue
            status.update(f"measuring {row.method}")
            config = TrainConfig(
                model=architecture.hub_id,
                data="-",
                output_dir="-",
                rank=training.rank,
                target_modules=training.targets,
                dtype=str(training.dtype).removeprefix("torch."),
                quantization="nf4" if row.method == "qlora" else "none",
                max_length=training.length,
                per_device_batch_size=training.rows,
                gradient_accumulation_steps=training.accumulation,
                gradient_checkpointing=training.checkpointing,
            )
            rows.append(replace(row, measured=measure_step(config.to_values(), row.method)))
    return replace(result, rows=tuple(rows))


def plan_table(result: MemoryPlan) -> Table:
    """Return the plan as a table: a row for each way to train and serve, a column for each part."""
    from rich.markup import escape
    from rich.table import Table

    from loraplex.adapters.training.memory import PARTS

    title = (
        f"{escape(result.model)} ({result.architecture}, config from the {result.origin}): "
        f"{result.parameters:,} parameters; LoRA trains {result.trained:,} ({result.trained_share:.2%})"
    )
    table = Table(title=title, caption="bytes at the peak, without those of the process itself (0.5 to 1 GiB)")
    for column in ("", "method"):
        table.add_column(column)
    for part in (*PARTS, "total"):
        table.add_column(part.replace("_", " "), justify="right")
    with_seed = any(row.seed_gb is not None for row in result.rows)
    if with_seed:
        table.add_column("seed text, 7B", justify="right")
    with_measured = any(row.measured is not None for row in result.rows)
    if with_measured:
        table.add_column("measured", justify="right")
    for row in result.rows:
        cells = [format_size(row.parts[part]) if part in row.parts else "" for part in PARTS]
        seed = [f"{row.seed_gb:g} GB" if row.seed_gb is not None else ""] if with_seed else []
        measured = [format_size(row.measured) if row.measured is not None else ""] if with_measured else []
        table.add_row(row.purpose, row.method, *cells, format_size(row.total), *seed, *measured)
    return table
