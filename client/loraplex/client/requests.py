"""Builds the calls of both clients from plain Python values. Sends nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from grpc_health.v1 import health_pb2

from loraplex.client import responses
from loraplex.client.calls import Call, new_request_id
from loraplex.client.options import ChatMessage, Prompt, RegistrationKeywords, SamplingOptions
from loraplex.client.request_fields import field_named, set_sampling
from loraplex.client.results import (
    Adapter,
    AliasTarget,
    BindReport,
    Generation,
    GenerationPiece,
    HealthStatus,
    Registration,
    ServerInfo,
    Unregistration,
)
from loraplex.v1 import adapter_pb2, generation_pb2, server_pb2


def generate_request(
    prompt: Prompt,
    adapter: str,
    scale: float | None,
    sampling: SamplingOptions,
    request_id: str,
    cache_salt: str = "",
    tenant: str = "",
    routing_key: str = "",
) -> generation_pb2.GenerateRequest:
    """Return the message for `Generate` and `GenerateStream`; an empty `request_id` is replaced by a new one.

    Raises:
        InvalidRequestError: for a value that does not fit its field.
        TypeError: for a prompt that is neither text, chat messages nor token ids.
    """
    request = generation_pb2.GenerateRequest(request_id=request_id or new_request_id())
    with field_named("prompt"):
        _set_prompt(request, prompt)
    with field_named("adapter"):
        selection = request.adapters.add(name=adapter)
    if scale is not None:
        with field_named("adapters.scale"):
            selection.scale = scale
    with field_named("adapters.routing_key"):
        selection.routing_key = routing_key
    with field_named("cache_salt"):
        request.cache_salt = cache_salt
    with field_named("tenant"):
        request.tenant = tenant
    set_sampling(request.sampling, sampling, "sampling")
    return request


def _set_prompt(request: generation_pb2.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = prompt
        return
    if not isinstance(prompt, Sequence):
        raise TypeError(f"a prompt is text, a list of chat messages or a list of token ids, not {type(prompt)}")
    if prompt and all(isinstance(message, ChatMessage | Mapping) for message in prompt):
        for message in prompt:
            role, content = _role_and_content(message)
            request.chat.messages.add(role=role, content=content)
        return
    # Touched even if there are no tokens, so that the server sees an empty prompt and not a missing one.
    request.tokens.SetInParent()
    request.tokens.token_ids.extend(prompt)  # type: ignore[arg-type]  # protobuf raises TypeError for anything but ints


def _role_and_content(message: Any) -> tuple[str, str]:
    if isinstance(message, ChatMessage):
        return message.role, message.content
    if set(message) != {"role", "content"}:
        raise TypeError(f"a chat message has the keys role and content, not {sorted(message)}")
    return message["role"], message["content"]


def generate(request: generation_pb2.GenerateRequest) -> Call[Generation]:
    """Return the call that answers once."""
    name, request_id = request.adapters[0].name, request.request_id
    return Call(lambda stubs: stubs.generation.Generate, request, responses.generation, name, request_id)


def generate_stream(request: generation_pb2.GenerateRequest) -> Call[GenerationPiece]:
    """Return the call that answers piece by piece."""
    name, request_id = request.adapters[0].name, request.request_id
    return Call(lambda stubs: stubs.generation.GenerateStream, request, responses.piece, name, request_id)


def register_adapter(
    name: str, path: str | Path, description: str, **metadata: Unpack[RegistrationKeywords]
) -> Call[Registration]:
    """Return the call that registers a folder on the server, or what is at a URL.

    Raises:
        InvalidRequestError: for a value that does not fit its field.
    """
    request = adapter_pb2.RegisterAdapterRequest(name=name, path=str(path))
    set_metadata(request, description, **metadata)
    return Call(lambda stubs: stubs.adapters.RegisterAdapter, request, responses.registration, name)


def set_metadata(
    message: adapter_pb2.RegisterAdapterRequest | adapter_pb2.UploadHeader,
    description: str,
    tags: Sequence[str] = (),
    owner: str = "",
    default_sampling: SamplingOptions | None = None,
    expected_digest: str = "",
) -> None:
    """Write what is said of an adapter into the message that registers it.

    Raises:
        InvalidRequestError: for a value that does not fit its field.
        TypeError: if `tags` is a string, which would be taken apart into its characters.
    """
    with field_named("description"):
        message.description = description
    with field_named("tags"):
        message.tags.extend(_several(tags))
    with field_named("owner"):
        message.owner = owner
    with field_named("expected_digest"):
        message.expected_digest = expected_digest
    if default_sampling is not None:
        message.default_sampling.SetInParent()
        set_sampling(message.default_sampling, default_sampling, "default_sampling")


def _several(tags: Sequence[str]) -> Sequence[str]:
    if isinstance(tags, str):
        raise TypeError(f"tags are a sequence of strings: write tags=[{tags!r}]")
    return tags


def download_adapter(name: str) -> Call[adapter_pb2.DownloadAdapterResponse]:
    """Return the call that streams an adapter's files."""
    request = adapter_pb2.DownloadAdapterRequest(name=name)
    return Call(lambda stubs: stubs.adapters.DownloadAdapter, request, responses.download_part, name)


