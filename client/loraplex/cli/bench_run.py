"""What the bench commands do: run load, show progress, print the tables, write the JSON."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from loraplex.bench import w16
from loraplex.bench.commit import current_commit
from loraplex.bench.load import load_client, run_load
from loraplex.bench.machine import machine_info
from loraplex.bench.report import Report, cases_as_json, cases_table, latency_table, warnings
from loraplex.bench.server_process import ServerProcess
from loraplex.bench.workload import Workload
from loraplex.cli.output import to_stderr, to_stdout
from loraplex.client import Client


class RateColumn(ProgressColumn):
    """Shows how many units a second a task makes, lately."""

    def render(self, task: Task) -> Text:
        """Return the rate, or nothing before the first units."""
        return Text(f"{task.speed:.0f}/s" if task.speed else "", style="progress.data.speed")


def rate_bar(console: Console | None = None) -> Progress:
    """Return bars with rates on `console` (default: stderr) that leave nothing behind; silent if it is no terminal."""
    console = console or to_stderr()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def adapter_names(server: str, text: str) -> tuple[str, ...]:
    """Return the names that `text` lists with commas between them; "all" is those registered on `server` now."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if "all" in names:
        with Client(server) as client:
            registered = [adapter.name for adapter in client.list_adapters()]
        at = names.index("all")
        names[at : at + 1] = registered
    return tuple(names)


def measure(server: str, workload: Workload, repeat: int, json_file: Path | None) -> bool:
    """Run `workload` on `server` `repeat` times with other prompts each; return whether all requests completed."""
    reports = asyncio.run(_repeat(server, workload, repeat))
    return show({"run": reports}, {"workload": asdict(workload)}, json_file)


def measure_w16(
    server: str, arguments: Sequence[str], cases: Sequence[str], repeat: int, json_file: Path | None
) -> bool:
    """Run W16 on `server`, or if that is empty on one started with `arguments`; return whether all completed.

    Raises:
        ServerProcessError: if the server does not start; its log is on stderr.
    """
    with tempfile.TemporaryDirectory(prefix="loraplex-w16-") as scratch:
        with rate_bar() as bar:
            task = bar.add_task("writing adapters", total=w16.ADAPTERS)
            folders = w16.make_adapters(Path(scratch) / "adapters", lambda done: bar.update(task, completed=done))
        if server:
            return show(*asyncio.run(_run_w16(server, folders, cases, repeat)), json_file)
        with ServerProcess(arguments, Path(scratch) / "server.log") as own:
            with to_stderr().status("starting the server"):
                seconds = own.wait_until_ready()
            to_stderr().print(f"the server was ready in {seconds:.1f} s")
            return show(*asyncio.run(_run_w16(own.target, folders, cases, repeat)), json_file)


async def _repeat(server: str, workload: Workload, repeat: int) -> list[Report]:
    reports = []
    async with load_client(server) as client:
        with rate_bar() as bar:
            task = bar.add_task("output tokens", total=repeat * workload.requests * workload.max_tokens)
            for repetition in range(repeat):
                run = replace(workload, seed=workload.seed + repetition)
                result = await run_load(client, run, lambda tokens: bar.advance(task, tokens))
                reports.append(Report.of(result))
    return reports


async def _run_w16(
    target: str, folders: Sequence[Path], cases: Sequence[str], repeat: int
) -> tuple[dict[str, list[Report]], dict[str, Any]]:
    """Register the adapters and run the cases; return the reports, and what was run where as plain values."""
    workloads = {case: w16.workload_of(case) for case in cases}
    tokens = repeat * sum(workload.requests * workload.max_tokens for workload in workloads.values())
    async with load_client(target) as client:
        with rate_bar() as bar:
            task = bar.add_task("registering adapters", total=len(folders))
            await w16.upload_adapters(client, folders, lambda done: bar.update(task, completed=done))
            task = bar.add_task("output tokens", total=tokens)
            reports = await w16.run_cases(client, cases, repeat, lambda new: bar.advance(task, new))
        server = await w16.server_summary(client)
    return reports, {"workloads": {case: asdict(load) for case, load in workloads.items()}, "server": server}


def show(cases: Mapping[str, Sequence[Report]], facts: Mapping[str, Any], json_file: Path | None) -> bool:
    """Print the reports by case, write them and `facts` to `json_file`; return whether all requests completed."""
    console = to_stdout()
    console.print(cases_table(cases))
    every = [report for reports in cases.values() for report in reports]
    if len(every) == 1:
        console.print(latency_table(every[0]))
    for warning in warnings(every):
        to_stderr().print(warning, style="yellow", markup=False)
    if json_file is not None:
        write_result({**facts, "cases": cases_as_json(cases)}, json_file)
    return not any(report.failed for report in every)


def write_result(document: Mapping[str, Any], path: Path) -> None:
    """Write `document` as JSON, with the machine and the commit that it was measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {**document, "machine": machine_info(), "commit": current_commit()}
    path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    to_stderr().print(f"wrote {path}", markup=False)
