"""A gRPC server for tests of client and command: every method of loraplex.v1, answering as a test scripts it."""

from __future__ import annotations

import hashlib
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self

import grpc
from google.protobuf import any_pb2, message_factory
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from grpc_status import rpc_status

from loraplex.v1 import adapter_pb2, export_pb2, generation_pb2, server_pb2

DIGEST = "sha256:" + "ab" * 32
Behaviour = Callable[[Any, grpc.ServicerContext], Any]


@dataclass
class Seen:
    """One call as the server saw it; `request` is a list where the client streams."""

    request: Any
    metadata: dict[str, Any]
    time_remaining_s: float | None
    ended: threading.Event = field(default_factory=threading.Event)


def answer(response: Any) -> Behaviour:
    """Answer with `response`: one message, or a list of them for a streaming method."""
    return lambda request, context: response


def fail(code: grpc.StatusCode, message: str, *details: Any) -> Behaviour:
    """Refuse the call with `details` in the trailers."""

    def behaviour(request: Any, context: grpc.ServicerContext) -> Any:
        status = status_pb2.Status(code=code.value[0], message=message)
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        # Not abort_with_status: it would put the status's metadata in the place of all other.
        packed_status = rpc_status.to_status(status).trailing_metadata
        context.set_trailing_metadata((("x-request-id", "from-the-server"), *packed_status))
        context.abort(code, message)

    return behaviour


def unavailable() -> Behaviour:
    return fail(grpc.StatusCode.UNAVAILABLE, "the server is draining")


def retry_info(seconds: float) -> error_details_pb2.RetryInfo:
    detail = error_details_pb2.RetryInfo()
    detail.retry_delay.FromNanoseconds(round(seconds * 1e9))
    return detail


def error_info(reason: str, **metadata: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain="loraplex", metadata=metadata)


def pieces(*texts: str) -> list[generation_pb2.GenerateStreamResponse]:
    """Return a stream that says `texts`, then finishes."""
    messages = [
        generation_pb2.GenerateStreamResponse(
            request_id="r", choices=[generation_pb2.Choice(text=text, token_ids=[number])]
        )
        for number, text in enumerate(texts)
    ]
    last = generation_pb2.Choice(finish_reason=generation_pb2.FINISH_REASON_STOP)
    usage = generation_pb2.Usage(prompt_tokens=3, completion_tokens=len(texts), cached_tokens=1)
    end = generation_pb2.GenerateStreamResponse(request_id="r", choices=[last], usage=usage, adapter_digest=DIGEST)
    return [*messages, end]


