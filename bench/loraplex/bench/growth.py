"""How the cost of a decode step grows with rows, distinct adapters, rank and context: sweeps over one server."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from loraplex.bench.cpu_run import Measurements
from loraplex.bench.random_adapter import ModelShape, write_adapter
from loraplex.bench.workload import Assignment, Workload

ROWS = ADAPTERS = (1, 2, 4, 8, 16, 32, 64, 128)
RANKS = (4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (128, 256, 512, 1024, 2048, 4096)
SHARED_RANK = 8
RANK_ROWS = RANK_ADAPTERS = 4
CONTEXT_ROWS = 4
TOKENS = 64
SERVE_ARGS = ("--max-num-seqs", "128", "--kv-cache-memory", "2GiB", "--adapter-device-memory", "2GiB")
"""What a server needs to hold all of a sweep at once."""


@dataclass(frozen=True)
class Sweep:
    """One thing that grows while everything else stays: a workload for each of its values."""

    what: str
    x: str
    points: Mapping[int, Workload]


def sweeps(most: int = ROWS[-1], tokens: int = TOKENS) -> dict[str, Sweep]:
    """Return the sweeps, leaving out values above `most` (of rows, adapters and ranks) for a short form."""
    rows = [count for count in ROWS if count <= most]
    many = rows[-1]
    ranks = [rank for rank in RANKS if rank <= 2 * most]
    contexts = [context for context in CONTEXTS if context <= 32 * most]
    rank8 = tuple(name_of(SHARED_RANK, index) for index in range(many))
    return {
        "rows": Sweep("rows, no adapter", "rows", {n: Workload(n, n, max_tokens=tokens) for n in rows}),
        "adapters": Sweep(
            f"{many} rows, distinct adapters of rank {SHARED_RANK}",
            "adapters",
            {n: Workload(many, many, 30, tokens, rank8[:n], Assignment.ROUND_ROBIN) for n in rows},
        ),
        "rank": Sweep(
            f"{RANK_ROWS} rows with {RANK_ADAPTERS} adapters",
            "rank",
            {
                rank: Workload(RANK_ROWS, RANK_ROWS, 30, tokens, names_of(rank), Assignment.ROUND_ROBIN)
                for rank in ranks
            },
        ),
        "context": Sweep(
            f"{CONTEXT_ROWS} rows, no adapter",
            "prompt tokens, about",
            {context: Workload(CONTEXT_ROWS, CONTEXT_ROWS, context, tokens) for context in contexts},
        ),
    }


def name_of(rank: int, index: int) -> str:
    """Return the name of adapter `index` of those of `rank`."""
    return f"r{rank}-{index:03d}"


def names_of(rank: int) -> tuple[str, ...]:
    """Return the names of the adapters of `rank` that the sweep over ranks uses."""
    return tuple(name_of(rank, index) for index in range(RANK_ADAPTERS))


def adapter_names(chosen: Mapping[str, Sweep]) -> list[str]:
    """Return the adapters that the sweeps name."""
    workloads = [workload for sweep in chosen.values() for workload in sweep.points.values()]
    return sorted({name for workload in workloads for name in workload.adapters})


def make_growth_adapters(
    root: Path, names: Sequence[str], shape: ModelShape, on_progress: Callable[[int], None] = lambda _: None
) -> list[Path]:
    """Write the adapters named below `root` and return their folders; `on_progress` hears how many there are."""
    folders = []
    for number, name in enumerate(names):
        rank = int(name.removeprefix("r").split("-")[0])
        write_adapter(root / name, rank, seed=number, shape=shape)
        folders.append(root / name)
        on_progress(number + 1)
    return folders


def case_of(sweep: str, value: int) -> str:
    """Return the name of one point's case."""
    return f"{sweep}={value}"


def growth_document(chosen: Mapping[str, Sweep], measurements: Measurements, server: str) -> dict[str, Any]:
    """Return every point's medians: output tokens per second, the server's decode step and the whole prompt's time."""
    found = measurements[server]
    document: dict[str, Any] = {}
    for name, sweep in chosen.items():
        points = []
        for value in sweep.points:
            runs = found[case_of(name, value)]
            steps = [run.step_ms for run in runs if run.step_ms is not None]
            points.append(
                {
                    "x": value,
                    "tok_s": round(statistics.median(run.report.output_throughput for run in runs), 2),
                    "step_ms": round(statistics.median(steps), 3) if steps else None,
                    "ttft_ms": round(statistics.median(run.report.latency["ttft"].median for run in runs), 1),
                    "failed": sum(run.report.failed for run in runs),
                }
            )
        document[name] = {"what": sweep.what, "x": sweep.x, "points": points}
    return {"quantization": server, "sweeps": document}


def growth_table(document: Mapping[str, Any]) -> Table:
    """Show a document of `growth_document`, a line for each point."""
    table = Table(title=f"How the cost grows, {document['quantization']}: medians")
    table.add_column("sweep")
    for column in ("value", "tok/s", "decode step, ms", "first token, ms"):
        table.add_column(column, justify="right")
    for sweep in document["sweeps"].values():
        for point in sweep["points"]:
            step = f"{point['step_ms']:.2f}" if point["step_ms"] is not None else "-"
            label = f"{sweep['x']} ({sweep['what']})"
            table.add_row(label, str(point["x"]), f"{point['tok_s']:.1f}", step, f"{point['ttft_ms']:.0f}")
    return table
