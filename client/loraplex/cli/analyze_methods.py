"""`loraplex analyze methods`: full fine-tuning, LoRA and QLoRA on the same data, each in a process of its own."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from loraplex.cli.connection import JsonOption
from loraplex.cli.model import with_demo
from loraplex.cli.sizes import format_size

if TYPE_CHECKING:
    from loraplex.adapters.training.html_report import ReportTable
    from loraplex.adapters.training.method_comparison import MethodComparison

ALL = "full,lora,qlora"


def analyze_methods(
    config: Annotated[Path, typer.Option(help="A train.yaml; its quantization aside.")],
    output: Annotated[Path, typer.Option(help="For the adapters, the JSON, the PNG and the HTML report.")],
    methods: Annotated[str, typer.Option(help="Separated by commas.")] = ALL,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of the optimizer, for each. Default: what the file says.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train the same data by several methods and show quality, memory and time of each."""
    from loraplex.adapters.training.architecture import read_architecture
    from loraplex.adapters.training.method_comparison import compare_methods
    from loraplex.adapters.training.method_comparison_chart import draw_comparison
    from loraplex.adapters.training.method_process import run_method
    from loraplex.adapters.training.train_config import TrainConfig
    from loraplex.adapters.training.training_memory import Method
    from loraplex.cli.analysis_output import print_table, write_analysis
    from loraplex.cli.output import print_json, to_stderr

    chosen: Any = methods.split(",")
    unknown = [method for method in chosen if method not in get_args(Method)]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {ALL}", param_hint="--methods")
    read = TrainConfig.from_yaml(config)
    read = replace(read, model=with_demo(read.model), output_dir=str(output / "trained"))
    budget = steps or read.max_steps
    if not budget:
        raise typer.BadParameter("give them, or max_steps in the file: all get the same", param_hint="--steps")
    model = read_architecture(read.model, read.task)
    with to_stderr().status("starting") as status:
        found = compare_methods(read, chosen, budget, model, lambda method, own: run_method(method, own, status.update))
    table = _table(found)
    if as_json:
        print_json(_document(found))
    else:
        print_table(table)
    title = "Full fine-tuning, LoRA and QLoRA on the same data"
    facts = (
        f"{found.steps} steps each, data {Path(found.data).name}; memory is the process's peak less what it held before"
    )
    write_analysis(output, "methods", title, [facts], draw_comparison(found), [table], _document(found))


def _table(found: MethodComparison) -> ReportTable:
    from loraplex.adapters.training.html_report import ReportTable
    from loraplex.adapters.training.seed_figures import seed

    columns = ("method", "accuracy", "base", "held-out loss", "trained", "memory", "planned", "seconds", "x full")
    rows = []
    for point in found.points:
        run = point.run
        rows.append(
            (
                *(point.method, run.accuracy, run.base_accuracy, run.loss, run.trained),
                *(format_size(run.memory), format_size(point.planned), run.seconds, found.time_factor(point)),
                seed("time_factor")[point.method],
            )
        )
    return ReportTable(f"{found.steps} steps each", (*columns, "seed text: x full"), rows)


def _document(found: MethodComparison) -> dict[str, Any]:
    points = [{**asdict(point), "time_factor": found.time_factor(point)} for point in found.points]
    return {"data": Path(found.data).name, "steps": found.steps, "methods": points}
