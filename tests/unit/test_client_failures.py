"""Both clients against a scripted server: typed errors, retries, deadlines, cancellation."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator

import grpc
import pytest
from google.rpc import error_details_pb2

from loraplex.client import (
    AlreadyExistsError,
    AsyncClient,
    CancelledError,
    ChannelOptions,
    DeadlineError,
    FieldViolation,
    InternalError,
    InvalidRequestError,
    LoraplexClientError,
    NotFoundError,
    PreconditionError,
    ResourceExhaustedError,
    RetryPolicy,
    UnavailableError,
)
from tests.unit.both_clients import FAST, Both
from tests.unit.fake_server import (
    FakeServer,
    error_info,
    fail,
    hang,
    pieces,
    retry_info,
    then_fail,
    unavailable,
)

Code = grpc.StatusCode


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def both(kind: str, server: FakeServer) -> AsyncIterator[Both]:
    both = Both(kind, server.target)
    yield both
    await both.close()


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (Code.NOT_FOUND, NotFoundError),
        (Code.INVALID_ARGUMENT, InvalidRequestError),
        (Code.ALREADY_EXISTS, AlreadyExistsError),
        (Code.FAILED_PRECONDITION, PreconditionError),
        (Code.RESOURCE_EXHAUSTED, ResourceExhaustedError),
        (Code.DEADLINE_EXCEEDED, DeadlineError),
        (Code.CANCELLED, CancelledError),
        (Code.INTERNAL, InternalError),
        (Code.UNIMPLEMENTED, LoraplexClientError),
    ],
)
async def test_each_code_has_its_error(
    both: Both, server: FakeServer, code: grpc.StatusCode, error: type[LoraplexClientError]
) -> None:
    behaviour = fail(code, "what went wrong", error_info("A_REASON"))
    server.script["GetAdapter"].append(behaviour)
    server.script["GenerateStream"].append(behaviour)
    for raised in (both.call("get_adapter", "a"), both.finish(both.client.stream("hi"), "collect")):
        with pytest.raises(LoraplexClientError) as caught:
            await raised
        assert type(caught.value) is error
        assert (caught.value.code, str(caught.value)) == (code, "what went wrong")
        assert (caught.value.reason, caught.value.request_id) == ("A_REASON", "from-the-server")
    assert len(server.seen["GetAdapter"]) == len(server.seen["GenerateStream"]) == 1


async def test_field_violations(both: Both, server: FakeServer) -> None:
    bad_request = error_details_pb2.BadRequest()
    bad_request.field_violations.add(field="sampling.n", description="must be within 1 and 64")
    server.script["Generate"].append(fail(Code.INVALID_ARGUMENT, "bad", bad_request, error_info("INVALID")))
    with pytest.raises(InvalidRequestError) as caught:
        await both.call("generate", "hi", n=65)
    assert caught.value.violations == (FieldViolation("sampling.n", "must be within 1 and 64"),)


async def test_bind_violations_and_report(both: Both, server: FakeServer) -> None:
    failure = error_details_pb2.PreconditionFailure()
    failure.violations.add(type="BIND", subject="x_proj", description="the base has no x_proj")
    info = error_info("ADAPTER_DOES_NOT_FIT", report_id="rep-1", violation_count="168")
    server.script["RegisterAdapter"].append(fail(Code.FAILED_PRECONDITION, "does not fit", failure, info))
    with pytest.raises(PreconditionError) as caught:
        await both.call("register_adapter", "a", "/adapters/a")
    assert caught.value.violations == (FieldViolation("x_proj", "the base has no x_proj"),)
    assert (caught.value.violation_count, caught.value.report_id) == (168, "rep-1")


async def test_unavailable_is_tried_again(both: Both, server: FakeServer) -> None:
    server.script["Generate"].extend([unavailable(), unavailable()])
    assert (await both.call("generate", "hi")).text == "base says hi"
    ids = {seen.metadata["x-request-id"] for seen in server.seen["Generate"]}
    assert (len(server.seen["Generate"]), len(ids)) == (3, 1)


async def test_unavailable_is_given_up_after_the_last_attempt(both: Both, server: FakeServer) -> None:
    server.script["Generate"].extend([unavailable()] * 10)
    with pytest.raises(UnavailableError, match="draining"):
        await both.call("generate", "hi")
    assert len(server.seen["Generate"]) == FAST.max_attempts


async def test_no_server(kind: str, server: FakeServer) -> None:
    with FakeServer() as gone:
        target = gone.target
    both = Both(kind, target)
    with pytest.raises(UnavailableError):
        await both.call("generate", "hi")
    with pytest.raises(UnavailableError):
        await both.finish(both.client.stream("hi"), "collect")
    await both.close()


async def test_a_server_that_listens_but_has_not_started_is_waited_for(kind: str) -> None:
    server = FakeServer()
    both = Both(kind, server.target)
    waiting = asyncio.ensure_future(both.call("generate", "hi"))
    await asyncio.sleep(0.7)
    assert not waiting.done()
    with server:
        assert (await waiting).text == "base says hi"
    await both.close()


async def test_exhausted_is_tried_again_only_where_the_server_says_when(both: Both, server: FakeServer) -> None:
    full = fail(Code.RESOURCE_EXHAUSTED, "the queue is full", retry_info(0.01), error_info("QUEUE_FULL"))
    server.script["Generate"].extend([full, full])
    assert (await both.call("generate", "hi")).text == "base says hi"
    assert len(server.seen["Generate"]) == 3
    server.script["Generate"].append(fail(Code.RESOURCE_EXHAUSTED, "too large", error_info("TOO_LARGE")))
    with pytest.raises(ResourceExhaustedError, match="too large") as caught:
        await both.call("generate", "hi")
    assert caught.value.retry_after_s is None
    assert len(server.seen["Generate"]) == 4


async def test_a_wait_past_the_deadline_is_not_begun(both: Both, server: FakeServer) -> None:
    full = fail(Code.RESOURCE_EXHAUSTED, "the queue is full", retry_info(3600))
    server.script["Generate"].append(full)
    with pytest.raises(ResourceExhaustedError) as caught:
        await both.call("generate", "hi", timeout=30.0)
    assert caught.value.retry_after_s == 3600


async def test_an_oversize_message_is_sent_once(both: Both, server: FakeServer) -> None:
    with pytest.raises(ResourceExhaustedError):
        await both.call("generate", "x" * (3 * 1024**2))
    assert server.seen["Generate"] == []


async def test_the_client_refuses_to_send_what_is_over_its_own_limit(kind: str, server: FakeServer) -> None:
    both = Both(kind, server.target, options=ChannelOptions(max_message_bytes=1000))
    with pytest.raises(ResourceExhaustedError):
        await both.call("generate", "x" * 2000)
    await both.close()


async def test_a_stream_is_tried_again_before_its_first_message(both: Both, server: FakeServer) -> None:
    server.script["GenerateStream"].extend([unavailable(), unavailable()])
    assert (await both.finish(both.client.stream("hi"), "collect")).text == "Hello wörld"
    assert len(server.seen["GenerateStream"]) == 3


async def test_a_stream_is_not_tried_again_after_its_first_message(both: Both, server: FakeServer) -> None:
    server.script["GenerateStream"].append(then_fail(pieces("a", "b")[:2], unavailable()))
    items = both.items(both.client.stream("hi"))
    assert [(await anext(items)).text, (await anext(items)).text] == ["a", "b"]
    with pytest.raises(UnavailableError):
        await anext(items)
    assert len(server.seen["GenerateStream"]) == 1


async def test_closing_a_stream_cancels_the_call(both: Both, server: FakeServer) -> None:
    server.script["GenerateStream"].append(then_fail(pieces("a")[:1], hang))
    stream = both.client.stream("hi")
    async for piece in both.items(stream):
        assert piece.text == "a"
        break
    await both.close_stream(stream)
    assert await asyncio.to_thread(server.seen["GenerateStream"][0].ended.wait, 10)
    assert [piece async for piece in both.items(stream)] == []


async def test_leaving_a_with_block_cancels_the_call(both: Both, server: FakeServer) -> None:
    server.script["GenerateStream"].append(then_fail(pieces("a")[:1], hang))
    if both.is_async:
        async with both.client.stream("hi") as stream:
            await anext(stream)
    else:
        with both.client.stream("hi") as stream:
            await asyncio.to_thread(next, stream)
    assert await asyncio.to_thread(server.seen["GenerateStream"][0].ended.wait, 10)


async def test_closing_a_stream_that_is_waited_for(both: Both, server: FakeServer) -> None:
    server.script["GenerateStream"].append(then_fail(pieces("a")[:1], hang))
    stream = both.client.stream("hi")
    items = both.items(stream)
    await anext(items)
    waiting = asyncio.ensure_future(anext(items))
    await asyncio.sleep(0.05)
    await both.close_stream(stream)
    with pytest.raises(CancelledError):
        await waiting


async def test_cancelling_a_task_cancels_its_call(server: FakeServer) -> None:
    server.script["Generate"].append(hang)
    async with AsyncClient(server.target) as client:
        task = asyncio.create_task(client.generate("hi"))
        while not server.seen["Generate"]:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.seen["Generate"][0].ended.wait, 10)


async def test_the_deadline_reaches_the_server_and_ends_the_call(both: Both, server: FakeServer) -> None:
    server.script["Generate"].append(hang)
    server.script["GenerateStream"].append(then_fail(pieces("a")[:1], hang))
    with pytest.raises(DeadlineError):
        await both.call("generate", "hi", timeout=0.3)
    with pytest.raises(DeadlineError):
        await both.finish(both.client.stream("hi", timeout=0.3), "collect")
    for method in ("Generate", "GenerateStream"):
        remaining = server.seen[method][0].time_remaining_s
        assert remaining is not None
        assert 0 < remaining < 0.35  # gRPC rounds it up a little on the wire


async def test_the_clients_own_timeout_and_none(both: Both, server: FakeServer) -> None:
    await both.call("generate", "hi")
    await both.call("generate", "hi", timeout=math.inf)
    limited, unlimited = (seen.time_remaining_s for seen in server.seen["Generate"])
    assert limited is not None
    assert 0 < limited < 21  # the header rounds up
    assert unlimited is None or unlimited > 1e6
    with pytest.raises(ValueError, match="timeout"):
        await both.call("generate", "hi", timeout=0)


async def test_the_deadline_covers_the_retries(kind: str, server: FakeServer) -> None:
    both = Both(kind, server.target, retry=RetryPolicy(initial_backoff_s=0.3, jitter=0))
    server.script["Generate"].extend([unavailable(), hang])
    with pytest.raises(DeadlineError):
        await both.call("generate", "hi", timeout=0.6)
    await both.close()
    first, second = (seen.time_remaining_s for seen in server.seen["Generate"])
    assert first is not None
    assert second is not None
    # The back-off lies between them, however slow the machine.
    assert second < first - 0.25


async def test_values_that_fit_no_field_are_refused_without_a_call(both: Both, server: FakeServer) -> None:
    for keywords, name in (({"max_tokens": 2**31}, "sampling.max_tokens"), ({"seed": -1}, "sampling.seed")):
        with pytest.raises(InvalidRequestError) as caught:
            await both.call("generate", "hi", **keywords)
        assert caught.value.violations[0].field == name
    with pytest.raises(InvalidRequestError, match="prompt"):
        await both.call("generate", "\udcff")
    with pytest.raises(TypeError):
        await both.call("generate", "hi", max_token=3)
    assert server.seen["Generate"] == []
