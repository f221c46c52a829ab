"""What serving adapters of one rank costs: output tokens a second at 16 rows, on a server of its own, from outside."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median

from loraplex.adapters.training.rank_sweep import ServingCost
from loraplex.bench import w16
from loraplex.bench.cpu_run import ServerUnderTest, measure
from loraplex.bench.load import load_client
from loraplex.bench.random_adapter import ModelShape, write_adapter
from loraplex.bench.server_process import ServerProcess
from loraplex.bench.workload import Assignment, Workload

ROWS = 16


def serving_costs(
    model: Path, quantization: str, trained: Mapping[int, Path], tokens: int, repeat: int, tell: Callable[[str], None]
) -> dict[int, ServingCost]:
    """Serve the `trained` adapters by rank on `model`; return each rank's cost, the median of `repeat` runs.

    The 16 different adapters have random weights on all projections: speed depends on ranks and modules alone. The
    ranks take turns, so that whatever else the machine does meets all of them.

    Raises:
        ServerProcessError: the server does not start.
        KeyError: the model has not Llama's projections.
    """
    shape = ModelShape.of(model)
    with tempfile.TemporaryDirectory(prefix="loraplex-ranks-") as scratch:
        folders = [*trained.values()]
        for rank in trained:
            for index in range(ROWS):
                folder = Path(scratch) / _name(rank, index)
                write_adapter(folder, rank, seed=index, shape=shape)
                folders.append(folder)
        arguments = ["--model", str(model), "--quantization", quantization, "--max-num-seqs", str(ROWS)]
        with ServerProcess(arguments, Path(scratch) / "server.log") as server:
            server.wait_until_ready()
            under_test = ServerUnderTest(server.target, server.metrics_url)
            return asyncio.run(_measure(under_test, trained, folders, tokens, repeat, tell))


async def _measure(
    server: ServerUnderTest,
    trained: Mapping[int, Path],
    folders: list[Path],
    tokens: int,
    repeat: int,
    tell: Callable[[str], None],
) -> dict[int, ServingCost]:
    async with load_client(server.target) as client:
        await w16.upload_adapters(client, folders)
    rates: dict[tuple[int, Assignment], list[float]] = {}
    for repetition in range(repeat):
        for rank, folder in trained.items():
            tell(f"serving rank {rank}, run {repetition + 1} of {repeat}")
            for assignment, names in (
                (Assignment.IDENTICAL, (folder.name,)),
                (Assignment.DISTINCT, tuple(_name(rank, index) for index in range(ROWS))),
            ):
                load = Workload(ROWS, ROWS, max_tokens=tokens, adapters=names, assignment=assignment)
                found = await measure(server, replace(load, seed=repetition, series=f"{rank}-{assignment}"))
                rates.setdefault((rank, assignment), []).append(found.report.output_throughput)
    return {
        rank: ServingCost(
            median(rates[rank, Assignment.IDENTICAL]),
            median(rates[rank, Assignment.DISTINCT]),
        )
        for rank in trained
    }


def _name(rank: int, index: int) -> str:
    return f"random-{rank}-{index:02d}"
