"""AdapterService: the registry over gRPC. Blocking registry calls run on the executor, never on the event loop."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Executor
from contextlib import aclosing, contextmanager
from typing import Any, TypeVar

import grpc.aio

from loraplex.adapters.alias import AliasTarget
from loraplex.adapters.records import AdapterFilter, AdapterRecord, Unregistration
from loraplex.adapters.registry import AdapterRegistry
from loraplex.adapters.sources import is_remote
from loraplex.server.engine.client import EngineClient
from loraplex.server.engine.stats import FreedMemory
from loraplex.server.errors import InvalidRequestError
from loraplex.server.metrics import Metrics
from loraplex.server.rpc.adapter_messages import (
    adapter_message,
    changed_metadata,
    given_metadata,
    report_message,
    target_messages,
    version_messages,
)
from loraplex.server.rpc.download import send_download
from loraplex.server.rpc.residency import Residency
from loraplex.server.rpc.upload import receive_upload
from loraplex.v1 import adapter_pb2 as pb
from loraplex.v1 import adapter_pb2_grpc

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]


class AdapterServicer(adapter_pb2_grpc.AdapterServiceServicer):
    """Answers every call on adapters; tells the engine and the metrics what changed."""

    def __init__(
        self,
        registry: AdapterRegistry,
        engine: EngineClient,
        metrics: Metrics,
        vocab_size: int,
        executor: Executor,
        fetching: Executor,
    ) -> None:
        """`fetching` reads URLs: while slow ones are read, everything else is answered."""
        self._registry = registry
        self._engine = engine
        self._residency = Residency(registry, engine, metrics)
        self._vocab_size = vocab_size
        self._executor = executor
        self._fetching = fetching
        self._fetches: set[threading.Event] = set()
        """Set for those that are to end."""
        self._changing: set[asyncio.Task[Any]] = set()

    async def RegisterAdapter(self, request: pb.RegisterAdapterRequest, context: Context) -> pb.RegisterAdapterResponse:
        """Register a folder on the server's disk, or what is at a URL."""
        if not request.path:
            raise InvalidRequestError.of("path", "is empty: give the adapter's folder on the server or a URL")
        change = given_metadata(request, self._vocab_size)
        executor = self._fetching if is_remote(request.path) else self._executor
        with self._fetch() as cancelled:
            call = functools.partial(
                self._registry.register,
                request.name,
                request.path,
                change,
                request.expected_digest,
                cancelled=cancelled,
            )
            registration = await self._change(call, executor)
        return pb.RegisterAdapterResponse(
            adapter=self._message(registration.record), previous_digest=registration.previous_digest or ""
        )

    async def UploadAdapter(
        self, request_iterator: AsyncIterator[pb.UploadAdapterRequest], context: Context
    ) -> pb.UploadAdapterResponse:
        """Take an adapter's files, then register them like a folder."""
        try:
            registration = await receive_upload(request_iterator, self._registry, self._vocab_size, self._executor)
        finally:
            self._residency.follow()
        return pb.UploadAdapterResponse(
            adapter=self._message(registration.record), previous_digest=registration.previous_digest or ""
        )

    async def DownloadAdapter(
        self, request: pb.DownloadAdapterRequest, context: Context
    ) -> AsyncIterator[pb.DownloadAdapterResponse]:
        """Send the stored files; they stay until the last one is sent, whatever becomes of the name."""
        async with aclosing(send_download(request.name, self._registry, self._executor)) as messages:
            async for message in messages:
                yield message

    async def UnregisterAdapter(
        self, request: pb.UnregisterAdapterRequest, context: Context
    ) -> pb.UnregisterAdapterResponse:
        """Take the name away; requests in flight go on, and are waited for as long as was asked."""
        wait_s = request.drain_timeout_s if request.HasField("drain_timeout_s") else None
        if wait_s is not None and not wait_s >= 0:
            raise InvalidRequestError.of("drain_timeout_s", f"must be 0 or more, got {wait_s}")
        gone, leaving = await self._whole(self._dismiss(request.name))
        departure = await self._residency.departure(gone, leaving, wait_s)
        return pb.UnregisterAdapterResponse(
            digest=gone.digest,
            active_requests=departure.active_requests,
            device_bytes_freed=departure.memory.device_bytes,
            host_bytes_freed=departure.memory.host_bytes,
            disk_bytes_freed=departure.disk_bytes,
        )

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: Context) -> pb.ListAdaptersResponse:
        """Return one page, by name."""
        page = await self._call(
            self._registry.list,
            AdapterFilter(request.name_contains, tuple(request.tags), request.owner),
            request.page_size,
            request.page_token,
        )
        return pb.ListAdaptersResponse(
            adapters=[self._message(record) for record in page.records], next_page_token=page.next_page_token
        )

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: Context) -> pb.GetAdapterResponse:
        """Return one adapter, by name, alias, or either with a version; and the name's other versions."""
        record = await self._call(self._registry.get, request.name)
        message = self._message(record)
        message.versions.extend(version_messages(record.adapter.versions))
        return pb.GetAdapterResponse(adapter=message)

    async def UpdateAdapter(self, request: pb.UpdateAdapterRequest, context: Context) -> pb.UpdateAdapterResponse:
        """Change what may change without a new version."""
        change = changed_metadata(request, self._vocab_size)
        record = await self._call(self._registry.update, request.name, change)
        return pb.UpdateAdapterResponse(adapter=self._message(record))

    async def PinAdapter(self, request: pb.PinAdapterRequest, context: Context) -> pb.PinAdapterResponse:
        """Load the adapter and keep it on the device."""
        await self._change(functools.partial(self._registry.pins.add, request.name), self._executor)
        record = await self._call(self._registry.get, request.name)
        return pb.PinAdapterResponse(adapter=self._message(record))

    async def UnpinAdapter(self, request: pb.UnpinAdapterRequest, context: Context) -> pb.UnpinAdapterResponse:
        """Let the adapter go like any other."""
        await self._change(functools.partial(self._registry.pins.remove, request.name), self._executor)
        record = await self._call(self._registry.get, request.name)
        return pb.UnpinAdapterResponse(adapter=self._message(record))

    async def SetAlias(self, request: pb.SetAliasRequest, context: Context) -> pb.SetAliasResponse:
        """Make or move an alias."""
        targets = [AliasTarget(target.name, target.weight) for target in request.targets]
        previous = await self._call(self._registry.aliases.set, request.alias, targets)
        return pb.SetAliasResponse(previous_targets=target_messages(previous))

    async def RollbackAlias(self, request: pb.RollbackAliasRequest, context: Context) -> pb.RollbackAliasResponse:
        """Give an alias back what it pointed at before."""
        targets = await self._call(self._registry.aliases.rollback, request.alias)
        return pb.RollbackAliasResponse(targets=target_messages(targets))

    async def DeleteAlias(self, request: pb.DeleteAliasRequest, context: Context) -> pb.DeleteAliasResponse:
        """Remove an alias; the adapter stays."""
        await self._call(self._registry.aliases.delete, request.alias)
        return pb.DeleteAliasResponse()

    async def GetBindReport(self, request: pb.GetBindReportRequest, context: Context) -> pb.GetBindReportResponse:
        """Return the findings on every tensor of a refused adapter."""
        report = await self._call(self._registry.bind_report, request.report_id)
        return report_message(request.report_id, report)

    def close(self) -> None:
        """Wait for nothing any more, and fetch nothing."""
        self._residency.close()
        for fetch in self._fetches:
            fetch.set()

    @contextmanager
    def _fetch(self) -> Iterator[threading.Event]:
        """Yield what ends a fetch; it is set when the call ends, a caller that goes away included."""
        cancelled = threading.Event()
        self._fetches.add(cancelled)
        try:
            yield cancelled
        finally:
            self._fetches.discard(cancelled)
            cancelled.set()

    async def _dismiss(self, name: str) -> tuple[Unregistration, asyncio.Task[FreedMemory]]:
        gone = await self._call(self._registry.unregister, name)
        return gone, self._residency.dismiss(gone)

    async def _change(self, function: Callable[[], T], executor: Executor) -> T:
        """Change the registry on a thread, and pass on what follows from it."""

        async def change() -> T:
            try:
                return await asyncio.get_running_loop().run_in_executor(executor, function)
            finally:
                self._residency.follow()

        return await self._whole(change())

    async def _whole(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` to its end, even if the caller goes away: what is changed must be told to the engine."""
        task = asyncio.create_task(coroutine)
        self._changing.add(task)
        task.add_done_callback(self._changing.discard)
        return await asyncio.shield(task)

    async def _call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, lambda: function(*args, **kwargs))

    def _message(self, record: AdapterRecord) -> pb.Adapter:
        resident = record.digest in self._engine.resident
        return adapter_message(record, self._engine.memory(record.digest), resident=resident)
