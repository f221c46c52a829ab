"""Both clients against a scripted server: what they send and what they make of the answers."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from loraplex.client import (
    AliasTarget,
    AsyncClient,
    BindEntry,
    ChatMessage,
    Client,
    DeadlineError,
    DownloadedAdapter,
    DownloadProgress,
    FinishReason,
    HealthStatus,
    InternalError,
    InvalidRequestError,
    MergeBase,
    MergeComparison,
    MergeProgress,
    NotFoundError,
    SamplingOptions,
    SpeedFigures,
    UnavailableError,
    UploadProgress,
    Usage,
)
from loraplex.v1 import adapter_pb2, export_pb2
from tests.unit.both_clients import Both
from tests.unit.fake_server import (
    DIGEST,
    FakeServer,
    adapter,
    answer,
    download,
    fail,
    pieces,
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


async def test_generate(both: Both, server: FakeServer) -> None:
    generation = await both.call(
        "generate", "hi", "sql", 0.0, sampling=SamplingOptions(top_k=3, seed=1), seed=7, request_id="mine", tenant="t"
    )
    assert generation.text == "sql says hi"
    assert generation.usage == Usage(prompt_tokens=3, completion_tokens=4, cached_tokens=2)
    assert generation.choices[0].finish_reason is FinishReason.LENGTH
    assert (generation.adapter_digest, generation.request_id) == (DIGEST, "mine")
    (seen,) = server.seen["Generate"]
    assert seen.metadata["x-loraplex-adapter"] == "sql"
    assert seen.metadata["x-request-id"] == "mine"
    assert (seen.request.sampling.top_k, seen.request.sampling.seed, seen.request.tenant) == (3, 7, "t")
    assert seen.request.adapters[0].scale == 0
    assert seen.request.adapters[0].HasField("scale")


async def test_the_base_alone_is_an_empty_selection(both: Both, server: FakeServer) -> None:
    await both.call("generate", [ChatMessage("user", "hi")])
    (seen,) = server.seen["Generate"]
    assert [(message.role, message.content) for message in seen.request.chat.messages] == [("user", "hi")]
    assert [entry.name for entry in seen.request.adapters] == [""]
    assert "x-loraplex-adapter" not in seen.metadata
    assert len(seen.metadata["x-request-id"]) == 32


async def test_a_name_that_no_header_can_carry_goes_in_the_message_alone(both: Both, server: FakeServer) -> None:
    await both.call("generate", "hi", "größe\n", request_id="größe")
    (seen,) = server.seen["Generate"]
    assert (seen.request.adapters[0].name, seen.request.request_id) == ("größe\n", "größe")
    assert "x-loraplex-adapter" not in seen.metadata


async def test_stream(both: Both) -> None:
    stream = both.client.stream("hi", "sql", max_tokens=3)
    received = [piece async for piece in both.items(stream)]
    assert [piece.text for piece in received] == ["Hel", "lo", " wörld", ""]
    assert [piece.usage for piece in received] == [None, None, None, Usage(3, 3, 1)]
    generation = await both.finish(stream, "collect")
    assert generation.text == "Hello wörld"
    assert generation.choices[0].token_ids == (0, 1, 2)
    assert generation.choices[0].finish_reason is FinishReason.STOP
    assert (generation.adapter_digest, generation.usage) == (DIGEST, Usage(3, 3, 1))


async def test_a_stream_without_its_last_message_is_no_generation(both: Both, server: FakeServer) -> None:
    server.script["GenerateStream"].append(answer(pieces("a")[:1]))
    with pytest.raises(InternalError, match="last message"):
        await both.finish(both.client.stream("hi"), "collect")


async def test_adapters(both: Both, server: FakeServer) -> None:
    registration = await both.call("register_adapter", "a", Path("/adapters/a"), "what it does")
    assert (registration.adapter.name, registration.previous_digest) == ("a", "sha256:old")
    assert registration.adapter.created_at == datetime.fromtimestamp(1_700_000_000, UTC)
    assert registration.adapter.target_modules == ("q_proj", "v_proj")
    request = server.seen["RegisterAdapter"][0].request
    assert (request.path, request.description) == ("/adapters/a", "what it does")
    for method in ("get_adapter", "pin_adapter", "unpin_adapter"):
        assert (await both.call(method, "b")).name == "b"
    assert (await both.call("update_adapter", "c", description="")).name == "c"
    assert server.seen["UpdateAdapter"][0].request.HasField("description")
    await both.call("update_adapter", "c")
    assert not server.seen["UpdateAdapter"][1].request.HasField("description")
    assert (await both.call("unregister_adapter", "a")).active_requests == 2
    assert await both.call("set_alias", "prod", "a") == (AliasTarget("before"),)
    await both.call("set_alias", "prod", {"a@1": 9, "a": 1})
    asked = [[(t.name, t.weight) for t in seen.request.targets] for seen in server.seen["SetAlias"]]
    assert asked == [[("a", 1)], [("a@1", 9), ("a", 1)]]
    with pytest.raises(InvalidRequestError, match="targets"):
        await both.call("set_alias", "prod", {"a\ud800": 1})
    assert await both.call("rollback_alias", "prod") == (AliasTarget("a@1", 9), AliasTarget("b"))
    assert await both.call("delete_alias", "prod") is None
    report = await both.call("get_bind_report", "rep-1")
    assert report.problems == (BindEntry("x_proj", "", 0, 0.0, "the base has no x_proj"),)
    assert len(report.entries) == 2


async def test_listing_goes_through_all_pages(both: Both, server: FakeServer) -> None:
    for names, token in (("ab", "next"), ("cd", "last"), ("e", "")):
        page = adapter_pb2.ListAdaptersResponse(adapters=[adapter(name) for name in names], next_page_token=token)
        server.script["ListAdapters"].append(answer(page))
    adapters = await both.call("list_adapters", "x", page_size=2)
    assert [entry.name for entry in adapters] == list("abcde")
    assert [seen.request.page_token for seen in server.seen["ListAdapters"]] == ["", "next", "last"]
    assert {(seen.request.name_contains, seen.request.page_size) for seen in server.seen["ListAdapters"]} == {("x", 2)}


async def test_merge(both: Both, server: FakeServer) -> None:
    stream = both.client.merge_adapter("a", "out", base=MergeBase.DEQUANTIZED, scale=0.5)
    received = [progress async for progress in both.items(stream)]
    speed = (SpeedFigures("unmerged", 40.0, 8.0, 2.0), SpeedFigures("merged", 50.0, 8.0, 2.0))
    comparison = MergeComparison(0.5, 0.75, 0.001, 40)
    assert received == [
        MergeProgress(1, 2, phase="merging"),
        MergeProgress(2, 2, "/exports/m", DIGEST, "", comparison, speed, (DIGEST,)),
    ]
    assert await both.finish(stream, "result") == received[-1]
    (seen,) = server.seen["MergeAdapter"]
    assert (seen.request.base, seen.request.scale) == (export_pb2.MERGE_BASE_DEQUANTIZED, 0.5)
    assert (await both.finish(both.client.merge_adapter("a", "out"), "result")).output_path == "/exports/m"
    assert not server.seen["MergeAdapter"][1].request.HasField("scale")


async def test_a_merge_that_ends_early_has_no_result(both: Both, server: FakeServer) -> None:
    server.script["MergeAdapter"].append(answer([export_pb2.MergeAdapterResponse(tensors_done=1, tensors_total=2)]))
    with pytest.raises(InternalError, match="without saying"):
        await both.finish(both.client.merge_adapter("a", "out"), "result")


async def test_server_info_and_health(both: Both, server: FakeServer) -> None:
    info = await both.call("server_info")
    assert (info.version, info.model, info.max_model_len, info.eos_token_ids) == ("0.1.0", "m", 2048, (2,))
    assert await both.call("health") is HealthStatus.SERVING
    answered = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)
    server.script["Check"].append(answer(answered))
    assert await both.call("health", "loraplex.v1.GenerationService") is HealthStatus.NOT_SERVING
    assert server.seen["Check"][1].request.service == "loraplex.v1.GenerationService"


async def test_waiting_until_ready(kind: str) -> None:
    with FakeServer() as first:
        port = first.port
    not_serving = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)
    both = Both(kind, f"127.0.0.1:{port}")
    waiting = asyncio.ensure_future(both.call("wait_until_ready", 30.0))
    await asyncio.sleep(0.3)
    server = FakeServer(port)
    server.script["Check"].extend([answer(not_serving), unavailable()])
    with server:
        await waiting
        assert len(server.seen["Check"]) == 3
    with pytest.raises(DeadlineError, match=r"was not ready within 0\.3 s"):
        await both.call("wait_until_ready", 0.3)
    await both.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 10_000)
    (tmp_path / "README.md").write_text("")
    (tmp_path / "training_args.bin").write_bytes(b"not ours to send")
    return tmp_path


async def test_upload(both: Both, server: FakeServer, folder: Path) -> None:
    states: list[UploadProgress] = []
    registration = await both.call("upload_adapter", "a", str(folder), "what it does", progress=states.append)
    assert registration.adapter.name == "a"
    (seen,) = server.seen["UploadAdapter"]
    header = seen.request[0].header
    sent: dict[str, bytes] = {file.name: b"" for file in header.files}
    assert list(sent) == ["adapter_config.json", "adapter_model.safetensors", "README.md"]
    for part in seen.request[1:]:
        sent[part.chunk.file] += part.chunk.data
    for file in header.files:
        assert sent[file.name] == (folder / file.name).read_bytes()
        assert (file.size_bytes, file.sha256) == (len(sent[file.name]), hashlib.sha256(sent[file.name]).hexdigest())
    assert max(len(part.chunk.data) for part in seen.request) <= 1024**2
    assert seen.metadata["x-loraplex-adapter"] == "a"
    assert [state.bytes_sent for state in states] == [2, 2 + 2**20, 2 + 2**21, 2_560_002]
    assert {state.bytes_total for state in states} == {2_560_002}


async def test_a_rollback_is_not_tried_again(both: Both, server: FakeServer) -> None:
    server.script["RollbackAlias"].append(unavailable())
    with pytest.raises(UnavailableError):
        await both.call("rollback_alias", "prod")


async def test_download(both: Both, server: FakeServer, tmp_path: Path) -> None:
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(3000)}
    server.script["DownloadAdapter"].extend([unavailable(), answer(download(files))])
    states: list[DownloadProgress] = []
    downloaded = await both.call("download_adapter", "a", tmp_path / "new" / "a", progress=states.append)
    assert downloaded == DownloadedAdapter(DIGEST, tmp_path / "new" / "a")
    assert {path.name: path.read_bytes() for path in downloaded.folder.iterdir()} == files
    assert states == [DownloadProgress(2, 3002), DownloadProgress(3002, 3002)]
    with pytest.raises(InvalidRequestError, match="exists"):
        await both.call("download_adapter", "a", tmp_path / "new" / "a")
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "a"]


WHOLE = download({"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"})
OTHER = download({"adapter_config.json": b"{}", "adapter_model.safetensors": b"weighty"})


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "before it began"),
        (WHOLE[1:], "without announcing"),
        (WHOLE[:2], "did not arrive as"),
        ([*WHOLE[:2], OTHER[2]], "did not arrive as"),
        ([*WHOLE, WHOLE[0]], "something else"),
        (download({"../escape": b"x"}), "something else"),
        ([WHOLE[0], adapter_pb2.DownloadAdapterResponse(chunk=adapter_pb2.UploadChunk(file="x"))], "without"),
    ],
)
async def test_a_download_that_is_not_whole_leaves_nothing(
    both: Both, server: FakeServer, tmp_path: Path, messages: list[adapter_pb2.DownloadAdapterResponse], reason: str
) -> None:
    server.script["DownloadAdapter"].append(answer(messages))
    with pytest.raises(InternalError, match=reason):
        await both.call("download_adapter", "a", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


async def test_a_download_that_fails_midway_leaves_nothing(both: Both, server: FakeServer, tmp_path: Path) -> None:
    server.script["DownloadAdapter"].append(then_fail(WHOLE[:2], fail(Code.NOT_FOUND, "gone")))
    with pytest.raises(NotFoundError):
        await both.call("download_adapter", "a", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


async def test_an_upload_is_not_tried_again_once_it_has_begun(both: Both, server: FakeServer, folder: Path) -> None:
    server.script["UploadAdapter"].append(unavailable())
    with pytest.raises(UnavailableError):
        await both.call("upload_adapter", "a", folder)
    assert len(server.seen["UploadAdapter"]) == 1


async def test_an_upload_that_breaks_on_this_side_says_why(both: Both, server: FakeServer, folder: Path) -> None:
    def stop(state: UploadProgress) -> None:
        raise OSError("the disk is gone")

    server.script["UploadAdapter"].append(fail(Code.INVALID_ARGUMENT, "shorter than announced"))
    with pytest.raises(OSError, match="the disk is gone"):
        await both.call("upload_adapter", "a", folder, progress=stop)


async def test_a_folder_that_is_no_adapter_is_not_sent(both: Both, server: FakeServer, folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InvalidRequestError, match=r"no adapter_model\.safetensors; pickled weights"):
        await both.call("upload_adapter", "a", folder)
    with pytest.raises(InvalidRequestError, match="is not a folder"):
        await both.call("upload_adapter", "a", folder / "nothing")
    assert server.seen["UploadAdapter"] == []


def test_threads_share_a_client(server: FakeServer) -> None:
    texts: list[str] = []
    with Client(server.target) as client:
        threads = [
            threading.Thread(target=lambda name=name: texts.append(client.generate("hi", name).text)) for name in "abcd"
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(texts) == [f"{name} says hi" for name in "abcd"]


def test_an_asyncio_client_may_be_made_before_its_loop(server: FakeServer) -> None:
    client = AsyncClient(server.target)

    async def use() -> str:
        async with client:
            return (await client.generate("hi")).text

    assert asyncio.run(use()) == "base says hi"


def test_both_clients_have_the_same_methods() -> None:
    renamed = {"__aenter__": "__enter__", "__aexit__": "__exit__"}
    methods = [{renamed.get(name, name) for name in vars(kind)} - {"__module__"} for kind in (Client, AsyncClient)]
    assert methods[0] == methods[1]
