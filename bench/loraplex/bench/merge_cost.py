"""What a merge costs the requests that are served beside it: the same load with and without one, in turn.

The load is W16's mixed case. While it runs, one merge after the other runs in the server's merge process; the last one
is left when the load ends.
"""

from __future__ import annotations

import asyncio
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from loraplex.bench.load import run_load
from loraplex.bench.report import Report, best_median_worst
from loraplex.bench.w16 import workload_of
from loraplex.client import AsyncClient

WARM_UP_TOKENS = 8
TIDY_S = 60.0


@dataclass(frozen=True)
class MergeBench:
    """What is measured: `repeat` runs of `tokens` a request of each kind; the merges are into `base`."""

    adapter: str
    base: str
    repeat: int = 3
    tokens: int = 128


@dataclass
class MergeCost:
    """What came of it: runs without and with a merge beside them, and seconds of each whole merge."""

    alone: list[Report] = field(default_factory=list)
    beside: list[Report] = field(default_factory=list)
    idle_merge_s: list[float] = field(default_factory=list)
    busy_merge_s: list[float] = field(default_factory=list)
    mean_kl: float = 0.0
    left: int = 0

    @property
    def kept(self) -> float:
        """Tokens per second beside a merge, as a share of those without; medians."""
        return best_median_worst(self.beside)[1] / best_median_worst(self.alone)[1]

    def as_json(self) -> dict[str, Any]:
        """Return plain values; rates are output tokens per second."""

        def rates(reports: Sequence[Report]) -> dict[str, float]:
            best, median, worst = (round(rate, 2) for rate in best_median_worst(reports))
            return {"best": best, "median": median, "worst": worst}

        def latency(reports: Sequence[Report], name: str) -> float:
            return round(statistics.median(report.latency[name].median for report in reports), 2)

        return {
            "kept": round(self.kept, 4),
            "tokens_per_second_alone": rates(self.alone),
            "tokens_per_second_beside_merge": rates(self.beside),
            "itl_ms_alone": latency(self.alone, "itl"),
            "itl_ms_beside_merge": latency(self.beside, "itl"),
            "failed_requests": sum(report.failed for report in (*self.alone, *self.beside)),
            "merge_s_on_an_idle_server": round(statistics.median(self.idle_merge_s), 2),
            "merges_finished_beside_load": len(self.busy_merge_s),
            "merges_left_at_the_end_of_a_run": self.left,
            "merge_s_beside_load": round(statistics.median(self.busy_merge_s), 2) if self.busy_merge_s else None,
            "merge_mean_kl": self.mean_kl,
        }


async def measure(
    client: AsyncClient, bench: MergeBench, on_tokens: Callable[[int], None] = lambda _: None
) -> MergeCost:
    """Run the load without and with merges, in turn; whatever else the machine does meets both.

    Raises:
        LoraplexClientError: if a merge fails.
    """
    cost = MergeCost()
    merges = _Merges(client, bench, cost)
    await run_load(client, replace(workload_of("mixed", seed=-1), max_tokens=WARM_UP_TOKENS))
    cost.idle_merge_s.append(await merges.once())
    for repetition in range(bench.repeat):
        workload = replace(workload_of("mixed", repetition), max_tokens=bench.tokens)
        cost.alone.append(Report.of(await run_load(client, workload, on_tokens)))
        merging = asyncio.create_task(merges.on_and_on())
        await merges.begin(merging)
        cost.beside.append(Report.of(await run_load(client, workload, on_tokens)))
        if merging.done():
            merging.result()
        merging.cancel()
        with suppress(asyncio.CancelledError):
            await merging
        await merges.left()
        cost.left += 1
    return cost


class _Merges:
    """Merges again and again; each result is removed at once."""

    def __init__(self, client: AsyncClient, bench: MergeBench, cost: MergeCost) -> None:
        self._client = client
        self._bench = bench
        self._cost = cost
        self._count = 0
        self._root = Path()
        self.begun = asyncio.Event()

    async def begin(self, merging: asyncio.Task[None]) -> None:
        """Wait until a merge has sent something, or `merging` has failed."""
        begun = asyncio.create_task(self.begun.wait())
        await asyncio.wait({begun, merging}, return_when=asyncio.FIRST_COMPLETED)
        begun.cancel()

    async def on_and_on(self) -> None:
        """Merge until cancelled."""
        self.begun.clear()
        while True:
            self._cost.busy_merge_s.append(await self.once())

    async def left(self) -> None:
        """Wait until the merge that was left has gone: it would take processor time from the load that comes next."""
        await until_tidy(self._root)

    async def once(self) -> float:
        """Merge once; return its seconds."""
        self._count += 1
        started = time.perf_counter()
        name = f"merged-{self._count}"
        async with self._client.merge_adapter(self._bench.adapter, name, base=self._bench.base) as stream:
            async for _ in stream:
                self.begun.set()
            done = await stream.result()
        seconds = time.perf_counter() - started
        assert done.comparison is not None
        self._cost.mean_kl = done.comparison.mean_kl
        self._root = Path(done.output_path).parent
        await asyncio.to_thread(shutil.rmtree, Path(done.output_path))
        return seconds


async def until_tidy(root: Path) -> None:
    """Wait until no merge has an unfinished folder in `root`.

    Raises:
        TimeoutError: if one stays.
    """
    async with asyncio.timeout(TIDY_S):
        while any(root.glob(".*.partial")):
            await asyncio.sleep(0.05)


def cost_table(cost: MergeCost) -> Table:
    """Show both kinds of runs."""
    table = Table(title=f"Output tokens per second beside a merge: {cost.kept:.1%} of those without")
    table.add_column("load")
    for column in ("best", "median", "worst", "itl p50 ms"):
        table.add_column(column, justify="right")
    for name, reports in (("alone", cost.alone), ("beside a merge", cost.beside)):
        itl = statistics.median(report.latency["itl"].median for report in reports)
        table.add_row(name, *(f"{rate:.1f}" for rate in best_median_worst(reports)), f"{itl:.1f}")
    return table
