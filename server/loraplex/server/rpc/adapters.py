"""AdapterService: the registry over gRPC. Blocking registry calls run on the executor, never on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Executor
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp

from loraplex.adapters.alias import AliasTarget
from loraplex.adapters.binding import BindReport
from loraplex.adapters.metadata import MetadataChange
from loraplex.adapters.records import AdapterRecord
from loraplex.adapters.registry import AdapterRegistry
from loraplex.server.engine.client import EngineClient
from loraplex.server.errors import InvalidRequestError
from loraplex.server.metrics import Metrics
from loraplex.server.rpc.download import send_download
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
        self._pinned: frozenset[str] = frozenset()
        self._follow_pins()

    async def RegisterAdapter(self, request: pb.RegisterAdapterRequest, context: Context) -> pb.RegisterAdapterResponse:
        """Register a folder on the server's disk."""
        if not request.path:
            raise InvalidRequestError.of("path", "is empty: give the adapter's folder on the server")
        registration = await self._call(
            self._registry.register,
            request.name,
            Path(request.path),
            MetadataChange(description=request.description or None),
            request.expected_digest,
        )
        self._registered()
        return pb.RegisterAdapterResponse(
            adapter=self._message(registration.record), previous_digest=registration.previous_digest or ""
        )

    async def UploadAdapter(
        self, request_iterator: AsyncIterator[pb.UploadAdapterRequest], context: Context
    ) -> pb.UploadAdapterResponse:
        """Take an adapter's files, then register them like a folder."""
        registration = await receive_upload(request_iterator, self._registry, self._executor)
        self._registered()
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
        """Take the name away; requests in flight go on."""
        gone = await self._call(self._registry.unregister, request.name)
        self._follow_pins()
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
        record = await self._call(self._registry.update, request.name, MetadataChange(description=description))
        return pb.UpdateAdapterResponse(adapter=self._message(record))

    async def PinAdapter(self, request: pb.PinAdapterRequest, context: Context) -> pb.PinAdapterResponse:
        """Load the adapter and keep it on the device."""
        record = await self._call(self._registry.pin, request.name)
        self._follow_pins()
        return pb.PinAdapterResponse(adapter=self._message(record))

    async def UnpinAdapter(self, request: pb.UnpinAdapterRequest, context: Context) -> pb.UnpinAdapterResponse:
        """Let the adapter go like any other."""
        record = await self._call(self._registry.unpin, request.name)
        self._follow_pins()
        return pb.UnpinAdapterResponse(adapter=self._message(record))

    async def SetAlias(self, request: pb.SetAliasRequest, context: Context) -> pb.SetAliasResponse:
        """Make or move an alias."""
        targets = [AliasTarget(target.name, target.weight) for target in request.targets]
        previous = await self._call(self._registry.aliases.set, request.alias, targets)
        return pb.SetAliasResponse(previous_targets=_targets(previous))

    async def RollbackAlias(self, request: pb.RollbackAliasRequest, context: Context) -> pb.RollbackAliasResponse:
        """Give an alias back what it pointed at before."""
        targets = await self._call(self._registry.aliases.rollback, request.alias)
        return pb.RollbackAliasResponse(targets=_targets(targets))

    async def DeleteAlias(self, request: pb.DeleteAliasRequest, context: Context) -> pb.DeleteAliasResponse:
        """Remove an alias; the adapter stays."""
        await self._call(self._registry.aliases.delete, request.alias)
        return pb.DeleteAliasResponse()

    async def GetBindReport(self, request: pb.GetBindReportRequest, context: Context) -> pb.GetBindReportResponse:
        """Return the findings on every tensor of a refused adapter."""
        report = await self._call(self._registry.bind_report, request.report_id)
        return _report(request.report_id, report)

    async def _call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, lambda: function(*args, **kwargs))

    def _registered(self) -> None:
        self._follow_pins()
        self._count()

    def _follow_pins(self) -> None:
        """Tell the engine which weights are to stay now: a pin on a name follows it from version to version."""
        wanted = self._registry.pinned
        for digest in self._pinned - wanted:
            self._engine.unpin(digest)
        for digest in wanted - self._pinned:
            self._engine.pin(digest)
        self._pinned = wanted

    def _forget_unnamed(self, digest: str) -> None:
        """Drop weights that no name has any more: `digest`, which may not be loaded yet, and older versions."""
        for gone in ({digest} | self._engine.held) - self._registry.digests:
            self._engine.forget(gone)

    def _count(self) -> None:
        self._metrics.set_registered(self._registry.count())

    def _message(self, record: AdapterRecord) -> pb.Adapter:
        created = Timestamp()
        created.FromDatetime(record.created_at)
        return pb.Adapter(
            name=record.name,
            digest=record.digest,
            description=record.metadata.description,
            rank=record.rank,
            target_modules=record.target_modules,
            size_bytes=record.size_bytes,
            create_time=created,
            resident=record.digest in self._engine.resident,
            pinned=record.pinned,
            active_requests=record.active_requests,
            aliases=record.aliases,
            version=record.version.number,
            source=record.version.source,
            kind=record.traits.kind,
            problem=record.problem,
        )


def _targets(targets: Iterable[AliasTarget]) -> list[pb.AliasTarget]:
    return [pb.AliasTarget(name=target.name, weight=target.weight) for target in targets]


def _report(report_id: str, report: BindReport) -> pb.GetBindReportResponse:
    entries = [
        pb.BindEntry(
            subject=entry.subject, module=entry.module, rank=entry.rank, scaling=entry.scaling, problem=entry.problem
        )
        for entry in report.entries
    ]
    return pb.GetBindReportResponse(report_id=report_id, base_fingerprint=report.base_fingerprint, entries=entries)