def unregister_adapter(name: str, drain_timeout_s: float | None) -> Call[Unregistration]:
    """Return the call that takes a name or a version away."""
    request = adapter_pb2.UnregisterAdapterRequest(name=name, drain_timeout_s=drain_timeout_s)
    return Call(lambda stubs: stubs.adapters.UnregisterAdapter, request, responses.unregistration, name)


def list_adapters(
    name_contains: str, tags: Sequence[str], owner: str, page_size: int, page_token: str
) -> Call[tuple[list[Adapter], str]]:
    """Return the call for one page: its adapters and the next page's token, empty on the last.

    Raises:
        InvalidRequestError: if `page_size` does not fit its field.
    """
    with field_named("page_size"):
        request = adapter_pb2.ListAdaptersRequest(
            name_contains=name_contains, tags=_several(tags), owner=owner, page_size=page_size, page_token=page_token
        )
    return Call(lambda stubs: stubs.adapters.ListAdapters, request, responses.adapter_page)


def get_adapter(name: str) -> Call[Adapter]:
    """Return the call for one adapter."""
    request = adapter_pb2.GetAdapterRequest(name=name)
    return Call(lambda stubs: stubs.adapters.GetAdapter, request, responses.adapter_of, name)


def update_adapter(
    name: str,
    description: str | None,
    tags: Sequence[str] | None,
    owner: str | None,
    default_sampling: SamplingOptions | None,
) -> Call[Adapter]:
    """Return the call that changes what is not None.

    Raises:
        InvalidRequestError: for a value that does not fit its field.
    """
    request = adapter_pb2.UpdateAdapterRequest(name=name, description=description, owner=owner)
    if tags is not None:
        request.tags.SetInParent()
        request.tags.values.extend(_several(tags))
    if default_sampling is not None:
        request.default_sampling.SetInParent()
        set_sampling(request.default_sampling, default_sampling, "default_sampling")
    return Call(lambda stubs: stubs.adapters.UpdateAdapter, request, responses.adapter_of, name)


def pin_adapter(name: str) -> Call[Adapter]:
    """Return the call that keeps an adapter on the device."""
    request = adapter_pb2.PinAdapterRequest(name=name)
    return Call(lambda stubs: stubs.adapters.PinAdapter, request, responses.adapter_of, name)


def unpin_adapter(name: str) -> Call[Adapter]:
    """Return the call that lets an adapter be evicted again."""
    request = adapter_pb2.UnpinAdapterRequest(name=name)
    return Call(lambda stubs: stubs.adapters.UnpinAdapter, request, responses.adapter_of, name)


def set_alias(alias: str, targets: str | Mapping[str, float]) -> Call[tuple[AliasTarget, ...]]:
    """Return the call that points an alias at a name, or at several with weights; its result is what it was before.

    Raises:
        InvalidRequestError: for a weight that is no number.
    """
    weights = {targets: 1.0} if isinstance(targets, str) else targets
    with field_named("targets"):
        entries = [adapter_pb2.AliasTarget(name=name, weight=weight) for name, weight in weights.items()]
    request = adapter_pb2.SetAliasRequest(alias=alias, targets=entries)
    return Call(lambda stubs: stubs.adapters.SetAlias, request, responses.previous_targets)


def rollback_alias(alias: str) -> Call[tuple[AliasTarget, ...]]:
    """Return the call that takes back the last change of an alias; sent once, because a second one undoes the first."""
    request = adapter_pb2.RollbackAliasRequest(alias=alias)
    return Call(lambda stubs: stubs.adapters.RollbackAlias, request, responses.restored_targets, retried=False)


def delete_alias(alias: str) -> Call[None]:
    """Return the call that takes an alias away."""
    request = adapter_pb2.DeleteAliasRequest(alias=alias)
    return Call(lambda stubs: stubs.adapters.DeleteAlias, request, responses.nothing)


def get_bind_report(report_id: str) -> Call[BindReport]:
    """Return the call for the report behind a refused registration, or on the adapter with a digest."""
    request = adapter_pb2.GetBindReportRequest(report_id=report_id)
    return Call(lambda stubs: stubs.adapters.GetBindReport, request, responses.bind_report)


def server_info() -> Call[ServerInfo]:
    """Return the call for what the server is."""
    request = server_pb2.GetServerInfoRequest()
    return Call(lambda stubs: stubs.server.GetServerInfo, request, responses.server_info)


def health(service: str) -> Call[HealthStatus]:
    """Return the health check of one service, or of the server if `service` is empty."""
    request = health_pb2.HealthCheckRequest(service=service)
    return Call(lambda stubs: stubs.health.Check, request, responses.health_status, retried=False)
