"""What gRPC itself brings: health, reflection, deadlines, cancellation, limits, and how a server stops."""

from __future__ import annotations

import threading
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from loraplex.client import Client
from loraplex.client.errors import (
    DeadlineError,
    InvalidRequestError,
    LoraplexClientError,
    ResourceExhaustedError,
    UnavailableError,
)
from loraplex.client.results import HealthStatus
from loraplex.client.retry import RetryPolicy
from loraplex.server.config import MIB, EngineConfig
from loraplex.server.rpc.server import SERVICES
from loraplex.v1 import generation_pb2, generation_pb2_grpc
from tests.integration.serving import LONG, Folders, RunningServer, eventually, fitting_adapter


def test_health_of_the_server_and_of_each_service(client: Client) -> None:
    assert len(SERVICES) == 4
    for service in ("", *SERVICES):
        assert client.health(service) is HealthStatus.SERVING
    with pytest.raises(LoraplexClientError) as raised:
        client.health("no.such.Service")
    assert raised.value.code is grpc.StatusCode.NOT_FOUND


def test_reflection_is_enough_to_call_the_server(server: RunningServer) -> None:
    with grpc.insecure_channel(server.target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert set(SERVICES) < set(database.get_services())
        pool = DescriptorPool(database)
        service = pool.FindServiceByName("loraplex.v1.GenerationService")
        method = service.methods_by_name["Generate"]
        request: Any = GetMessageClass(method.input_type)(text="The quick brown")
        request.sampling.max_tokens = 3
        request.sampling.ignore_eos = True
        call = channel.unary_unary(
            f"/{service.full_name}/{method.name}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        assert len(call(request, timeout=20).choices[0].token_ids) == 3


@pytest.mark.parametrize("streamed", [False, True], ids=["generate", "stream"])
def test_deadline_ends_the_request_on_the_server_too(server: RunningServer, client: Client, streamed: bool) -> None:
    options = {"max_tokens": LONG, "ignore_eos": True, "timeout": 0.5}
    stream = client.stream("The quick", "alpha", **options) if streamed else None  # type: ignore[arg-type]
    with pytest.raises(DeadlineError) as raised:
        stream.collect() if stream else client.generate("The quick", "alpha", **options)  # type: ignore[arg-type]
    assert raised.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: server.is_idle, "the row and its blocks are free")
    eventually(lambda: client.get_adapter("alpha").active_requests == 0, "the adapter is released")


def test_cancelled_streams_free_rows_blocks_and_adapters(server: RunningServer, client: Client) -> None:
    assert server.is_idle
    streams = [
        client.stream("The quick", adapter, max_tokens=LONG, ignore_eos=True) for adapter in ("", "alpha", "beta")
    ]
    for stream in streams:
        next(stream)
    eventually(lambda: server.metric("num_requests_running") == 3, "three rows run")
    assert server.metric("kv_cache_usage_perc") > 0
    assert client.get_adapter("alpha").active_requests == 1
    for stream in streams:
        stream.close()
    eventually(lambda: server.is_idle, "rows and blocks are free")
    eventually(lambda: client.get_adapter("alpha").active_requests == 0, "the adapter is released")


def test_cancelled_unary_call_frees_its_row(server: RunningServer, client: Client) -> None:
    with grpc.insecure_channel(server.target) as channel:
        request = generation_pb2.GenerateRequest(
            text="x",
            adapters=[generation_pb2.AdapterSelection(name="alpha")],
            sampling=generation_pb2.SamplingParameters(max_tokens=LONG, ignore_eos=True, n=3),
        )
        call = generation_pb2_grpc.GenerationServiceStub(channel).Generate.future(request, timeout=60)
        eventually(lambda: server.metric("num_requests_running") == 3, "three choices run")
        call.cancel()
        eventually(lambda: server.is_idle, "rows and blocks are free")
    eventually(lambda: client.get_adapter("alpha").active_requests == 0, "the adapter is released")


def test_vanished_connection_frees_its_rows(server: RunningServer) -> None:
    with server.client() as leaving:
        next(leaving.stream("x", max_tokens=LONG, ignore_eos=True))
    eventually(lambda: server.is_idle, "rows and blocks are free")


def test_oversize_message_is_refused_and_not_tried_again(server: RunningServer) -> None:
    text = "x" * (server.config.max_message_bytes + 1)
    with grpc.insecure_channel(server.target, [("grpc.max_send_message_length", -1)]) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.RpcError) as raised:
            stub.Generate(generation_pb2.GenerateRequest(text=text), timeout=30)
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    # A retry would come after a wait that this call has no time for.
    with server.client(RetryPolicy(initial_backoff_s=1000)) as client, pytest.raises(ResourceExhaustedError) as typed:
        client.generate(text)
    assert typed.value.retry_after_s is None


