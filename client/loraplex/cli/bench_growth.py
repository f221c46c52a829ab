"""What `loraplex bench growth` does: one server, every point of every sweep, a document and a chart."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from loraplex.bench import growth, w16
from loraplex.bench.charts import draw_growth
from loraplex.bench.cpu_cases import total_tokens
from loraplex.bench.cpu_run import Measurements, ServerUnderTest, run_all
from loraplex.bench.load import load_client
from loraplex.bench.random_adapter import ModelShape
from loraplex.bench.server_process import ServerProcess
from loraplex.cli.bench_run import rate_bar, write_result
from loraplex.cli.output import to_stdout


@dataclass(frozen=True)
class GrowthBench:
    """What to measure: a Hugging Face folder, how it is held, runs of each point, and the sweeps' largest value."""

    model: Path
    quantization: str
    repeat: int
    most: int
    tokens: int = growth.TOKENS
    serve_args: Sequence[str] = ()


def run(bench: GrowthBench, output: Path) -> bool:
    """Measure, print the table, write `output` and a chart beside it; return whether all requests completed.

    Raises:
        ServerProcessError: if the server does not start; its log is on stderr.
        FileNotFoundError: if the model folder has no config.json.
    """
    chosen = growth.sweeps(bench.most, bench.tokens)
    arguments = ["--model", str(bench.model), "--quantization", bench.quantization, *growth.SERVE_ARGS]
    with tempfile.TemporaryDirectory(prefix="loraplex-growth-") as scratch, rate_bar() as bar:
        names = growth.adapter_names(chosen)
        task = bar.add_task("writing adapters", total=len(names))
        folders = growth.make_growth_adapters(
            Path(scratch) / "adapters", names, ModelShape.of(bench.model), lambda done: bar.update(task, completed=done)
        )
        with ServerProcess([*arguments, *bench.serve_args], Path(scratch) / "server.log") as server:
            server.wait_until_ready()
            measurements, facts = asyncio.run(_measure(bench, server, chosen, folders, bar))
    document = growth.growth_document(chosen, measurements, bench.quantization) | facts
    to_stdout().print(growth.growth_table(document))
    write_result(document, output)
    draw_growth(document, output.with_suffix(".png"))
    return not any(point["failed"] for sweep in document["sweeps"].values() for point in sweep["points"])


async def _measure(
    bench: GrowthBench,
    process: ServerProcess,
    chosen: Mapping[str, growth.Sweep],
    folders: Sequence[Path],
    bar: Progress,
) -> tuple[Measurements, dict[str, Any]]:
    """Upload the adapters and run every point; return the runs, and what served them as plain values."""
    async with load_client(process.target) as client:
        task = bar.add_task("registering adapters", total=len(folders))
        await w16.upload_adapters(client, folders, lambda done: bar.update(task, completed=done))
        facts = {"server": await w16.server_summary(client)}
    points = {
        growth.case_of(name, value): workload
        for name, sweep in chosen.items()
        for value, workload in sweep.points.items()
    }
    servers = {bench.quantization: ServerUnderTest(process.target, process.metrics_url)}
    tokens = bar.add_task("output tokens", total=bench.repeat * total_tokens(points))
    measurements = await run_all(
        servers, points, bench.repeat, lambda what, count: bar.update(tokens, description=what, advance=count)
    )
    return measurements, facts
