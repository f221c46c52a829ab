"""Runs a workload against a server and times every request, from outside. Adds nothing up: see `report`."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from loraplex.bench.workload import PlannedRequest, Workload
from loraplex.client import NO_RETRY, AsyncClient, GenerationPiece, LoraplexClientError, Usage

WRONG_ADAPTER = "WRONG_ADAPTER"
"""The error of a reply that names another adapter version than the one that was asked for."""
REQUEST_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class RequestResult:
    """One request as its sender saw it; times in seconds.

    Attributes:
        adapter: empty for the base.
        error: name of the gRPC status, or WRONG_ADAPTER; empty if the request completed.
        started_s: when it was sent, since the start of the run.
        ttft_s: sending to the first token; None if there was none.
        itl_s: between two messages that carry tokens, in order.
        e2el_s: sending to the last message.
        token_ids: of the first choice.
    """

    index: int
    adapter: str
    error: str
    started_s: float
    ttft_s: float | None
    itl_s: tuple[float, ...]
    e2el_s: float
    prompt_tokens: int
    output_tokens: int
    text: str
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class LoadResult:
    """One run: its wall time and the CPU time of this process in seconds, and the requests in the order of the plan."""

    workload: Workload
    duration_s: float
    cpu_s: float
    requests: tuple[RequestResult, ...]


def load_client(target: str) -> AsyncClient:
    """Return a client that tries nothing twice: a measured failure is a failure."""
    return AsyncClient(target, retry=NO_RETRY, timeout=REQUEST_TIMEOUT_S)


async def run_load(
    client: AsyncClient,
    workload: Workload,
    on_tokens: Callable[[int], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> LoadResult:
    """Send the workload's requests, never more than `concurrency` at once; `on_tokens` hears of tokens as they come.

    A request that fails is part of the result.

    Raises:
        LoraplexClientError: if an adapter of the workload cannot be asked for before the run.
    """
    plan = workload.plan()
    digests = await _digests(client, {request.adapter for request in plan})
    started, cpu_started = clock(), time.process_time()
    sender = _Sender(client, workload, digests, on_tokens, clock, started)
    requests = iter(plan)
    results: list[RequestResult] = []

    async def worker(requests: Iterator[PlannedRequest]) -> None:
        for request in requests:
            results.append(await sender.send(request))

    await asyncio.gather(*(worker(requests) for _ in range(min(workload.concurrency, workload.requests))))
    duration, cpu = clock() - started, time.process_time() - cpu_started
    return LoadResult(workload, duration, cpu, tuple(sorted(results, key=lambda result: result.index)))


async def _digests(client: AsyncClient, names: set[str]) -> Mapping[str, str]:
    """Return the version that each name points at; the base's is empty."""
    adapters = {name: (await client.get_adapter(name)).digest for name in sorted(names) if name}
    return {"": "", **adapters}


class _Recording:
    """What has come of one request so far."""

    def __init__(self, on_tokens: Callable[[int], None], clock: Callable[[], float]) -> None:
        self.token_times: list[float] = []
        self.text = ""
        self.token_ids: list[int] = []
        self.usage = Usage(0, 0)
        self.digest = ""
        self._on_tokens = on_tokens
        self._clock = clock

    def add(self, piece: GenerationPiece) -> None:
        """Take the next message of the stream; one may carry text only, or usage only."""
        self.text += piece.text
        self.token_ids += [token for choice in piece.choices if choice.index == 0 for token in choice.token_ids]
        if piece.usage is not None:  # only the last message has it
            self.usage, self.digest = piece.usage, piece.adapter_digest
        tokens = sum(len(choice.token_ids) for choice in piece.choices)
        if tokens:
            self.token_times.append(self._clock())
            self._on_tokens(tokens)


@dataclass(frozen=True)
class _Sender:
    """Sends single requests of a run and times them."""

    client: AsyncClient
    workload: Workload
    digests: Mapping[str, str]
    on_tokens: Callable[[int], None]
    clock: Callable[[], float]
    started: float

    async def send(self, request: PlannedRequest) -> RequestResult:
        """Return how the request went."""
        recording = _Recording(self.on_tokens, self.clock)
        sent = self.clock()
        error = ""
        try:
            stream = self.client.stream(
                request.prompt,
                request.adapter,
                max_tokens=self.workload.max_tokens,
                temperature=0.0,
                ignore_eos=self.workload.ignore_eos,
            )
            async for piece in stream:
                recording.add(piece)
            if recording.digest != self.digests[request.adapter]:
                error = WRONG_ADAPTER
        except LoraplexClientError as failure:
            error = failure.code.name
        times = recording.token_times
        return RequestResult(
            index=request.index,
            adapter=request.adapter,
            error=error,
            started_s=sent - self.started,
            ttft_s=times[0] - sent if times else None,
            itl_s=tuple(later - earlier for earlier, later in itertools.pairwise(times)),
            e2el_s=self.clock() - sent,
            prompt_tokens=recording.usage.prompt_tokens,
            output_tokens=recording.usage.completion_tokens,
            text=recording.text,
            token_ids=tuple(recording.token_ids),
        )
