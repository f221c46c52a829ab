"""The client for code without asyncio. `async_client` has the same methods."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar, Unpack

from loraplex.client import merge_requests, requests
from loraplex.client.channel import DEFAULT_TARGET, ChannelOptions
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
from loraplex.client.streams import GenerationStream, MergeStream, Stream
from loraplex.client.transport import Transport
from loraplex.client.uploads import Upload, UploadProgress

if TYPE_CHECKING:
    import grpc

    from loraplex.client.calls import Call

ResultT = TypeVar("ResultT")
DEFAULT_TIMEOUT_S = 300.0


class Client:
    """Talks to one server. Threads may share a client; close it, or use it as a context manager.

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
        self._transport = Transport(target, retry or RetryPolicy(), options or ChannelOptions(), credentials)

    def generate(
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
        return self._unary(requests.generate(request), timeout)

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
    ) -> GenerationStream:
        """Answer as `generate` does, piece by piece; the last piece has the usage."""
        chosen = combine(sampling, **options)
        request = requests.generate_request(prompt, adapter, scale, chosen, request_id, cache_salt, tenant, routing_key)
        call = requests.generate_stream(request)
        return GenerationStream(call, *self._transport.opener(call, self._timeout_or(timeout)))

    def register_adapter(
        self,
        name: str,
        path: str | Path,
        description: str = "",
        *,
        timeout: float | None = None,
        **metadata: Unpack[RegistrationKeywords],
    ) -> Registration:
        """Register the adapter in the folder `path` on the server or at that URL, where the server allows it."""
        return self._unary(requests.register_adapter(name, path, description, **metadata), timeout)

    def upload_adapter(
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
        upload = Upload(name, Path(folder), description, progress, **metadata)
        return self._transport.unary(upload.call, self._timeout_or(timeout), upload)

    def download_adapter(
        self,
        name: str,
        folder: str | Path,
        *,
        progress: Callable[[DownloadProgress], None] | None = None,
        timeout: float | None = None,
    ) -> DownloadedAdapter:
        """Write the adapter's files as the server has them into the new local `folder`, checked, all or none."""
        call = requests.download_adapter(name)
        with Download(Path(folder), progress) as download:
            with Stream(call, *self._transport.opener(call, self._timeout_or(timeout))) as messages:
                for message in messages:
                    download.add(message)
            return download.finish()

    def unregister_adapter(
        self, name: str, *, drain_timeout_s: float | None = None, timeout: float | None = None
    ) -> Unregistration:
        """Take a name away at once, or one of its versions (`name@2`); requests in flight finish on what they have.

        The answer waits for them for `drain_timeout_s` seconds at most (None: a moment).
        """
        return self._unary(requests.unregister_adapter(name, drain_timeout_s), timeout)

    def list_adapters(
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
            page, token = self._unary(call, timeout)
            adapters += page
            if not token:
                return adapters

    def get_adapter(self, name: str, *, timeout: float | None = None) -> Adapter:
        """Return one adapter by name, alias, or either with a version; with all versions of the name."""
        return self._unary(requests.get_adapter(name), timeout)

    def update_adapter(
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
        return self._unary(call, timeout)

    def pin_adapter(self, name: str, *, timeout: float | None = None) -> Adapter:
        """Keep an adapter's weights on the device until it is unpinned."""
        return self._unary(requests.pin_adapter(name), timeout)

    def unpin_adapter(self, name: str, *, timeout: float | None = None) -> Adapter:
        """Let an adapter's weights be evicted again."""
        return self._unary(requests.unpin_adapter(name), timeout)

    def set_alias(
        self, alias: str, targets: str | Mapping[str, float], *, timeout: float | None = None
    ) -> tuple[AliasTarget, ...]:
        """Point `alias` at a registered name, or at several with their weights; return what it pointed at before.

        A name may have a version (`name@2`); without one its latest answers.
        """
        return self._unary(requests.set_alias(alias, targets), timeout)

    def rollback_alias(self, alias: str, *, timeout: float | None = None) -> tuple[AliasTarget, ...]:
        """Take back the last change of `alias` and return what it points at now; a second call undoes the first."""
        return self._unary(requests.rollback_alias(alias), timeout)

    def delete_alias(self, alias: str, *, timeout: float | None = None) -> None:
        """Take an alias away; the adapter stays."""
        self._unary(requests.delete_alias(alias), timeout)

    def get_bind_report(self, report_id: str, *, timeout: float | None = None) -> BindReport:
        """Return the report behind a refused registration (`PreconditionError.report_id`), or on a digest."""
        return self._unary(requests.get_bind_report(report_id), timeout)

    def merge_adapter(
        self,
        adapter: str | Mapping[str, float],
        output: str | Path,
        *,
        timeout: float = math.inf,
        **options: Unpack[MergeKeywords],
    ) -> MergeStream:
        """Fold `adapter` into the base and write a model folder at `output` below the server's export root.

        Several adapters are given with their weights. `options` are those of `MergeKeywords`.
        """
        call = merge_requests.merge_adapter(adapter, output, **options)
        return MergeStream(call, *self._transport.opener(call, timeout))

    def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """Return what the server is and what it can take."""
        return self._unary(requests.server_info(), timeout)

    def health(self, service: str = "", *, timeout: float | None = None) -> HealthStatus:
        """Return the health of the server, or of one service by its full name; tried once."""
        return self._unary(requests.health(service), timeout)

    def wait_until_ready(self, timeout: float = 60.0) -> None:
        """Wait until the server is there and serving.

        Raises:
            DeadlineError: if it is not within `timeout` seconds.
        """
        wait = ReadinessWait(self.target, timeout)
        while True:
            seen: HealthStatus | LoraplexClientError
            try:
                seen = self.health(timeout=wait.check_timeout_s())
            except (UnavailableError, DeadlineError) as error:
                seen = error
            if seen is HealthStatus.SERVING:
                return
            time.sleep(wait.pause_s(seen))

    def close(self) -> None:
        """Close the connection; calls that still run are cancelled."""
        self._transport.close()

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connection."""
        self.close()

    def _unary(self, call: Call[ResultT], timeout: float | None) -> ResultT:
        return self._transport.unary(call, self._timeout_or(timeout))

    def _timeout_or(self, timeout: float | None) -> float:
        return self._timeout if timeout is None else timeout
