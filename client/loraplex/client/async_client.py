"""The client for asyncio code. `client` has the same methods."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar, Unpack

from loraplex.client import merge_requests, requests
from loraplex.client.async_streams import AsyncGenerationStream, AsyncMergeStream, AsyncStream
from loraplex.client.async_transport import AsyncTransport
from loraplex.client.channel import DEFAULT_TARGET, ChannelOptions
from loraplex.client.client import DEFAULT_TIMEOUT_S
from loraplex.client.downloads import Download, DownloadProgress
from loraplex.client.errors import DeadlineError, LoraplexClientError, UnavailableError
from loraplex.client.merging import MergeKeywords
from loraplex.client.options import Prompt, RegistrationKeywords, SamplingKeywords, SamplingOptions, combine
from loraplex.client.results import (
    Adapter,
    AliasTarget,
    BindReport,
    DownloadedAdapter,
    Generation,
    HealthStatus,
    Registration,
    ServerInfo,
    Unregistration,
)
from loraplex.client.retry import ReadinessWait, RetryPolicy
from loraplex.client.uploads import Upload, UploadProgress

if TYPE_CHECKING:
    import grpc

    from loraplex.client.calls import Call

ResultT = TypeVar("ResultT")


class AsyncClient:
    """Talks to one server from one event loop; close it, or use it as an asynchronous context manager.

    Every method raises `LoraplexClientError` when its call fails, and every `timeout` is in seconds for the whole call,
    retries included: None takes the client's own, `math.inf` is none. The server stops working when it passes.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        retry: RetryPolicy | None = None,
        options: ChannelOptions | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """Keep how to reach `target` ("host:port" or "unix:/path"); connects with the first call.

        Without `credentials` the connection is in plain text.
        """
        self.target = target
        self._timeout = timeout
        self._transport = AsyncTransport(target, retry or RetryPolicy(), options or ChannelOptions(), credentials)

    async def generate(
        self,
        prompt: Prompt,
        adapter: str = "",
        scale: float | None = None,
        *,
        sampling: SamplingOptions | None = None,
        timeout: float | None = None,
        request_id: str = "",
        cache_salt: str = "",
        tenant: str = "",
        routing_key: str = "",
        **options: Unpack[SamplingKeywords],
    ) -> Generation:
        """Answer `prompt` (text, chat messages or token ids) with the base model, or with `adapter` on it.

        `adapter` is a registered name, an alias, or either with a version (`name@2`, `name@sha256:...`); `scale`
        multiplies its own scaling. `options` are fields of SamplingOptions and go over `sampling`; what neither sets
        takes the adapter's default. Requests with different `cache_salt` share no cached prompt; `tenant` says whom the
        request belongs to. Of an alias with several targets, equal `routing_key`s get the same one.
        """
        chosen = combine(sampling, **options)
        request = requests.generate_request(prompt, adapter, scale, chosen, request_id, cache_salt, tenant, routing_key)
        return await self._unary(requests.generate(request), timeout)

    def stream(
        self,
        prompt: Prompt,
        adapter: str = "",
        scale: float | None = None,
        *,
        sampling: SamplingOptions | None = None,
        timeout: float | None = None,
        request_id: str = "",
        cache_salt: str = "",
        tenant: str = "",
        routing_key: str = "",
        **options: Unpack[SamplingKeywords],
    ) -> AsyncGenerationStream:
        """Answer as `generate` does, piece by piece; the last piece has the usage."""
        chosen = combine(sampling, **options)
        request = requests.generate_request(prompt, adapter, scale, chosen, request_id, cache_salt, tenant, routing_key)
        call = requests.generate_stream(request)
        return AsyncGenerationStream(call, *self._transport.opener(call, self._timeout_or(timeout)))

    async def register_adapter(
        self,
        name: str,
        path: str | Path,
        description: str = "",
        *,
        timeout: float | None = None,
        **metadata: Unpack[RegistrationKeywords],
    ) -> Registration:
        """Register the adapter in the folder `path` on the server or at that URL, where the server allows it."""
        return await self._unary(requests.register_adapter(name, path, description, **metadata), timeout)

    async def upload_adapter(
        self,
        name: str,
        folder: str | Path,
        description: str = "",
        *,
        progress: Callable[[UploadProgress], None] | None = None,
        timeout: float | None = None,
        **metadata: Unpack[RegistrationKeywords],
    ) -> Registration:
        """Send the adapter in the local `folder` and register it; `progress` is called on another thread."""
        upload = await asyncio.to_thread(Upload, name, Path(folder), description, progress, **metadata)
        return await self._transport.unary(upload.call, self._timeout_or(timeout), upload)

    async def download_adapter(
        self,
        name: str,
        folder: str | Path,
        *,
        progress: Callable[[DownloadProgress], None] | None = None,
        timeout: float | None = None,
    ) -> DownloadedAdapter:
        """Write the adapter's files as the server has them into the new local `folder`, checked, all or none."""
        call = requests.download_adapter(name)
        with await asyncio.to_thread(Download, Path(folder), progress) as download:
            async with AsyncStream(call, *self._transport.opener(call, self._timeout_or(timeout))) as messages:
                async for message in messages:
                    await asyncio.to_thread(download.add, message)
            return await asyncio.to_thread(download.finish)

    async def unregister_adapter(
        self, name: str, *, drain_timeout_s: float | None = None, timeout: float | None = None
    ) -> Unregistration:
        """Take a name away at once, or one of its versions (`name@2`); requests in flight finish on what they have.

        The answer waits for them for `drain_timeout_s` seconds at most (None: a moment).
        """
        return await self._unary(requests.unregister_adapter(name, drain_timeout_s), timeout)

    async def list_adapters(
        self,
        name_contains: str = "",
        *,
        tags: Sequence[str] = (),
        owner: str = "",
        page_size: int = 0,
        timeout: float | None = None,
    ) -> list[Adapter]:
        """Return all adapters with `name_contains` in the name, all of `tags` and that `owner` (empty: any).

        They come `page_size` per call (0: the server's choice); `timeout` is for each page.
        """
        adapters: list[Adapter] = []
        token = ""
        while True:
            call = requests.list_adapters(name_contains, tags, owner, page_size, token)
            page, token = await self._unary(call, timeout)
            adapters += page
            if not token:
                return adapters

    async def get_adapter(self, name: str, *, timeout: float | None = None) -> Adapter:
        """Return one adapter by name, alias, or either with a version; with all versions of the name."""
        return await self._unary(requests.get_adapter(name), timeout)

    async def update_adapter(
        self,
        name: str,
        *,
        description: str | None = None,
        tags: Sequence[str] | None = None,
        owner: str | None = None,
        default_sampling: SamplingOptions | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """Change what is not None and return the adapter; `tags` and `default_sampling` replace all that was there."""
        call = requests.update_adapter(name, description, tags, owner, default_sampling)
        return await self._unary(call, timeout)

    async def pin_adapter(self, name: str, *, timeout: float | None = None) -> Adapter:
        """Keep an adapter's weights on the device until it is unpinned."""
        return await self._unary(requests.pin_adapter(name), timeout)

    async def unpin_adapter(self, name: str, *, timeout: float | None = None) -> Adapter:
        """Let an adapter's weights be evicted again."""
        return await self._unary(requests.unpin_adapter(name), timeout)

    async def set_alias(
        self, alias: str, targets: str | Mapping[str, float], *, timeout: float | None = None
    ) -> tuple[AliasTarget, ...]:
        """Point `alias` at a registered name, or at several with their weights; return what it pointed at before.

        A name may have a version (`name@2`); without one its latest answers.
        """
        return await self._unary(requests.set_alias(alias, targets), timeout)

    async def rollback_alias(self, alias: str, *, timeout: float | None = None) -> tuple[AliasTarget, ...]:
        """Take back the last change of `alias` and return what it points at now; a second call undoes the first."""
        return await self._unary(requests.rollback_alias(alias), timeout)

    async def delete_alias(self, alias: str, *, timeout: float | None = None) -> None:
        """Take an alias away; the adapter stays."""
        await self._unary(requests.delete_alias(alias), timeout)

    async def get_bind_report(self, report_id: str, *, timeout: float | None = None) -> BindReport:
        """Return the report behind a refused registration (`PreconditionError.report_id`), or on a digest."""
        return await self._unary(requests.get_bind_report(report_id), timeout)

    def merge_adapter(
        self,
        adapter: str | Mapping[str, float],
        output: str | Path,
        *,
        timeout: float = math.inf,
        **options: Unpack[MergeKeywords],
    ) -> AsyncMergeStream:
        """Fold `adapter` into the base and write a model folder at `output` below the server's export root.

        Several adapters are given with their weights. `options` are those of `MergeKeywords`.
        """
        call = merge_requests.merge_adapter(adapter, output, **options)
        return AsyncMergeStream(call, *self._transport.opener(call, timeout))

    async def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """Return what the server is and what it can take."""
        return await self._unary(requests.server_info(), timeout)

    async def health(self, service: str = "", *, timeout: float | None = None) -> HealthStatus:
        """Return the health of the server, or of one service by its full name; tried once."""
        return await self._unary(requests.health(service), timeout)

    async def wait_until_ready(self, timeout: float = 60.0) -> None:
        """Wait until the server is there and serving.

        Raises:
            DeadlineError: if it is not within `timeout` seconds.
        """
        wait = ReadinessWait(self.target, timeout)
        while True:
            seen: HealthStatus | LoraplexClientError
            try:
                seen = await self.health(timeout=wait.check_timeout_s())
            except (UnavailableError, DeadlineError) as error:
                seen = error
            if seen is HealthStatus.SERVING:
                return
            await asyncio.sleep(wait.pause_s(seen))

    async def close(self) -> None:
        """Close the connection; calls that still run are cancelled."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        """Return self."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connection."""
        await self.close()

    async def _unary(self, call: Call[ResultT], timeout: float | None) -> ResultT:
        return await self._transport.unary(call, self._timeout_or(timeout))

    def _timeout_or(self, timeout: float | None) -> float:
        return self._timeout if timeout is None else timeout
