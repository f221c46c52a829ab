"""`loraplex advise`: how to train an adapter for a model and some data, with the reason for every value."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from loraplex.cli.connection import JsonOption
from loraplex.cli.model import with_demo
from loraplex.cli.sizes import format_size

if TYPE_CHECKING:
    from rich.table import Table

    from loraplex.adapters.training.advisor import Advice
    from loraplex.adapters.training.data_profile import DataProfile
    from loraplex.adapters.training.mistakes import Mistake

Task = Literal["classification", "dialogue", "generation", "qa", "summarization", "code", "multimodal"]
Device = Literal["cpu", "h100", "a100", "rtx4090", "v100", "l4", "rtx3090", "t4"]


def advise(
    model: Annotated[str, typer.Option(help="Folder, hub id, a common model (llama-2-7b, gpt2, ...) or demo.")] = "",
    data: Annotated[str, typer.Option(help="The training data: JSONL, CSV or Parquet, or a hub data set.")] = "",
    task: Annotated[Task, typer.Option(help="What is learned.")] = "dialogue",
    complexity: Annotated[
        Literal["simple", "medium", "complex"] | None, typer.Option(help="Default: that of the task.")
    ] = None,
    one_rank: Annotated[bool, typer.Option("--one-rank", help="The same rank for all modules.")] = False,
    quantization: Annotated[
        Literal["none", "nf4", "int8"] | None, typer.Option(help="Of the base while training. Default: advised.")
    ] = None,
    device: Annotated[Device, typer.Option(help="For the estimate of time.")] = "cpu",
    adapter: Annotated[str, typer.Option(help="The adapter's folder, for the train.yaml.")] = "adapter",
    output: Annotated[Path | None, typer.Option(help="Write the advice as a train.yaml.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Name the mistakes in this train.yaml instead; it says model and data.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Advise rank, alpha, dropout, modules and the rest, with reasons; or name the mistakes in a configuration."""
    if config is not None:
        if model or data or output:
            raise typer.BadParameter("names model and data itself", param_hint="--config")
        _check(config, task, as_json)
        return
    if not model or not data:
        raise typer.BadParameter("give both, or --config", param_hint="--model and --data")
    from loraplex.adapters.training.advisor import Wishes

    _advise(model, data, Wishes(task, complexity, adapter, one_rank, quantization, device), output, as_json)


def _advise(model: str, data: str, wishes: Any, output: Path | None, as_json: bool) -> None:
    from loraplex.adapters.training.advisor import advise as make_advice
    from loraplex.adapters.training.architecture import CAUSAL_LM, CLASSIFICATION, is_masked_encoder, read_architecture
    from loraplex.adapters.training.data_profile import profile_data
    from loraplex.adapters.training.mistakes import find_mistakes
    from loraplex.adapters.training.train_config import TrainConfig
    from loraplex.cli.output import print_json, to_stdout
    from loraplex.cli.servable import servable_modules

    place = with_demo(model)
    kind = CLASSIFICATION if is_masked_encoder(place) else CAUSAL_LM
    architecture = read_architecture(place, kind)
    asked = TrainConfig(model=architecture.hub_id, data=data, output_dir="-", task=kind)
    profile = profile_data(asked, fetch=architecture.origin == "hub")
    advice = make_advice(architecture, profile, wishes, model if model == "demo" else architecture.hub_id)
    mistakes = find_mistakes(advice.advised.config, architecture, profile, wishes.task, servable_modules(architecture))
    if output:
        output.write_text(advice.advised.config.to_yaml(advice.advised.reasons), encoding="utf-8")
    if as_json:
        print_json(_document(advice, profile, mistakes))
        return
    console = to_stdout()
    console.print(_data_text(profile))
    console.print(_advice_table(advice, architecture.architecture))
    console.print(_memory_table(advice))
    _print_notes(console, advice, mistakes)
    if output:
        typer.echo(f"{output}: start with `loraplex train --config {output}`")


