"""Start and stop of the whole server: model, engine, registry, services, health, metrics."""

from __future__ import annotations

import asyncio
import logging
import shutil
import signal
import socket
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from loraplex.adapters.fetch import MAX_FETCHES
from loraplex.adapters.registry import AdapterRegistry
from loraplex.server.config import ServerConfig
from loraplex.server.engine.build import build_engine, device_limits
from loraplex.server.engine.client import EngineClient
from loraplex.server.errors import LoraplexError, ModelLoadError
from loraplex.server.metrics import Metrics
from loraplex.server.models.loader import LoadedModel, load_model
from loraplex.server.rpc.adapters import AdapterServicer
from loraplex.server.rpc.export import ExportServicer, ExportSource
from loraplex.server.rpc.generation import GenerationServicer, ModelLimits
from loraplex.server.rpc.interceptors import CallInterceptor
from loraplex.server.rpc.merge_runner import THREADS
from loraplex.server.rpc.server_info import ServerServicer, server_info
from loraplex.server.speed import SpeedSettings
from loraplex.server.template_queue import TemplateQueue
from loraplex.server.template_renderer import TemplateRenderer
from loraplex.server.tokenizer import Tokenizer
from loraplex.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    export_pb2,
    export_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

logger = logging.getLogger(__name__)

SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (generation_pb2, "GenerationService"),
        (adapter_pb2, "AdapterService"),
        (export_pb2, "ExportService"),
        (server_pb2, "ServerService"),
    )
)


@dataclass(frozen=True)
class _Parts:
    """What a running server is stopped through; `cleanup` gives back the rest."""

    calls: CallInterceptor
    grpc_server: grpc.aio.Server
    health: HealthServicer
    engine: EngineClient
    cleanup: AsyncExitStack


class Server:
    """A serving process's one server; made by `start`."""

    def __init__(self, config: ServerConfig, parts: _Parts, port: int, metrics_port: int) -> None:
        self.port = port
        """The gRPC port that was taken; differs from the configured one if that is 0."""
        self.metrics_port = metrics_port
        self.failed = asyncio.Event()
        """Set if the engine dies."""
        self._config = config
        self._parts = parts
        parts.engine.on_failure = self.failed.set
        if parts.engine.failed:  # before anybody listened
            self.failed.set()

    @classmethod
    async def start(cls, config: ServerConfig) -> Server:
        """Take the ports, load the model, register the configured adapters and begin to serve.

        Raises:
            OSError: if a port is taken.
            LoraplexError: if the model cannot be served or the state folder not be used.
        """
        calls = CallInterceptor()
        grpc_server = grpc.aio.server(interceptors=[calls], options=_channel_options(config))
        # The ports first: a taken one is found before the model is loaded, not after. gRPC's own is not held meanwhile,
        # or clients would connect and wait for an answer that nobody gives yet.
        _check_free(config.host, config.port)
        metrics = Metrics()
        async with AsyncExitStack() as cleanup:
            metrics_port = _serve_metrics(metrics, config, cleanup)
            engine, health = await _assemble(config, grpc_server, metrics, cleanup)
            port = _bind(grpc_server, config.host, config.port)
            await grpc_server.start()
            await _set_health(health, health_pb2.HealthCheckResponse.SERVING)
            return cls(config, _Parts(calls, grpc_server, health, engine, cleanup.pop_all()), port, metrics_port)

    async def stop(self, grace_s: float | None = None) -> None:
        """Say NOT_SERVING, refuse what is new, let what runs finish within the grace time, then end the rest."""
        grace = self._config.grace_period_s if grace_s is None else grace_s
        parts = self._parts
        await _set_health(parts.health, health_pb2.HealthCheckResponse.NOT_SERVING)
        await parts.calls.drain(grace)
        await parts.engine.close()
        # A second for the last replies to reach their clients.
        await parts.grpc_server.stop(1.0)
        await parts.cleanup.aclose()


async def serve(config: ServerConfig, on_ready: Callable[[Server], None] = lambda _: None) -> None:
    """Serve until SIGINT or SIGTERM, then stop gracefully; a second signal stops at once.

    Raises:
        OSError: if a port is taken.
        LoraplexError: if the server cannot start, or if the engine dies.
    """
    loop = asyncio.get_running_loop()
    stop_now = asyncio.Event()
    stop_soon = asyncio.Event()

    def on_signal() -> None:
        (stop_now if stop_soon.is_set() else stop_soon).set()

    server = await Server.start(config)
    # Not before: until there is something to finish, a signal ends the process as usual.
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    on_ready(server)
    await _first(stop_soon.wait(), server.failed.wait())
    if not server.failed.is_set():
        logger.info("stopping: running requests have %g s to finish", config.grace_period_s)
    stopping = asyncio.create_task(server.stop(0 if server.failed.is_set() else None))
    await _first(asyncio.shield(stopping), stop_now.wait())
    if not stopping.done():
        logger.info("stopping at once: a second signal came")
        stopping.cancel()
        await asyncio.wait([stopping])
        await server.stop(0)
    elif not stopping.cancelled():
        stopping.result()
    if server.failed.is_set():
        raise LoraplexError("the engine died; its log has the reason")


async def _first(*waits: Awaitable[object]) -> None:
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()


