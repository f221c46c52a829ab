"""Reads response messages into the dataclasses of `results`."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC
from typing import Any

from grpc_health.v1 import health_pb2

from loraplex.client.errors import InternalError
from loraplex.client.merging import MergeComparison, MergeProgress, SpeedFigures
from loraplex.client.options import SamplingOptions
from loraplex.client.results import (
    Adapter,
    AdapterVersion,
    AliasTarget,
    BindEntry,
    BindReport,
    Choice,
    FinishReason,
    Generation,
    GenerationPiece,
    HealthStatus,
    Registration,
    ServerInfo,
    TokenLogprob,
    TokenLogprobs,
    Unregistration,
    Usage,
)
from loraplex.v1 import adapter_pb2, export_pb2, generation_pb2, server_pb2

_FINISH_REASONS = {
    generation_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    generation_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}
_HEALTH = {
    health_pb2.HealthCheckResponse.SERVING: HealthStatus.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING: HealthStatus.NOT_SERVING,
}


def generation(message: generation_pb2.GenerateResponse) -> Generation:
    """Return a whole generation."""
    choices = tuple(_choice(choice) for choice in message.choices)
    return Generation(message.request_id, choices, _usage(message.usage), message.adapter_digest)


def piece(message: generation_pb2.GenerateStreamResponse) -> GenerationPiece:
    """Return one message of a stream."""
    usage = _usage(message.usage) if message.HasField("usage") else None
    choices = tuple(_choice(choice) for choice in message.choices)
    return GenerationPiece(message.request_id, choices, usage, message.adapter_digest)


def _choice(message: generation_pb2.Choice) -> Choice:
    return Choice(
        index=message.index,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(_logprobs(position) for position in message.logprobs),
        finish_reason=_FINISH_REASONS.get(message.finish_reason),
    )


def _logprobs(message: generation_pb2.TokenLogprobs) -> TokenLogprobs:
    def one(token: generation_pb2.TokenLogprob) -> TokenLogprob:
        return TokenLogprob(token.token_id, token.logprob)

    return TokenLogprobs(one(message.chosen), tuple(one(token) for token in message.top))


def _usage(message: generation_pb2.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.completion_tokens, message.cached_tokens)


class GenerationBuilder:
    """Puts the pieces of a stream together again."""

    def __init__(self, request_id: str) -> None:
        """Start with nothing; `request_id` stands until a piece carries one."""
        self._request_id = request_id
        self._adapter_digest = ""
        self._usage: Usage | None = None
        self._pieces: dict[int, list[Choice]] = {}

    def add(self, piece: GenerationPiece) -> GenerationPiece:
        """Take the next piece, and return it."""
        self._request_id = piece.request_id or self._request_id
        self._adapter_digest = piece.adapter_digest or self._adapter_digest
        self._usage = piece.usage or self._usage
        for choice in piece.choices:
            self._pieces.setdefault(choice.index, []).append(choice)
        return piece

    def build(self) -> Generation:
        """Return what the pieces say together.

        Raises:
            InternalError: if no piece has carried the usage: the stream ended before its last message.
        """
        if self._usage is None:
            raise InternalError("the stream has not come to its last message", request_id=self._request_id)
        choices = tuple(_join(index, pieces) for index, pieces in sorted(self._pieces.items()))
        return Generation(self._request_id, choices, self._usage, self._adapter_digest)


def _join(index: int, pieces: list[Choice]) -> Choice:
    return Choice(
        index=index,
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        logprobs=tuple(position for piece in pieces for position in piece.logprobs),
        finish_reason=next((piece.finish_reason for piece in reversed(pieces) if piece.finish_reason), None),
    )


def adapter(message: adapter_pb2.Adapter) -> Adapter:
    """Return one registered adapter."""
    return Adapter(
        name=message.name,
        digest=message.digest,
        description=message.description,
        rank=message.rank,
        target_modules=tuple(message.target_modules),
        size_bytes=message.size_bytes,
        created_at=message.create_time.ToDatetime(tzinfo=UTC),
        resident=message.resident,
        pinned=message.pinned,
        active_requests=message.active_requests,
        aliases=tuple(message.aliases),
        version=message.version,
        tags=tuple(message.tags),
        owner=message.owner,
        default_sampling=_sampling(message.default_sampling),
        source=message.source,
        kind=message.kind,
        has_chat_template=message.has_chat_template,
        last_used_at=message.last_use_time.ToDatetime(tzinfo=UTC) if message.HasField("last_use_time") else None,
        request_count=message.request_count,
        prompt_tokens=message.prompt_tokens,
        generation_tokens=message.generation_tokens,
        device_bytes=message.device_bytes,
        host_bytes=message.host_bytes,
        problem=message.problem,
        versions=tuple(
            AdapterVersion(
                entry.number, entry.digest, entry.create_time.ToDatetime(tzinfo=UTC), entry.size_bytes, entry.source
            )
            for entry in message.versions
        ),
    )


def _sampling(message: generation_pb2.SamplingParameters) -> SamplingOptions:
    given: dict[str, Any] = {field.name: value for field, value in message.ListFields()}
    for name in ("stop", "stop_token_ids"):
        given[name] = tuple(given.get(name, ()))
    return SamplingOptions(**given)


def adapter_of(message: Any) -> Adapter:
    """Return the adapter in a response that holds just one (get, update, pin, unpin)."""
    return adapter(message.adapter)


def adapter_page(message: adapter_pb2.ListAdaptersResponse) -> tuple[list[Adapter], str]:
    """Return one page's adapters and the next page's token."""
    return [adapter(entry) for entry in message.adapters], message.next_page_token


def registration(message: adapter_pb2.RegisterAdapterResponse | adapter_pb2.UploadAdapterResponse) -> Registration:
    """Return what a registration or an upload made."""
    return Registration(adapter(message.adapter), message.previous_digest)


def unregistration(message: adapter_pb2.UnregisterAdapterResponse) -> Unregistration:
    """Return what an unregistration took away."""
    return Unregistration(
        message.digest,
        message.active_requests,
        message.device_bytes_freed,
        message.host_bytes_freed,
        message.disk_bytes_freed,
    )


def previous_targets(message: adapter_pb2.SetAliasResponse) -> tuple[AliasTarget, ...]:
    """Return what an alias pointed at before."""
    return _targets(message.previous_targets)


def restored_targets(message: adapter_pb2.RollbackAliasResponse) -> tuple[AliasTarget, ...]:
    """Return what an alias points at again."""
    return _targets(message.targets)


def _targets(messages: Iterable[adapter_pb2.AliasTarget]) -> tuple[AliasTarget, ...]:
    return tuple(AliasTarget(message.name, message.weight) for message in messages)


def download_part(message: adapter_pb2.DownloadAdapterResponse) -> adapter_pb2.DownloadAdapterResponse:
    """Return the message as it is: `Download` reads it."""
    return message


def nothing(message: adapter_pb2.DeleteAliasResponse) -> None:
    """Read an empty response."""


def bind_report(message: adapter_pb2.GetBindReportResponse) -> BindReport:
    """Return a whole bind report."""
    entries = tuple(
        BindEntry(entry.subject, entry.module, entry.rank, entry.scaling, entry.problem) for entry in message.entries
    )
    return BindReport(message.report_id, message.base_fingerprint, entries)


def merge_progress(message: export_pb2.MergeAdapterResponse) -> MergeProgress:
    """Return one message of a merge."""
    comparison = message.comparison
    return MergeProgress(
        tensors_done=message.tensors_done,
        tensors_total=message.tensors_total,
        output_path=message.output_path,
        adapter_digest=message.adapter_digest,
        phase=message.phase,
        comparison=MergeComparison(
            comparison.max_logit_difference, comparison.top1_agreement, comparison.mean_kl, comparison.positions
        )
        if message.HasField("comparison")
        else None,
        speed=tuple(
            SpeedFigures(side.model, side.tokens_per_second, side.first_token_ms, side.inter_token_ms_p50)
            for side in message.speed
        ),
        adapter_digests=tuple(message.adapter_digests),
    )


def server_info(message: server_pb2.GetServerInfoResponse) -> ServerInfo:
    """Return what the server says about itself."""
    return ServerInfo(
        version=message.version,
        model=message.model,
        architecture=message.architecture,
        base_fingerprint=message.base_fingerprint,
        quantization=message.quantization,
        dtype=message.dtype,
        device=message.device,
        max_model_len=message.max_model_len,
        max_num_seqs=message.max_num_seqs,
        kv_blocks=message.kv_blocks,
        kv_block_size=message.kv_block_size,
        vocab_size=message.vocab_size,
        eos_token_ids=tuple(message.eos_token_ids),
        target_modules=tuple(message.target_modules),
        adapter_device_memory_bytes=message.adapter_device_memory_bytes,
        export_root=message.export_root,
        model_path=message.model_path,
    )


def health_status(message: health_pb2.HealthCheckResponse) -> HealthStatus:
    """Return a health check's answer."""
    return _HEALTH.get(message.status, HealthStatus.UNKNOWN)
