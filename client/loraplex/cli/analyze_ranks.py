"""`loraplex analyze ranks`: trains a sweep of ranks under one budget, measures serving, and names the sweet spot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from loraplex.cli.connection import JsonOption
from loraplex.cli.model import with_demo

if TYPE_CHECKING:
    from loraplex.adapters.training import TrainResult
    from loraplex.adapters.training.html_report import ReportTable
    from loraplex.adapters.training.rank_sweep import RankSweep

DEFAULT_RANKS = "1,2,4,8,16,32,64"


def analyze_ranks(
    config: Annotated[Path, typer.Option(help="A train.yaml (`loraplex advise --output` writes one); ranks aside.")],
    output: Annotated[Path, typer.Option(help="For the adapters, the JSON, the PNG and the HTML report.")],
    ranks: Annotated[str, typer.Option(help="Separated by commas.")] = DEFAULT_RANKS,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of the optimizer, for each rank. Default: what the file says.")
    ] = None,
    serve: Annotated[bool, typer.Option(help="Measure tokens per second at 16 rows too.")] = True,
    quantization: Annotated[Literal["none", "nf4", "int8"], typer.Option(help="Of the server.")] = "nf4",
    serve_tokens: Annotated[int, typer.Option(min=8, help="Output tokens of each request.")] = 64,
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each case on the server.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Train the same data at several ranks, all with the same budget, and say which rank is worth it.

    Run again with the same output folder, it goes on where it was interrupted, or adds ranks.
    """
    from loraplex.adapters.training import TrainConfig, train
    from loraplex.adapters.training.rank_sweep import run_sweep
    from loraplex.adapters.training.rank_sweep_chart import draw_sweep
    from loraplex.adapters.training.run_folder import RunFolder
    from loraplex.adapters.training.sweep_record import SweepRecord
    from loraplex.cli.analysis_output import print_table, write_analysis
    from loraplex.cli.output import print_json, to_stderr
    from loraplex.cli.training_status import StatusObserver

    read = TrainConfig.from_yaml(config)
    read = replace(read, model=with_demo(read.model), output_dir=str(output / "adapters"))
    budget = steps or read.max_steps
    if not budget:
        raise typer.BadParameter(
            "give the steps here, or max_steps in the file: all ranks get the same", param_hint="--steps"
        )
    console, record = to_stderr(), SweepRecord(output / "sweep.json", read, budget)
    with console.status("starting") as status:

        def train_one(own: TrainConfig) -> TrainResult:
            # What is left of a run that was interrupted is gone on from.
            result = train(
                own, StatusObserver(status, f"rank {own.rank}"), resume=RunFolder(own.run_dir).has_checkpoint
            )
            console.print(_told(own.rank, result))
            return result

        sweep = run_sweep(read, _parse_ranks(ranks), budget, train_one, record)
    if serve:
        sweep = _with_serving(sweep, Path(read.model), quantization, serve_tokens, repeat)
    table = _table(sweep)
    if as_json:
        print_json(_document(sweep))
    else:
        print_table(table)
        typer.echo(sweep.verdict)
    facts = (
        f"{sweep.steps} steps at a learning rate of {sweep.learning_rate:g} for each rank, alpha = 2 * rank, "
        f"seed {sweep.seed}, data {Path(sweep.data).name}"
    )
    title = "Which rank is worth it"
    write_analysis(output, "ranks", title, [sweep.verdict, facts], draw_sweep(sweep), [table], _document(sweep))


def _told(rank: int, result: TrainResult) -> str:
    score = result.adapter
    if score is None:
        return f"rank {rank}: nothing held out"
    quality = f"loss {score.loss:.3f}" if score.accuracy is None else f"accuracy {score.accuracy:.1%}"
    return f"rank {rank}: {quality}, {result.trainable_parameters:,} parameters, {result.seconds:.0f} s"


def _parse_ranks(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no list such as {DEFAULT_RANKS}", param_hint="--ranks") from error


def _with_serving(sweep: RankSweep, model: Path, quantization: str, tokens: int, repeat: int) -> RankSweep:
    from loraplex.cli.output import to_stderr
    from loraplex.cli.serving_cost import serving_costs

    trained = {point.rank: Path(point.folder) for point in sweep.points}
    with to_stderr().status("starting a server") as status:
        costs = serving_costs(model, quantization, trained, tokens, repeat, status.update)
    return replace(sweep, points=tuple(replace(point, serving=costs[point.rank]) for point in sweep.points))


def _table(sweep: RankSweep) -> ReportTable:
    from loraplex.adapters.training.html_report import ReportTable
    from loraplex.adapters.training.seed_figures import seed

    columns = ["rank", "accuracy", "loss", "parameters", "%", "seconds"]
    columns += ["tok/s same", "tok/s 16", "seed acc.", "seed %"]
    rows: list[Sequence[str | float | int | None]] = [
        ("base", sweep.base_accuracy, sweep.base_loss, None, None, None, None, None, None, None)
    ]
    for point in sweep.points:
        serving = (point.serving.same, point.serving.distinct) if point.serving else (None, None)
        said = (seed("rank_accuracy").get(point.rank), seed("rank_share_percent").get(point.rank))
        own = (point.accuracy, point.loss, point.trained, 100 * point.share, point.seconds)
        rows.append((str(point.rank), *own, *serving, *said))
    title = f"{sweep.steps} steps for each rank; % of the base's parameters; tok/s with one adapter and with 16"
    return ReportTable(title, columns, rows)


def _document(sweep: RankSweep) -> dict[str, Any]:
    points = []
    for point in sweep.points:
        values = asdict(point)
        del values["folder"]
        points.append(values)
    return {
        "data": Path(sweep.data).name,
        "steps": sweep.steps,
        "learning_rate": sweep.learning_rate,
        "seed": sweep.seed,
        "base": {"accuracy": sweep.base_accuracy, "loss": sweep.base_loss},
        "points": points,
        "sweet_spot": sweep.sweet_spot.rank,
        "verdict": sweep.verdict,
    }
