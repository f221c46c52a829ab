"""What `loraplex bench adapters` does: write adapters, start two servers, run the load on both, write it down."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from loraplex.bench.adapters import (
    DTYPE_BYTES,
    FEW,
    AdapterBench,
    Runs,
    compare,
    memory_of_rounds,
    register,
    waste_of_mixed_ranks,
)
from loraplex.bench.adapters_report import TARGET_KEPT, adapters_document, adapters_table, held
from loraplex.bench.commit import current_commit
from loraplex.bench.cpu_run import ServerUnderTest, agreement_with_alone
from loraplex.bench.load import load_client
from loraplex.bench.machine import machine_info
from loraplex.bench.server_process import ServerProcess
from loraplex.bench.w16 import server_summary
from loraplex.cli.bench_run import rate_bar
from loraplex.cli.output import to_stderr, to_stdout


def run(bench: AdapterBench, output: Path) -> bool:
    """Measure, print the table and write `output`; return whether requests completed and budgets held.

    Raises:
        ServerProcessError: if a server does not start; its log is on stderr.
        FileNotFoundError: if the model folder has no config.json.
    """
    with tempfile.TemporaryDirectory(prefix="loraplex-adapters-") as scratch, rate_bar() as bar:
        root = Path(scratch) / "adapters"
        task = bar.add_task("writing adapters", total=bench.adapters)
        folders = bench.population.write(root / "many", lambda done: bar.update(task, completed=done))
        budgets = [bench.budget(share, DTYPE_BYTES["bfloat16"]) for share in (bench.device_share, bench.host_share)]
        with (
            ServerProcess(bench.arguments(root), Path(scratch) / "few.log") as few,
            ServerProcess(bench.arguments(root, budgets), Path(scratch) / "many.log") as many,
        ):
            for server in (few, many):
                server.wait_until_ready()
            document = asyncio.run(_Measuring(bench, few, many, root, folders, bar).document())
    document |= {"machine": machine_info(), "commit": current_commit()}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    to_stdout().print(adapters_table(document))
    for problem in held(document):
        to_stderr().print(problem, style="red", markup=False)
    if document["kept"] < TARGET_KEPT:
        to_stderr().print(f"kept {document['kept']:.3f}, short of {TARGET_KEPT}", style="yellow", markup=False)
    to_stderr().print(f"wrote {output}", markup=False)
    return not held(document)


@dataclass(frozen=True)
class _Measuring:
    """The measured part, with both servers up."""

    bench: AdapterBench
    few: ServerProcess
    many: ServerProcess
    root: Path
    folders: Sequence[Path]
    bar: Progress

    async def document(self) -> dict[str, Any]:
        """Go through all of it and return the figures."""
        bench, few, many = self.bench, _under_test(self.few), _under_test(self.many)
        waste = await waste_of_mixed_ranks(bench, few, self.root / "mixed")
        await register(few.target, self.folders[:FEW])
        started = time.perf_counter()
        await register(many.target, self.folders, self._progress("registering adapters", len(self.folders)))
        register_s = time.perf_counter() - started
        runs = await self._compare(few, many)
        names = [folder.name for folder in self.folders]
        same = await agreement_with_alone(many, bench.workload(names, seed=-2))
        before, after = await memory_of_rounds(
            bench, few.target, self.few.pid, self.folders[FEW:], self._progress("rounds", bench.rounds)
        )
        figures: dict[str, Any] = {
            "same_as_alone": round(same, 4),
            "waste_mixed_ranks": round(waste, 5),
            "register_s": round(register_s, 2),
            "rounds_rss_mb": {f"after_{bench.settled}": round(before, 1), f"after_{bench.rounds}": round(after, 1)},
            "rounds_growth": round(after / before - 1, 4) if before else 0.0,
        }
        async with load_client(many.target) as client:
            figures["server"] = await server_summary(client)
        return adapters_document(bench, runs, figures)

    async def _compare(self, few: ServerUnderTest, many: ServerUnderTest) -> Runs:
        names = [folder.name for folder in self.folders]
        task = self.bar.add_task("output tokens", total=2 * (self.bench.repeat + 1) * self.bench.tokens_per_run)
        return await compare(self.bench, few, many, names, lambda tokens: self.bar.advance(task, tokens))

    def _progress(self, text: str, total: int) -> Callable[[int], None]:
        task = self.bar.add_task(text, total=total)
        return lambda done: self.bar.update(task, completed=done)


def _under_test(process: ServerProcess) -> ServerUnderTest:
    return ServerUnderTest(process.target, process.metrics_url)
