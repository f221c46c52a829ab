"""The registry's values as messages of AdapterService, and its requests as the registry's values."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp

from loraplex.adapters.alias import AliasTarget
from loraplex.adapters.binding import BindReport
from loraplex.adapters.directory import Version
from loraplex.adapters.metadata import MetadataChange
from loraplex.adapters.records import AdapterRecord
from loraplex.server.engine.stats import AdapterMemory
from loraplex.server.rpc.sampling import sampling_defaults, sampling_message
from loraplex.v1 import adapter_pb2 as pb


def adapter_message(record: AdapterRecord, memory: AdapterMemory, *, resident: bool) -> pb.Adapter:
    """Return what is told of an adapter everywhere; `resident` says whether it is on the device."""
    metadata, usage = record.metadata, record.usage
    return pb.Adapter(
        name=record.name,
        digest=record.digest,
        description=metadata.description,
        rank=record.rank,
        target_modules=record.target_modules,
        size_bytes=record.size_bytes,
        create_time=_timestamp(record.created_at),
        resident=resident,
        pinned=record.pinned,
        active_requests=record.active_requests,
        aliases=record.aliases,
        version=record.version.number,
        tags=metadata.tags,
        owner=metadata.owner,
        default_sampling=sampling_message(metadata.default_sampling) if metadata.default_sampling else None,
        source=record.version.source,
        kind=record.traits.kind,
        has_chat_template=record.has_chat_template,
        last_use_time=_timestamp(usage.last_used_at) if usage.last_used_at else None,
        request_count=usage.requests,
        prompt_tokens=usage.prompt_tokens,
        generation_tokens=usage.generation_tokens,
        device_bytes=memory.device_bytes,
        host_bytes=memory.host_bytes,
        problem=record.problem,
    )


def version_messages(versions: Iterable[Version]) -> list[pb.AdapterVersion]:
    """Return the versions of a name, the latest first."""
    return [
        pb.AdapterVersion(
            number=version.number,
            digest=version.digest,
            create_time=_timestamp(version.created_at),
            size_bytes=version.size_bytes,
            source=version.source,
        )
        for version in sorted(versions, key=lambda version: -version.number)
    ]


def target_messages(targets: Iterable[AliasTarget]) -> list[pb.AliasTarget]:
    """Return what an alias points at."""
    return [pb.AliasTarget(name=target.name, weight=target.weight) for target in targets]


def report_message(report_id: str, report: BindReport) -> pb.GetBindReportResponse:
    """Return a whole bind report."""
    entries = [
        pb.BindEntry(
            subject=entry.subject, module=entry.module, rank=entry.rank, scaling=entry.scaling, problem=entry.problem
        )
        for entry in report.entries
    ]
    return pb.GetBindReportResponse(report_id=report_id, base_fingerprint=report.base_fingerprint, entries=entries)


def given_metadata(message: pb.RegisterAdapterRequest | pb.UploadHeader, vocab_size: int) -> MetadataChange:
    """Return what a registration says about the adapter; what it leaves empty stays as it is.

    Raises:
        InvalidRequestError: for sampling defaults that no request could have.
    """
    sampling = message.default_sampling if message.HasField("default_sampling") else None
    return MetadataChange(
        message.description or None,
        tuple(message.tags) or None,
        message.owner or None,
        None if sampling is None else sampling_defaults(sampling, vocab_size),
    )


def changed_metadata(message: pb.UpdateAdapterRequest, vocab_size: int) -> MetadataChange:
    """Return what an update changes: the fields that are set, an empty value among them.

    Raises:
        InvalidRequestError: for sampling defaults that no request could have.
    """
    return MetadataChange(
        message.description if message.HasField("description") else None,
        tuple(message.tags.values) if message.HasField("tags") else None,
        message.owner if message.HasField("owner") else None,
        sampling_defaults(message.default_sampling, vocab_size) if message.HasField("default_sampling") else None,
    )


def _timestamp(moment: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(moment)
    return message
