"""Thousands of adapters beside a handful, under the same load and in small memory budgets: what does it cost?

Two servers of one model: one with all adapters, which has budgets for a small share of them, and one with five. Both
get the same requests, drawn by Zipf's law, in turns. Starts no server and shows nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loraplex.bench.cpu_run import ServerUnderTest
from loraplex.bench.load import load_client, run_load
from loraplex.bench.population import Population
from loraplex.bench.process_memory import resident_mb
from loraplex.bench.random_adapter import ModelShape
from loraplex.bench.report import Report
from loraplex.bench.scrape import Scrape
from loraplex.bench.workload import Assignment, Workload
from loraplex.client import AsyncClient

FEW = 5
MIXED_RANKS = (8, 10, 12, 16, 24, 32, 48, 64)
REGISTERING = 4
"""Registrations at a time."""
SAMPLE_TOKENS = 4
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
OnTokens = Callable[[int], None]


@dataclass(frozen=True)
class AdapterBench:
    """What to measure.

    Attributes:
        model: a Hugging Face folder.
        device_share: budget of the device's adapter memory, as a share of what all adapters take.
        host_share: the same of the host's.
        rows: in a batch.
        in_flight: requests at a time; more than rows, so that there is a queue.
        repeat: runs of each server, in turn.
        rounds: of registering, using and unregistering an adapter.
        settled: rounds after which the process's memory is taken for the first time.
    """

    model: Path
    quantization: str = "nf4"
    adapters: int = 2000
    rank: int = 8
    device_share: float = 0.02
    host_share: float = 0.10
    rows: int = 16
    in_flight: int = 32
    requests: int = 96
    max_tokens: int = 128
    repeat: int = 7
    rounds: int = 200
    settled: int = 40
    serve_args: tuple[str, ...] = ()

    def shortened(self) -> AdapterBench:
        """Return the same over few adapters and tokens, with room on the device for as many as there are rows."""
        return replace(
            self, adapters=100, device_share=0.06, rows=4, in_flight=8, requests=24, max_tokens=8, repeat=1, rounds=12,
            settled=6,
        )  # fmt: skip

    @property
    def population(self) -> Population:
        """The adapters of the larger server."""
        return Population(ModelShape.of(self.model), self.rank, self.adapters)

    def budget(self, share: float, item_bytes: int) -> int:
        """Return the bytes that `share` of all adapters take, packed as numbers of `item_bytes`."""
        return int(share * self.adapters) * self.population.parameters * item_bytes

    def arguments(self, root: Path, budgets: Sequence[int] = ()) -> list[str]:
        """Return what `loraplex serve` is told; `budgets` are those of device and host, or else the defaults hold."""
        own = ["--model", str(self.model), "--quantization", self.quantization, "--max-num-seqs", str(self.rows)]
        own += ["--adapter-root", str(root), "--adapter-dtype", "bfloat16"]
        if budgets:
            own += ["--adapter-device-memory", str(budgets[0]), "--adapter-host-memory", str(budgets[1])]
        return [*own, *self.serve_args]

    def workload(self, names: Sequence[str], seed: int) -> Workload:
        """Return one run over these adapters."""
        return Workload(
            concurrency=self.in_flight,
            requests=self.requests,
            max_tokens=self.max_tokens,
            adapters=tuple(names),
            assignment=Assignment.ZIPF,
            seed=seed,
        )

    @property
    def tokens_per_run(self) -> int:
        """Output tokens of one run."""
        return self.requests * self.max_tokens


@dataclass(frozen=True)
class Runs:
    """Reports of both servers, pairs of runs taken in turn; the first pair met empty tiers.

    `filled` is what the larger server's metrics said when its tiers were filled, before the warm runs, and `ended`
    after them.
    """

    cold_few: Report
    cold_many: Report
    few: tuple[Report, ...]
    many: tuple[Report, ...]
    filled: Scrape
    ended: Scrape

    @property
    def all(self) -> tuple[Report, ...]:
        """Every run."""
        return (self.cold_few, self.cold_many, *self.few, *self.many)


async def register(target: str, folders: Sequence[Path], on_progress: Callable[[int], None] = lambda _: None) -> None:
    """Register adapter folders under their names, a few at a time."""
    waiting = iter(folders)
    done = 0

    async def worker(client: AsyncClient, mine: Iterable[Path]) -> None:
        nonlocal done
        for folder in mine:
            await client.register_adapter(folder.name, folder)
            done += 1
            on_progress(done)

    async with load_client(target) as client:
        await asyncio.gather(*(worker(client, waiting) for _ in range(REGISTERING)))


async def compare(
    bench: AdapterBench,
    few: ServerUnderTest,
    many: ServerUnderTest,
    names: Sequence[str],
    on_tokens: OnTokens = lambda _: None,
) -> Runs:
    """Run the load on both servers: first with nothing loaded, then, the tiers filled, `repeat` times in turn."""
    reports: dict[str, list[Report]] = {few.target: [], many.target: []}

    async def run(server: ServerUnderTest, seed: int) -> None:
        chosen = names[:FEW] if server is few else names
        async with load_client(server.target) as client:
            result = await run_load(client, bench.workload(chosen, seed), on_tokens)
        reports[server.target].append(Report.of(result))

    for server in (few, many):
        await run(server, seed=0)
    await fill(bench, many, names)
    filled = Scrape.of(many.metrics_url)
    for repetition in range(1, bench.repeat + 1):
        # Now the one first, now the other: what changes slowly on the machine meets both alike.
        for server in (few, many) if repetition % 2 else (many, few):
            await run(server, seed=repetition)
    cold_few, *warm_few = reports[few.target]
    cold_many, *warm_many = reports[many.target]
    return Runs(cold_few, cold_many, tuple(warm_few), tuple(warm_many), filled, Scrape.of(many.metrics_url))


async def fill(bench: AdapterBench, server: ServerUnderTest, names: Sequence[str]) -> None:
    """Let the tiers come to rest: three times as many short requests as the host pool holds adapters."""
    requests = max(bench.rows, int(3 * bench.host_share * bench.adapters))
    workload = replace(bench.workload(names, seed=-1), requests=requests, max_tokens=1, prompt_tokens=4)
    async with load_client(server.target) as client:
        await run_load(client, workload)


async def waste_of_mixed_ranks(bench: AdapterBench, server: ServerUnderTest, root: Path) -> float:
    """Return how much more device memory a mixed population takes than its numbers, as a share of the latter.

    The server must have room for all of it, and nothing on the device yet.
    """
    populations = [Population(ModelShape.of(bench.model), rank, 1) for rank in MIXED_RANKS]
    folders = [folder for population in populations for folder in population.write(root)]
    await register(server.target, folders)
    async with load_client(server.target) as client:
        for folder in folders:
            await client.generate("Once", folder.name, max_tokens=1)
    taken = Scrape.of(server.metrics_url).value("loraplex_adapter_memory_bytes", tier="device")
    needed = sum(population.parameters for population in populations) * DTYPE_BYTES["bfloat16"]
    return taken / needed - 1


async def memory_of_rounds(
    bench: AdapterBench, target: str, pid: int, folders: Sequence[Path], on_progress: Callable[[int], None]
) -> tuple[float, float]:
    """Register, use and unregister other adapters again and again.

    Returns:
        The server process's resident MB after `settled` rounds, and at the end.
    """
    before = 0.0
    async with load_client(target) as client:
        for number in range(bench.rounds):
            folder = folders[number % len(folders)]
            await client.register_adapter("round", folder)
            await client.generate("Once upon a time", "round", max_tokens=SAMPLE_TOKENS, ignore_eos=True)
            await client.unregister_adapter("round")
            on_progress(number + 1)
            if number + 1 == bench.settled:
                before = resident_mb(pid)
    return before, resident_mb(pid)
