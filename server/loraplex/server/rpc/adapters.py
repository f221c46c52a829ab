"""AdapterService: the registry over gRPC. Blocking registry calls run on the executor, never on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp

from loraplex.adapters.binding import BindReport
from loraplex.adapters.records import AdapterRecord, Registration
from loraplex.adapters.registry import AdapterRegistry
from loraplex.server.engine.client import EngineClient
from loraplex.server.errors import InvalidRequestError
from loraplex.server.metrics import Metrics
from loraplex.server.rpc.upload import receive_upload
from loraplex.v1 import adapter_pb2 as pb
from loraplex.v1 import adapter_pb2_grpc

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]
DEFAULT_PAGE_SIZE = 100


class AdapterServicer(adapter_pb2_grpc.AdapterServiceServicer):
    """Answers every call on adapters; tells the engine and the metrics what changed."""

    def __init__(self, registry: AdapterRegistry, engine: EngineClient, metrics: Metrics, executor: Executor) -> None:
        self._registry = registry
        self._engine = engine
        self._metrics = metrics
        self._executor = executor
        self._pinned: set[str] = set()

    async def RegisterAdapter(self, request: pb.RegisterAdapterRequest, context: Context) -> pb.RegisterAdapterResponse:
        """Register a folder on the server's disk."""
        if not request.path:
            raise InvalidRequestError.of("path", "is empty: give the adapter's folder on the server")
        registration = await self._call(
            self._registry.register, request.name, Path(request.path), description=request.description
        )
        self._registered(registration)
        return pb.RegisterAdapterResponse(
            adapter=self._message(registration.record), previous_digest=registration.previous_digest or ""
        )

    async def UploadAdapter(
        self, request_iterator: AsyncIterator[pb.UploadAdapterRequest], context: Context
    ) -> pb.UploadAdapterResponse:
        """Take an adapter's files, then register them like a folder."""
        registration = await receive_upload(request_iterator, self._registry, self._executor)
        self._registered(registration)
        return pb.UploadAdapterResponse(
            adapter=self._message(registration.record), previous_digest=registration.previous_digest or ""
        )

    async def UnregisterAdapter(
        self, request: pb.UnregisterAdapterRequest, context: Context
    ) -> pb.UnregisterAdapterResponse:
        """Take the name away; requests in flight go on."""
        gone = await self._call(self._registry.unregister, request.name)
        self._forget_unnamed(gone.digest)
        self._metrics.forget_adapter(request.name)
        self._count()
        return pb.UnregisterAdapterResponse(digest=gone.digest, active_requests=gone.active_requests)

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: Context) -> pb.ListAdaptersResponse:
        """Return one page, by name."""
        if request.page_size < 0:
            raise InvalidRequestError.of("page_size", f"must not be negative, got {request.page_size}")
        page = await self._call(
            self._registry.list,
            name_contains=request.name_contains,
            page_size=request.page_size or DEFAULT_PAGE_SIZE,
            page_token=request.page_token,
        )
        return pb.ListAdaptersResponse(
            adapters=[self._message(record) for record in page.records], next_page_token=page.next_page_token
        )

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: Context) -> pb.GetAdapterResponse:
        """Return one adapter, by name, alias or name@digest."""
        return pb.GetAdapterResponse(adapter=self._message(await self._call(self._registry.get, request.name)))

    async def UpdateAdapter(self, request: pb.UpdateAdapterRequest, context: Context) -> pb.UpdateAdapterResponse:
        """Change what may change without a new version."""
        description = request.description if request.HasField("description") else None
        record = await self._call(self._registry.update, request.name, description=description)
        return pb.UpdateAdapterResponse(adapter=self._message(record))

    async def PinAdapter(self, request: pb.PinAdapterRequest, context: Context) -> pb.PinAdapterResponse:
        """Load the adapter and keep it on the device."""
        record = await self._call(self._registry.resolve, request.name)
        self._pinned.add(record.digest)
        self._engine.pin(record.digest)
        return pb.PinAdapterResponse(adapter=self._message(record))

    async def UnpinAdapter(self, request: pb.UnpinAdapterRequest, context: Context) -> pb.UnpinAdapterResponse:
        """Let the adapter go like any other."""
        record = await self._call(self._registry.get, request.name)
        self._pinned.discard(record.digest)
        self._engine.unpin(record.digest)
        return pb.UnpinAdapterResponse(adapter=self._message(record))

    async def SetAlias(self, request: pb.SetAliasRequest, context: Context) -> pb.SetAliasResponse:
        """Make or move an alias."""
        if len(request.targets) != 1:
            raise InvalidRequestError.of("targets", f"must be one, got {len(request.targets)}")
        previous = await self._call(self._registry.set_alias, request.alias, request.targets[0].name)
        targets = [pb.AliasTarget(name=previous, weight=1)] if previous else []
        return pb.SetAliasResponse(previous_targets=targets)

    async def DeleteAlias(self, request: pb.DeleteAliasRequest, context: Context) -> pb.DeleteAliasResponse:
        """Remove an alias; the adapter stays."""
        await self._call(self._registry.delete_alias, request.alias)
        return pb.DeleteAliasResponse()

    async def GetBindReport(self, request: pb.GetBindReportRequest, context: Context) -> pb.GetBindReportResponse:
        """Return the findings on every tensor of a refused adapter."""
        report = await self._call(self._registry.bind_report, request.report_id)
        return _report(request.report_id, report)

    async def _call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, lambda: function(*args, **kwargs))

    def _registered(self, registration: Registration) -> None:
        """A pin follows its name to the new version."""
        previous, digest = registration.previous_digest, registration.record.digest
        if previous in self._pinned and previous != digest:
            self._pinned.discard(previous)
            self._engine.unpin(previous)
            self._pinned.add(digest)
            self._engine.pin(digest)
        self._count()

    def _forget_unnamed(self, digest: str) -> None:
        """Drop weights that no name has any more: `digest`, which may not be on the device yet, and older versions."""
        for gone in ({digest} | self._pinned | self._engine.resident) - self._registry.digests:
            self._pinned.discard(gone)
            self._engine.forget(gone)

    def _count(self) -> None:
        self._metrics.set_registered(self._registry.count())

    def _message(self, record: AdapterRecord) -> pb.Adapter:
        created = Timestamp()
        created.FromDatetime(record.created_at)
        return pb.Adapter(
            name=record.name,
            digest=record.digest,
            description=record.description,
            rank=record.rank,
            target_modules=record.target_modules,
            size_bytes=record.size_bytes,
            create_time=created,
            resident=record.digest in self._engine.resident,
            pinned=record.digest in self._pinned,
            active_requests=record.active_requests,
            aliases=record.aliases,
        )


def _report(report_id: str, report: BindReport) -> pb.GetBindReportResponse:
    entries = [
        pb.BindEntry(
            subject=entry.subject, module=entry.module, rank=entry.rank, scaling=entry.scaling, problem=entry.problem
        )
        for entry in report.entries
    ]
    return pb.GetBindReportResponse(report_id=report_id, base_fingerprint=report.base_fingerprint, entries=entries)