def _check(config: Path, task: Any, as_json: bool) -> None:
    from loraplex.adapters.training.architecture import read_architecture
    from loraplex.adapters.training.data_profile import profile_data
    from loraplex.adapters.training.mistakes import find_mistakes
    from loraplex.adapters.training.train_config import TrainConfig
    from loraplex.cli.output import print_json, to_stdout
    from loraplex.cli.servable import servable_modules

    read = TrainConfig.from_yaml(config)
    place = with_demo(read.model)
    architecture = read_architecture(place, read.task)
    asked = TrainConfig.from_yaml(config, {"model": architecture.hub_id})
    profile = profile_data(asked, fetch=architecture.origin == "hub")
    mistakes = find_mistakes(read, architecture, profile, task, servable_modules(architecture))
    if as_json:
        print_json(mistakes)
    elif mistakes:
        to_stdout().print(_mistakes_table(mistakes, str(config)))
    else:
        typer.echo(f"{config}: none of the common mistakes")


def _data_text(profile: DataProfile) -> str:
    from rich.markup import escape

    about = "about " if profile.estimated else ""
    lengths = f"{profile.median:,} (median), {profile.quantile(0.95):,} (95 %), {profile.longest:,} (longest)"
    return (
        f"{escape(profile.source)}: {profile.rows:,} rows ({profile.data_format}), {about}{profile.tokens_total:,} "
        f"tokens, {profile.learned:,} of them learned; a row has {lengths}"
    )


def _advice_table(advice: Advice, architecture: str) -> Table:
    from rich.markup import escape
    from rich.table import Table

    config = advice.advised.config
    title = (
        f"{escape(config.model)} ({architecture}, {advice.parameters:,} parameters): the adapter trains "
        f"{advice.advised.trained:,}, {advice.trained_share:.3%}"
    )
    table = Table(title=title)
    table.add_column("field")
    table.add_column("advice", overflow="fold")
    table.add_column("because")
    values = config.to_values()
    for name in (*advice.advised.reasons, "lr_scheduler_type", "epochs", "per_device_batch_size"):
        table.add_row(name, escape(_plain(values[name])), escape(advice.advised.reasons.get(name, "the seed text's")))
    return table


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {each:g}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _memory_table(advice: Advice) -> Table:
    from rich.table import Table

    config = advice.advised.config
    table = Table(
        title=f"Memory at the peak: {config.per_device_batch_size} rows of {config.max_length} tokens in 16 bits"
    )
    table.add_column("method")
    parts = tuple(advice.memory[0].parts)
    for part in (*parts, "total"):
        table.add_column(part, justify="right")
    for each in advice.memory:
        sizes = (*each.parts.values(), each.total)
        table.add_row(each.method, *map(format_size, sizes))
    return table


def _print_notes(console: Any, advice: Advice, mistakes: tuple[Mistake, ...]) -> None:
    time = advice.time
    console.print(
        f"Time: about {_duration(time.seconds)} on {time.device} ({time.tokens:,} tokens, {time.flops:.2g} operations, "
        f"a share of {time.tflops:g} TFLOP/s), scoring not counted; within a factor of two"
    )
    for note in advice.advised.notes:
        console.print(f"Note: {note}")
    if mistakes:
        console.print(_mistakes_table(mistakes, "this advice"))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _mistakes_table(mistakes: tuple[Mistake, ...], what: str) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"Mind in {escape(what)}")
    for column in ("field", "problem", "instead"):
        table.add_column(column)
    for each in mistakes:
        table.add_row(each.field, escape(each.problem), escape(each.instead))
    return table


def _document(advice: Advice, profile: DataProfile, mistakes: tuple[Mistake, ...]) -> dict[str, Any]:
    return {
        "config": advice.advised.config.to_values(),
        "reasons": advice.advised.reasons,
        "rank": advice.advised.rank,
        "data": {
            "source": profile.source,
            "format": profile.data_format,
            "rows": profile.rows,
            "tokens": profile.tokens_total,
            "learned_tokens": profile.learned,
            "estimated": profile.estimated,
            "row_tokens": {"median": profile.median, "p95": profile.quantile(0.95), "longest": profile.longest},
        },
        "parameters": advice.parameters,
        "trained_parameters": advice.advised.trained,
        "trained_share": advice.trained_share,
        "memory": {each.method: {**each.parts, "total": each.total} for each in advice.memory},
        "time": advice.time,
        "notes": advice.advised.notes,
        "mistakes": mistakes,
    }
