"""What `loraplex bench merge` does: start a server with W16's adapters, measure beside merges, write it down."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loraplex.bench import w16
from loraplex.bench.commit import current_commit
from loraplex.bench.load import load_client
from loraplex.bench.machine import machine_info
from loraplex.bench.merge_cost import MergeBench, MergeCost, cost_table, measure
from loraplex.bench.random_adapter import ModelShape
from loraplex.bench.server_process import ServerProcess
from loraplex.cli.bench_run import rate_bar
from loraplex.cli.output import to_stderr, to_stdout


def run(model: Path, arguments: Sequence[str], bench: MergeBench, output: Path) -> bool:
    """Measure, print the table and write `output`; return whether all requests completed.

    Raises:
        ServerProcessError: if the server does not start; its log is on stderr.
        LoraplexClientError: if a merge fails.
    """
    with tempfile.TemporaryDirectory(prefix="loraplex-merge-") as scratch:
        folders = w16.make_adapters(Path(scratch) / "adapters", shape=ModelShape.of(model))
        export = Path(scratch) / "export"
        export.mkdir()
        own = ["--model", str(model), "--export-root", str(export), *arguments]
        with ServerProcess(own, Path(scratch) / "server.log") as server:
            with to_stderr().status("starting the server"):
                server.wait_until_ready()
            cost, summary = asyncio.run(_measure(server.target, folders, bench))
    document = {**cost.as_json(), "bench": asdict(bench), "server": summary}
    document |= {"machine": machine_info(), "commit": current_commit()}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    to_stdout().print(cost_table(cost))
    to_stderr().print(f"wrote {output}", markup=False)
    return not document["failed_requests"]


async def _measure(target: str, folders: Sequence[Path], bench: MergeBench) -> tuple[MergeCost, dict[str, Any]]:
    async with load_client(target) as client:
        with rate_bar() as bar:
            await w16.upload_adapters(client, folders)
            tokens = 2 * bench.repeat * w16.workload_of("mixed").requests * bench.tokens
            task = bar.add_task("output tokens", total=tokens)
            cost = await measure(client, bench, lambda new: bar.advance(task, new))
        return cost, await w16.server_summary(client)
