"""The asyncio side: streams, cancellation, draining, and an engine that dies."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace

import pytest

from loraplex.server.engine.client import EngineClient
from loraplex.server.engine.commands import Command
from loraplex.server.engine.request import GenerationRequest, RequestOutput, SamplingParams
from loraplex.server.engine.stats import AdapterMemory, FreedMemory
from loraplex.server.errors import EngineError, UnavailableError
from tests.unit.fakes import expected_tokens, make_engine


def request(name: str = "r", max_tokens: int = 5) -> GenerationRequest:
    return GenerationRequest(name, (1, 2, 3), SamplingParams(max_tokens=max_tokens, seed=0))


async def collect(client: EngineClient, req: GenerationRequest) -> list[int]:
    return [t async for output in client.generate(req) for choice in output.choices for t in choice.token_ids]


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    client = EngineClient(lambda publish: make_engine(publish))
    client.start()
    yield client
    await client.close()


async def test_many_streams_at_once_get_their_own_tokens(client: EngineClient) -> None:
    lengths = range(1, 30)
    answers = await asyncio.gather(*(collect(client, request(f"r{n}", n)) for n in lengths))
    assert answers == [expected_tokens([1, 2, 3], n) for n in lengths]
    assert client.active_requests == 0


async def test_one_request_id_may_be_used_twice_at_once(client: EngineClient) -> None:
    answers = await asyncio.gather(collect(client, request("same", 3)), collect(client, request("same", 7)))
    assert [len(answer) for answer in answers] == [3, 7]


async def first_output(client: EngineClient, req: GenerationRequest) -> RequestOutput:
    async with aclosing(client.generate(req)) as outputs:
        async for output in outputs:
            return output
    raise AssertionError("no output")


async def test_leaving_the_stream_aborts(client: EngineClient) -> None:
    await first_output(client, request(max_tokens=150))
    assert client.active_requests == 0
    while client._engine.active_requests:
        await asyncio.sleep(0.001)
    assert client._engine._parts.blocks.num_free_blocks == 64


async def test_cancelling_the_task_aborts(client: EngineClient) -> None:
    task = asyncio.create_task(collect(client, request(max_tokens=190)))
    while not client._engine.active_requests:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    while client._engine.active_requests:
        await asyncio.sleep(0.001)


async def test_forgetting_waits_for_the_last_request_and_says_what_came_free(client: EngineClient) -> None:
    running = asyncio.create_task(collect(client, replace(request(max_tokens=60), adapter_digest="x")))
    while client.memory("x") == AdapterMemory():
        await asyncio.sleep(0.001)
    abandoned, freed = client.forget("x"), client.forget("x")
    abandoned.cancel()
    assert client.memory("x") == AdapterMemory(device_bytes=1), "the fake host has no budget"
    assert client.held == {"x"}
    assert await running == expected_tokens([1, 2, 3], 60, "x")
    assert await freed == FreedMemory(), "the bytes were the other's"
    assert await client.forget("y") == FreedMemory()
    assert client.memory("x") == AdapterMemory()


async def test_forgetting_ends_with_the_engine() -> None:
    client = EngineClient(lambda publish: make_engine(publish))
    pending = client.forget("x")  # before the engine runs
    await client.close()
    assert await pending == FreedMemory()
    assert await client.forget("x") == FreedMemory()


async def test_closing_ends_what_still_runs() -> None:
    client = EngineClient(lambda publish: make_engine(publish, max_model_len=10**6, num_blocks=10**5))
    client.start()
    running = asyncio.create_task(collect(client, request(max_tokens=100_000)))
    while not client.active_requests:
        await asyncio.sleep(0.001)
    await client.close()
    with pytest.raises(UnavailableError):
        await running
    with pytest.raises(UnavailableError, match="stopping"):
        await collect(client, request())


class BrokenQueue(queue.SimpleQueue[Command]):
    """Stands for any bug in the loop outside of a step's model run."""

    def get_nowait(self) -> Command:
        raise RuntimeError("a bug")


async def test_an_engine_that_dies_fails_everyone_and_says_so() -> None:
    client = EngineClient(lambda publish: make_engine(publish))
    died = asyncio.Event()
    client.on_failure = died.set
    client.start()
    waiting = asyncio.create_task(collect(client, request(max_tokens=190)))
    while not client.active_requests:
        await asyncio.sleep(0.001)

    client._engine._commands = BrokenQueue()
    forgetting = client.forget("x")
    client._engine.wake()
    with pytest.raises(EngineError, match="a bug"):
        await waiting
    assert await asyncio.wait_for(forgetting, 5) == FreedMemory()
    await asyncio.wait_for(died.wait(), 5)
    with pytest.raises(UnavailableError, match="restarted"):
        await collect(client, request())
