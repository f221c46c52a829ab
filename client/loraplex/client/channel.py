"""How a channel is set up and which stubs hang on it; the same for the sync and the asyncio client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grpc_health.v1 import health_pb2_grpc

from loraplex.v1 import adapter_pb2_grpc, export_pb2_grpc, generation_pb2_grpc, server_pb2_grpc

DEFAULT_TARGET = "127.0.0.1:50051"
MIB = 1024**2
_LOOPBACK = ("localhost:", "127.", "[::1]:", "unix:")


@dataclass(frozen=True)
class ChannelOptions:
    """Settings of the connection.

    Attributes:
        max_message_bytes: largest message sent or taken.
        keepalive_time_s: after this long without traffic in a running call, ask whether the server is still there.
        keepalive_timeout_s: give the connection up when it does not answer for this long.
        connect_timeout_s: how long one attempt to connect may take.
        max_reconnect_backoff_s: longest pause between attempts to connect.
    """

    max_message_bytes: int = 16 * MIB
    keepalive_time_s: float = 30.0
    keepalive_timeout_s: float = 10.0
    connect_timeout_s: float = 10.0
    max_reconnect_backoff_s: float = 2.0

    def for_target(self, target: str) -> list[tuple[str, int]]:
        """Return the gRPC channel arguments for a connection to `target`."""
        arguments = [
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.keepalive_time_ms", round(self.keepalive_time_s * 1000)),
            ("grpc.keepalive_timeout_ms", round(self.keepalive_timeout_s * 1000)),
            ("grpc.keepalive_permit_without_calls", 0),
            ("grpc.http2.max_pings_without_data", 0),
            # gRPC's own first pause of a second would outlast our retries: a server that just came up would be missed.
            ("grpc.initial_reconnect_backoff_ms", 100),
            # Despite its name the time that one attempt to connect may take.
            ("grpc.min_reconnect_backoff_ms", round(self.connect_timeout_s * 1000)),
            ("grpc.max_reconnect_backoff_ms", round(self.max_reconnect_backoff_s * 1000)),
        ]
        if target.startswith(_LOOPBACK):
            # An http_proxy in the environment would otherwise be asked to reach this machine.
            arguments.append(("grpc.enable_http_proxy", 0))
        return arguments


class Stubs:
    """The services of one server on one channel.

    The generated stubs serve `grpc.Channel` and `grpc.aio.Channel` alike; they are typed as the former here.
    """

    def __init__(self, channel: Any) -> None:
        """Make the stubs of `channel`, sync or asyncio."""
        self.generation: generation_pb2_grpc.GenerationServiceStub = generation_pb2_grpc.GenerationServiceStub(channel)
        self.adapters: adapter_pb2_grpc.AdapterServiceStub = adapter_pb2_grpc.AdapterServiceStub(channel)
        self.export: export_pb2_grpc.ExportServiceStub = export_pb2_grpc.ExportServiceStub(channel)
        self.server: server_pb2_grpc.ServerServiceStub = server_pb2_grpc.ServerServiceStub(channel)
        self.health: Any = health_pb2_grpc.HealthStub(channel)
