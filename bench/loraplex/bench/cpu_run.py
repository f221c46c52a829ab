"""Runs cases against several servers in turn. Starts no server and shows nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from loraplex.bench.load import LoadResult, load_client, run_load
from loraplex.bench.report import Report
from loraplex.bench.step_meter import StepMeter
from loraplex.bench.workload import Workload

WARM_UP_TOKENS = 8
ALONE_TOKENS = 16


@dataclass(frozen=True)
class ServerUnderTest:
    """Where a server listens, and where its metrics are."""

    target: str
    metrics_url: str


@dataclass(frozen=True)
class Measurement:
    """One run: the view from outside, and the server's mean decode step in milliseconds (None: too short to tell)."""

    report: Report
    step_ms: float | None


Measurements = Mapping[str, Mapping[str, Sequence[Measurement]]]
"""Runs by server and case."""


async def run_all(
    servers: Mapping[str, ServerUnderTest],
    cases: Mapping[str, Workload],
    repeat: int,
    on_tokens: Callable[[str, int], None] = lambda _, __: None,
) -> Measurements:
    """Run every case on every server `repeat` times; `on_tokens` hears what runs and of tokens as they come.

    Servers and cases take turns, so that whatever else the machine does meets all of them. Each run comes after a short
    one of the same case, which brings its adapters onto the device and the kernels into shape.
    """
    found: dict[str, dict[str, list[Measurement]]] = {name: {case: [] for case in cases} for name in servers}
    for repetition in range(repeat):
        for case, workload in cases.items():
            for name, server in servers.items():
                seeded = replace(workload, seed=repetition, series=case)
                heard = _labelled(on_tokens, f"{name} {case}")
                found[name][case].append(await measure(server, seeded, heard))
    return found


async def measure(
    server: ServerUnderTest, workload: Workload, on_tokens: Callable[[int], None] = lambda _: None
) -> Measurement:
    """Run `workload` once after a short run of it with other prompts."""
    meter = StepMeter(server.metrics_url, workload.requests * workload.max_tokens)

    def hear(tokens: int) -> None:
        meter.on_tokens(tokens)
        on_tokens(tokens)

    async with load_client(server.target) as client:
        warm_up = replace(workload, seed=-1 - workload.seed, max_tokens=min(WARM_UP_TOKENS, workload.max_tokens))
        await run_load(client, warm_up)
        result = await run_load(client, workload, hear)
    return Measurement(Report.of(result), await meter.step_ms())


async def agreement_with_alone(server: ServerUnderTest, workload: Workload) -> float:
    """Return how much of what requests are answered in one batch they are answered one by one too; 1 is all of it.

    Counted in tokens up to the first difference, over the first few tokens of each request. Near-ties of a quantized
    model may fall the other way in a batch of another size; anything else is a fault.
    """
    batch = replace(workload, max_tokens=min(ALONE_TOKENS, workload.max_tokens))
    async with load_client(server.target) as client:
        together = await run_load(client, batch)
        alone = await run_load(client, replace(batch, concurrency=1))
    return common_share(together, alone)


def common_share(first: LoadResult, second: LoadResult) -> float:
    """Return the share of tokens before the first difference, request by request; failed requests share nothing."""
    total = first.workload.requests * first.workload.max_tokens
    common = 0
    for a, b in zip(first.requests, second.requests, strict=True):
        if a.error or b.error:
            continue
        pairs = list(zip(a.token_ids, b.token_ids, strict=False))
        common += next((at for at, (x, y) in enumerate(pairs) if x != y), len(pairs))
    return common / total


def _labelled(on_tokens: Callable[[str, int], None], label: str) -> Callable[[int], None]:
    return lambda tokens: on_tokens(label, tokens)
