"""A server of its own for what needs other settings or a second start: sources by URL, size limits, restarts."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Semaphore

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from loraplex.adapters import fetch
from loraplex.adapters.fetch import MAX_FETCHES
from loraplex.adapters.sources import SourcePolicy
from loraplex.client import AliasTarget, Client, SamplingOptions
from loraplex.client.errors import (
    InvalidRequestError,
    LoraplexClientError,
    PreconditionError,
    ResourceExhaustedError,
)
from loraplex.client.retry import RetryPolicy
from tests.integration.serving import Folders, RunningServer, eventually, fitting_adapter, greedy_ids


@pytest.fixture
def url(folders: Folders) -> Iterator[str]:
    """An adapter in fsspec's memory, which test and server share."""
    files = fsspec.filesystem("memory")
    for path in fitting_adapter(folders.adapters / "one", seed=1).iterdir():
        # Several, because those who read one file of fsspec's at the same time share its position.
        for name in ("one", *map(str, range(6))):
            files.pipe_file(f"/adapters/{name}/{path.name}", path.read_bytes())
    yield "memory://adapters/one"
    files.store.clear()


def test_an_adapter_by_url(folders: Folders, url: str) -> None:
    policy = SourcePolicy(("memory://adapters",), max_bytes=1 << 20)
    big = fitting_adapter(folders.adapters / "big", seed=2, template="x" * (1 << 20))
    with RunningServer(folders, sources=policy) as server, server.client() as client:
        by_path = client.register_adapter("by-path", folders.adapters / "one").adapter
        by_url = client.register_adapter("by-url", url, expected_digest=by_path.digest).adapter
        assert (by_url.digest, by_url.source) == (by_path.digest, url)
        assert greedy_ids(client, "by-url") == greedy_ids(client, "by-path") != greedy_ids(client)
        with pytest.raises(InvalidRequestError, match="not below the allowed adapter sources"):
            client.register_adapter("other", "memory://elsewhere/one")
        with pytest.raises(InvalidRequestError, match=f"more than the {1 << 20} that this server takes"):
            client.upload_adapter("big", big)
        for path in big.iterdir():
            fsspec.filesystem("memory").pipe_file(f"/adapters/big/{path.name}", path.read_bytes())
        with pytest.raises(PreconditionError, match=f"more than the {1 << 20} bytes"):
            client.register_adapter("big", "memory://adapters/big")
        assert [adapter.name for adapter in client.list_adapters()] == ["by-path", "by-url"]


@pytest.mark.usefixtures("url")
def test_slow_sources_hold_up_nobody_else(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, go_on = Semaphore(0), Event()
    open_file = MemoryFileSystem.open

    def slow(*arguments: object, **options: object) -> object:
        opened.release()
        assert go_on.wait(60)
        return open_file(*arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "open", slow)
    with (
        RunningServer(folders, sources=SourcePolicy(("memory://adapters",))) as server,
        server.client() as client,
        ThreadPoolExecutor(MAX_FETCHES) as threads,
    ):
        slow_ones = [
            threads.submit(client.register_adapter, f"slow{n}", f"memory://adapters/{n}") for n in range(MAX_FETCHES)
        ]
        for _ in slow_ones:
            assert opened.acquire(timeout=30)
        with pytest.raises(ResourceExhaustedError, match="being fetched from URLs already") as refused:
            client.register_adapter("more", "memory://adapters/5")
        assert refused.value.retry_after_s is not None
        client.register_adapter("local", folders.adapters / "one")
        client.unregister_adapter("local")
        digest = client.upload_adapter("sent", folders.adapters / "one").adapter.digest
        assert client.generate("x", "sent", max_tokens=1).adapter_digest == digest
        assert [adapter.name for adapter in client.list_adapters()] == ["sent"]
        go_on.set()
        assert {registered.result(60).adapter.digest for registered in slow_ones} == {digest}


@pytest.mark.usefixtures("url")
def test_a_source_that_hangs_is_let_go_with_its_caller_and_with_the_server(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, go_on = Semaphore(0), Event()

    def hang(*arguments: object, **options: object) -> object:
        opened.release()
        go_on.wait(60)
        raise FileNotFoundError

    monkeypatch.setattr(MemoryFileSystem, "open", hang)
    monkeypatch.setattr(fetch, "RETRY_AFTER_S", 0.05)
    with ThreadPoolExecutor(MAX_FETCHES) as threads:
        with RunningServer(folders, sources=SourcePolicy(("memory://adapters",))) as server:
            with server.client() as gone:
                for n in range(MAX_FETCHES):
                    threads.submit(gone.register_adapter, f"gone{n}", f"memory://adapters/{n}")
                for _ in range(MAX_FETCHES):
                    assert opened.acquire(timeout=30)
            with server.client(RetryPolicy(max_attempts=40, max_backoff_s=0.1)) as client:
                waiting = threads.submit(client.register_adapter, "more", "memory://adapters/5")
                assert opened.acquire(timeout=30), "the places are free again"
                server.stop()
                assert isinstance(waiting.exception(30), LoraplexClientError)
        assert not go_on.is_set(), "nobody waited for the sources"
        go_on.set()


def test_the_server_comes_back_with_what_it_had(folders: Folders) -> None:
    one, two = (fitting_adapter(folders.adapters / name, seed=seed) for name, seed in (("one", 1), ("two", 2)))

    def told(client: Client) -> tuple[object, ...]:
        answers = [greedy_ids(client, name) for name in ("a", "a@1", "live")]
        keys = [client.generate("x", "canary", routing_key=str(key), max_tokens=1).adapter_digest for key in range(8)]
        return answers, keys

    with RunningServer(folders) as server, server.client() as client:
        client.register_adapter("a", one, "text", tags=["x"], default_sampling=SamplingOptions(top_k=3))
        client.register_adapter("a", two)
        client.set_alias("live", "a@1")
        client.set_alias("live", "a")
        client.set_alias("canary", {"a@1": 1, "a@2": 1})
        client.pin_adapter("live")
        before = told(client)
        eventually(lambda: client.get_adapter("a").request_count == 11, "the last request is counted")
        was = client.get_adapter("a")
    with RunningServer(folders) as server, server.client() as client:
        eventually(lambda: client.get_adapter("a").resident, "what was pinned is loaded before anybody asks")
        now = client.get_adapter("a")
        for field in ("digest", "version", "versions", "description", "tags", "default_sampling", "aliases", "pinned"):
            assert getattr(now, field) == getattr(was, field)
        for field in ("created_at", "last_used_at", "request_count", "prompt_tokens", "generation_tokens", "source"):
            assert getattr(now, field) == getattr(was, field)
        assert told(client) == before
        assert client.rollback_alias("live") == (AliasTarget("a@1"),)