def _channel_options(config: ServerConfig) -> Sequence[tuple[str, int]]:
    return (
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        # Without this a second server on the same port would start and take half of the requests.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    )


def _check_free(host: str, port: int) -> None:
    """Find out before the model is loaded whether the port can be had.

    Raises:
        OSError: if it cannot.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port or --host"
        ) from error


def _bind(grpc_server: grpc.aio.Server, host: str, port: int) -> int:
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        return grpc_server.add_insecure_port(target)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {target}: the port is taken or the address is not ours") from error


def _serve_metrics(metrics: Metrics, config: ServerConfig, cleanup: AsyncExitStack) -> int:
    host, port = config.metrics_host, config.metrics_port
    try:
        taken, stop = metrics.serve(host, port)
    except OSError as error:
        raise OSError(
            f"cannot serve metrics on {host}:{port}: {error.strerror or error}; choose another --metrics-port"
        ) from error
    cleanup.push_async_callback(asyncio.to_thread, stop)
    return taken


async def _assemble(
    config: ServerConfig, grpc_server: grpc.aio.Server, metrics: Metrics, cleanup: AsyncExitStack
) -> tuple[EngineClient, HealthServicer]:
    """Load the model, put every service on `grpc_server` and start the engine; `cleanup` learns how to undo it."""
    model = await asyncio.to_thread(load_model_and_threads, config)
    tokenizer = await asyncio.to_thread(Tokenizer.load, model.path)
    templates = TemplateQueue(TemplateRenderer())
    cleanup.push_async_callback(templates.close)
    limits = device_limits(model, config.engine)
    registry = await asyncio.to_thread(_open_registry, config, model, cleanup)
    engine = EngineClient(
        lambda publish: build_engine(model, tokenizer, config.engine, registry.load, metrics, publish, limits=limits)
    )
    await asyncio.to_thread(register_folders, registry, config.adapters)
    for warning in registry.warnings:
        logger.warning("adapter %s", warning)
    metrics.set_max_rows(config.engine.max_num_seqs)
    metrics.set_model(_model_labels(config, model))
    # Three pools, so that a request never waits behind administration, nor that behind a slow source; matrix products
    # and adapters' chat templates have their own threads. More for sources than are read at once: the others check what
    # was read, or refuse.
    admission = _executor("admission", cleanup)
    administration = _executor("administration", cleanup)
    model_limits = ModelLimits(model.vocab_size, limits.max_model_len)
    health = HealthServicer()
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(
        GenerationServicer(engine, registry, tokenizer, templates, model_limits, admission), grpc_server
    )
    fetching = _executor("fetching", cleanup, 2 * MAX_FETCHES)
    adapters = AdapterServicer(registry, engine, metrics, model.vocab_size, administration, fetching)
    cleanup.callback(adapters.close)
    adapter_pb2_grpc.add_AdapterServiceServicer_to_server(adapters, grpc_server)
    held = replace(SpeedSettings.of(config.model, THREADS), quantization=model.quantization)
    source = ExportSource(model.path, held)
    export_pb2_grpc.add_ExportServiceServicer_to_server(
        ExportServicer(registry, source, config.export_root, administration), grpc_server
    )
    server_pb2_grpc.add_ServerServiceServicer_to_server(ServerServicer(server_info(config, model, limits)), grpc_server)
    health_pb2_grpc.add_HealthServicer_to_server(health, grpc_server)
    reflection.enable_server_reflection(
        (*SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME), grpc_server
    )
    engine.start()
    cleanup.push_async_callback(engine.close)
    return engine, health


def _open_registry(config: ServerConfig, model: LoadedModel, cleanup: AsyncExitStack) -> AdapterRegistry:
    root = config.state_dir
    if root is None:
        root = Path(tempfile.mkdtemp(prefix="loraplex-"))
        cleanup.callback(shutil.rmtree, root, ignore_errors=True)
    registry = AdapterRegistry(root, model.base, (*config.adapter_roots, *config.adapters), config.sources)
    cleanup.callback(registry.close)
    return registry


def _executor(name: str, cleanup: AsyncExitStack, max_workers: int = 4) -> ThreadPoolExecutor:
    executor = ThreadPoolExecutor(max_workers, thread_name_prefix=name)
    cleanup.push_async_callback(asyncio.to_thread, executor.shutdown)
    return executor


def load_model_and_threads(config: ServerConfig) -> LoadedModel:
    """Set the number of compute threads and load the base model.

    Raises:
        ModelLoadError: if it cannot be served.
    """
    import torch

    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    options = config.model
    return load_model(
        options.model,
        quantization=options.quantization,
        dtype=options.dtype,
        device=options.device,
        weight_execution=options.weight_execution,
        max_model_len=config.engine.max_model_len,
    )


def register_folders(registry: AdapterRegistry, folders: Sequence[Path]) -> None:
    """Register every adapter in `folders`: a folder is an adapter or holds adapters, each named after its folder.

    One that does not fit is logged and left out; the others are served. What a name has had before stays as it is: a
    later version that a client registered is not undone by a restart.

    Raises:
        ModelLoadError: if one of `folders` does not exist.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ModelLoadError(f"--adapters {folder}: no such folder")
        own = (folder / "adapter_config.json").is_file()
        candidates = [folder] if own else sorted(p.parent for p in folder.glob("*/adapter_config.json"))
        if not candidates:
            logger.warning("--adapters %s holds no adapter (no */adapter_config.json)", folder)
        for candidate in candidates:
            try:
                record = registry.register(candidate.resolve().name, candidate, restore=False).record
            except LoraplexError as error:
                logger.error("adapter %s is left out: %s", candidate, error)
            else:
                logger.info("adapter %s: %s, rank %d", record.name, record.digest, record.rank)


def _model_labels(config: ServerConfig, model: LoadedModel) -> dict[str, str]:
    return {
        "model": config.served_model_name or Path(config.model.model).name,
        "architecture": model.architecture,
        "quantization": model.quantization,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device,
    }


async def _set_health(health: HealthServicer, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
    for service in ("", *SERVICES):
        await health.set(service, status)