def then_fail(messages: list[Any], behaviour: Behaviour) -> Behaviour:
    """Stream `messages`, then go on with `behaviour`."""

    def run(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield from messages
        yield from behaviour(request, context)

    return run


def hang(request: Any, context: grpc.ServicerContext) -> Any:
    """Answer nothing until the call is over."""
    over = threading.Event()
    if context.add_callback(over.set):
        over.wait(20)
    context.abort(grpc.StatusCode.CANCELLED, "the call was over")


def adapter(name: str) -> adapter_pb2.Adapter:
    message = adapter_pb2.Adapter(
        name=name, digest=DIGEST, description="d", rank=8, target_modules=["q_proj", "v_proj"], size_bytes=2048
    )
    message.create_time.FromSeconds(1_700_000_000)
    message.aliases.append(f"{name}-alias")
    message.version, message.kind, message.source, message.owner = 2, "lora", "hf://org/repo", "me"
    message.tags.extend(["x", "y"])
    message.default_sampling.temperature = 0.7
    message.default_sampling.stop.append("END")
    message.request_count, message.prompt_tokens, message.generation_tokens = 7, 70, 700
    message.last_use_time.FromSeconds(1_700_000_100)
    for number in (2, 1):
        version = message.versions.add(number=number, digest=DIGEST, size_bytes=1024 * number, source="upload")
        version.create_time.FromSeconds(1_700_000_000)
    return message


def download(files: dict[str, bytes]) -> list[adapter_pb2.DownloadAdapterResponse]:
    """Return the messages that bring `files`."""
    announced = [
        adapter_pb2.UploadFile(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in files.items()
    ]
    header = adapter_pb2.DownloadHeader(digest=DIGEST, files=announced)
    chunks = [adapter_pb2.UploadChunk(file=name, data=data) for name, data in files.items()]
    return [
        adapter_pb2.DownloadAdapterResponse(header=header),
        *(adapter_pb2.DownloadAdapterResponse(chunk=chunk) for chunk in chunks),
    ]


def _generate(request: generation_pb2.GenerateRequest, context: grpc.ServicerContext) -> Any:
    choice = generation_pb2.Choice(
        text=f"{request.adapters[0].name or 'base'} says hi", finish_reason=generation_pb2.FINISH_REASON_LENGTH
    )
    usage = generation_pb2.Usage(prompt_tokens=3, completion_tokens=4, cached_tokens=2)
    return generation_pb2.GenerateResponse(
        request_id=request.request_id, choices=[choice], usage=usage, adapter_digest=DIGEST
    )


def _one_adapter(response: Any) -> Behaviour:
    return lambda request, context: response(adapter=adapter(request.name))


DEFAULTS: dict[str, Behaviour] = {
    "Generate": _generate,
    "GenerateStream": answer(pieces("Hel", "lo", " wörld")),
    "RegisterAdapter": lambda request, context: adapter_pb2.RegisterAdapterResponse(
        adapter=adapter(request.name), previous_digest="sha256:old"
    ),
    "UploadAdapter": lambda request, context: adapter_pb2.UploadAdapterResponse(
        adapter=adapter(request[0].header.name)
    ),
    "DownloadAdapter": answer(download({"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"})),
    "UnregisterAdapter": answer(
        adapter_pb2.UnregisterAdapterResponse(
            digest=DIGEST, active_requests=2, device_bytes_freed=1024, host_bytes_freed=2048, disk_bytes_freed=4096
        )
    ),
    "ListAdapters": answer(adapter_pb2.ListAdaptersResponse(adapters=[adapter("a"), adapter("b")])),
    "GetAdapter": _one_adapter(adapter_pb2.GetAdapterResponse),
    "UpdateAdapter": _one_adapter(adapter_pb2.UpdateAdapterResponse),
    "PinAdapter": _one_adapter(adapter_pb2.PinAdapterResponse),
    "UnpinAdapter": _one_adapter(adapter_pb2.UnpinAdapterResponse),
    "SetAlias": answer(
        adapter_pb2.SetAliasResponse(previous_targets=[adapter_pb2.AliasTarget(name="before", weight=1)])
    ),
    "RollbackAlias": answer(
        adapter_pb2.RollbackAliasResponse(
            targets=[adapter_pb2.AliasTarget(name="a@1", weight=9), adapter_pb2.AliasTarget(name="b", weight=1)]
        )
    ),
    "DeleteAlias": answer(adapter_pb2.DeleteAliasResponse()),
    "GetBindReport": answer(
        adapter_pb2.GetBindReportResponse(
            report_id="rep-1",
            base_fingerprint="sha256:base",
            entries=[
                adapter_pb2.BindEntry(subject="q_proj", module="model.layers.0.q_proj", rank=8, scaling=2.0),
                adapter_pb2.BindEntry(subject="x_proj", problem="the base has no x_proj"),
            ],
        )
    ),
    "MergeAdapter": answer(
        [
            export_pb2.MergeAdapterResponse(tensors_done=1, tensors_total=2, phase="merging"),
            export_pb2.MergeAdapterResponse(
                tensors_done=2,
                tensors_total=2,
                output_path="/exports/m",
                adapter_digest=DIGEST,
                adapter_digests=[DIGEST],
                comparison=export_pb2.MergeComparison(
                    max_logit_difference=0.5, top1_agreement=0.75, mean_kl=0.001, positions=40
                ),
                speed=[
                    export_pb2.SpeedFigures(
                        model=side, tokens_per_second=rate, first_token_ms=8.0, inter_token_ms_p50=2.0
                    )
                    for side, rate in (("unmerged", 40.0), ("merged", 50.0))
                ],
            ),
        ]
    ),
    "GetServerInfo": answer(
        server_pb2.GetServerInfoResponse(version="0.1.0", model="m", max_model_len=2048, eos_token_ids=[2])
    ),
    "Check": answer(health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)),
}


class FakeServer:
    """Takes behaviours from `script[method]` in turn, then the default one; `seen[method]` are the calls that came."""

    def __init__(self, port: int = 0, max_message_bytes: int = 2 * 1024**2) -> None:
        self.script: dict[str, deque[Behaviour]] = defaultdict(deque)
        self.seen: dict[str, list[Seen]] = defaultdict(list)
        options = [("grpc.max_receive_message_length", max_message_bytes)]
        self._server = grpc.server(ThreadPoolExecutor(8), options=options)
        for file in (generation_pb2, adapter_pb2, export_pb2, server_pb2, health_pb2):
            for service in file.DESCRIPTOR.services_by_name.values():
                handlers = {method.name: self._handler(method) for method in service.methods}
                generic = grpc.method_handlers_generic_handler(service.full_name, handlers)
                self._server.add_generic_rpc_handlers((generic,))
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.target = f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.stop(None).wait()

    def _handler(self, method: Any) -> grpc.RpcMethodHandler:
        kinds = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
        }

        def behaviour(request: Any, context: grpc.ServicerContext) -> Any:
            return self._serve(method.name, list(request) if method.client_streaming else request, context)

        def streaming(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            yield from self._serve(method.name, request, context)

        return kinds[method.client_streaming, method.server_streaming](
            streaming if method.server_streaming else behaviour,
            request_deserializer=message_factory.GetMessageClass(method.input_type).FromString,
            response_serializer=message_factory.GetMessageClass(method.output_type).SerializeToString,
        )

    def _serve(self, name: str, request: Any, context: grpc.ServicerContext) -> Any:
        metadata = dict(context.invocation_metadata())
        seen = Seen(request, metadata, context.time_remaining())
        context.add_callback(seen.ended.set)
        self.seen[name].append(seen)
        behaviour = self.script[name].popleft() if self.script[name] else DEFAULTS[name]
        return behaviour(request, context)
