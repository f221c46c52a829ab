"""What `loraplex bench cpu` does: start a server for each quantization, run the cases on all in turn, write it down."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from loraplex.bench import cpu_cases, w16
from loraplex.bench.charts import draw_cpu
from loraplex.bench.cpu_report import cpu_document, cpu_table
from loraplex.bench.cpu_run import Measurements, ServerUnderTest, agreement_with_alone, run_all
from loraplex.bench.load import load_client
from loraplex.bench.process_memory import budgets_mb, resident_mb
from loraplex.bench.random_adapter import ModelShape
from loraplex.bench.server_process import ServerProcess
from loraplex.cli.bench_run import rate_bar, write_result
from loraplex.cli.output import to_stdout
from loraplex.client import AsyncClient

MAX_NUM_SEQS = 64


@dataclass(frozen=True)
class CpuBench:
    """What to measure.

    Attributes:
        model: a Hugging Face folder.
        serve_args: more arguments for every server.
        repeat: runs of each case, and counted starts of each server.
        short: the same code over fewer rows and tokens, for a test.
    """

    model: Path
    quantizations: Sequence[str]
    repeat: int
    short: bool = False
    serve_args: Sequence[str] = ()

    def arguments(self, quantization: str) -> list[str]:
        """Return what `loraplex serve` is told."""
        own = ["--model", str(self.model), "--quantization", quantization, "--max-num-seqs", str(MAX_NUM_SEQS)]
        return [*own, *self.serve_args]


def run(bench: CpuBench, output: Path) -> bool:
    """Measure, print the table, write `output` and a chart beside it; return whether all requests completed.

    Raises:
        ServerProcessError: if a server does not start; its log is on stderr.
        FileNotFoundError: if the model folder has no config.json.
    """
    with tempfile.TemporaryDirectory(prefix="loraplex-cpu-") as scratch, rate_bar() as bar:
        folders = _write_adapters(bench, Path(scratch) / "adapters", bar)
        ready_s = _time_starts(bench, Path(scratch), bar)
        with _servers(bench, Path(scratch), ready_s) as servers:
            measurements, facts = asyncio.run(_measure(bench, servers, folders, bar))
            rss_mb = {name: resident_mb(server.pid) for name, server in servers.items()}
    document = cpu_document(measurements, ready_s, rss_mb) | facts
    shape = ModelShape.of(bench.model)
    document["budgets_mb"] = {name: budgets_mb(each, shape) for name, each in facts["server"].items()}
    to_stdout().print(cpu_table(document))
    write_result({**document, "short": bench.short}, output)
    draw_cpu(document, output.with_suffix(".png"))
    return not document["failed_requests"]


def _write_adapters(bench: CpuBench, root: Path, bar: Progress) -> list[Path]:
    task = bar.add_task("writing adapters", total=cpu_cases.adapter_count(bench.short))
    shape = ModelShape.of(bench.model)
    return cpu_cases.make_cpu_adapters(root, bench.short, shape, lambda done: bar.update(task, completed=done))


def _time_starts(bench: CpuBench, scratch: Path, bar: Progress) -> dict[str, list[float]]:
    """Start and stop servers in turn, one time less than is counted; return the seconds to serving.

    A start that is not counted comes first: it leaves compiled kernels behind. The short form leaves all of them out.
    """
    starts = 0 if bench.short else bench.repeat
    task = bar.add_task("starting servers", total=starts * len(bench.quantizations))
    seconds: dict[str, list[float]] = {name: [] for name in bench.quantizations}
    for repetition in range(starts):
        for name in bench.quantizations:
            with ServerProcess(bench.arguments(name), scratch / f"{name}.log") as server:
                ready = server.wait_until_ready()
            if repetition:
                seconds[name].append(ready)
            bar.advance(task)
    return seconds


@contextmanager
def _servers(bench: CpuBench, scratch: Path, ready_s: dict[str, list[float]]) -> Iterator[dict[str, ServerProcess]]:
    """Have one server for each quantization; adds their starts to `ready_s`."""
    with ExitStack() as stack:
        servers = {}
        for name in bench.quantizations:
            server = stack.enter_context(ServerProcess(bench.arguments(name), scratch / f"{name}.log"))
            ready_s[name].append(server.wait_until_ready())
            servers[name] = server
        yield servers


async def _measure(
    bench: CpuBench, processes: dict[str, ServerProcess], folders: Sequence[Path], bar: Progress
) -> tuple[Measurements, dict[str, Any]]:
    """Upload the adapters and run the cases; return the runs, and what was run where as plain values."""
    cases = cpu_cases.cpu_cases(bench.short)
    servers = {name: ServerUnderTest(process.target, process.metrics_url) for name, process in processes.items()}
    facts: dict[str, Any] = {"server": {}, "same_as_alone": {}}
    for name, server in servers.items():
        async with load_client(server.target) as client:
            await _register(client, folders, bar, f"registering adapters, {name}")
            facts["server"][name] = await w16.server_summary(client)
        facts["same_as_alone"][name] = round(await agreement_with_alone(server, cases["mixed"]), 4)
    task = bar.add_task("output tokens", total=bench.repeat * len(servers) * cpu_cases.total_tokens(cases))
    measurements = await run_all(
        servers, cases, bench.repeat, lambda what, tokens: bar.update(task, description=what, advance=tokens)
    )
    return measurements, facts | {"workloads": {name: asdict(case) for name, case in cases.items()}}


async def _register(client: AsyncClient, folders: Sequence[Path], bar: Progress, description: str) -> None:
    task = bar.add_task(description, total=len(folders))
    await w16.upload_adapters(client, folders, lambda done: bar.update(task, completed=done))