def test_full_queue_says_when_to_come_back_and_the_client_does(folders: Folders) -> None:
    engine = EngineConfig(kv_cache_memory=8 * MIB, max_num_seqs=1, max_waiting=1, threads=1)
    with RunningServer(folders, engine=engine) as server, server.client() as client:
        client.register_adapter("one", fitting_adapter(folders.adapters / "one"))
        running = client.stream("x", max_tokens=LONG, ignore_eos=True)
        next(running)
        waiting = client.stream("x", max_tokens=4, ignore_eos=True)
        eventually(lambda: server.metric("num_requests_waiting") == 1, "one waits")
        with pytest.raises(ResourceExhaustedError) as raised:
            client.generate("x", "one")
        assert raised.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert raised.value.retry_after_s is not None
        assert client.get_adapter("one").request_count == 0, "a refused request is no use of the adapter"
        threading.Timer(0.3, running.close).start()
        with server.client(RetryPolicy(max_attempts=50)) as patient:
            answer = patient.generate("x", max_tokens=2, ignore_eos=True)
        assert len(answer.choices[0].token_ids) == 2
        assert len(waiting.collect().choices[0].token_ids) == 4


def test_graceful_stop(folders: Folders) -> None:
    server = RunningServer(folders)
    with server.client() as client:
        stream = client.stream("x", max_tokens=1500, ignore_eos=True)
        next(stream)
        wait = server.begin_stop(60)
        eventually(lambda: client.health() is HealthStatus.NOT_SERVING, "the server says that it stops")
        assert client.health("loraplex.v1.GenerationService") is HealthStatus.NOT_SERVING
        for call in (lambda: client.generate("x"), client.server_info, client.list_adapters):
            with pytest.raises(UnavailableError, match="stopping"):
                call()
        assert len(stream.collect().choices[0].token_ids) == 1500
        wait()
        with pytest.raises(UnavailableError):
            client.health()


def test_stop_without_grace_ends_what_runs(folders: Folders) -> None:
    server = RunningServer(folders)
    with server.client() as client:
        stream = client.stream("x", max_tokens=LONG, ignore_eos=True)
        next(stream)
        server.stop(0)
        with pytest.raises(UnavailableError):
            stream.collect()


def test_request_ids_and_versions_come_back(server: RunningServer, client: Client) -> None:
    digest = client.get_adapter("alpha").digest
    request = generation_pb2.GenerateRequest(
        text="x", request_id="mine", adapters=[generation_pb2.AdapterSelection(name="alpha")]
    )
    with grpc.insecure_channel(server.target) as channel:
        _, call = generation_pb2_grpc.GenerationServiceStub(channel).Generate.with_call(request, timeout=20)
        trailers = dict(call.trailing_metadata())
        assert trailers["x-request-id"] == "mine"
        assert trailers["x-loraplex-adapter-digest"] == digest
        failing = generation_pb2_grpc.GenerationServiceStub(channel).Generate.future(
            generation_pb2.GenerateRequest(request_id="mine"), timeout=20
        )
        assert dict(failing.trailing_metadata())["x-request-id"] == "mine"
    assert client.generate("x", max_tokens=1, request_id="same").request_id == "same"
    with pytest.raises(InvalidRequestError) as raised:
        client.generate("", request_id="wrong")
    assert raised.value.request_id == "wrong"
