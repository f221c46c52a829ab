"""Where adapters come from: folders and URLs that are allowed, through fsspec's local and memory file systems."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

from loraplex.adapters.errors import (
    AdapterFormatError,
    InvalidRequestError,
    NotFoundError,
    PreconditionError,
    ResourceExhaustedError,
    SourceError,
)
from loraplex.adapters.fetch import MAX_DRIVERS, Fetcher
from loraplex.adapters.formats import read_adapter
from loraplex.adapters.registry import AdapterRegistry
from loraplex.adapters.sources import AdapterSources, SourcePolicy, parse_url
from tests.adapter_factory import tiny_base, write_adapter


class Hub(DirFileSystem):
    """A model hub on the local disk: `org/repo@revision/file` lies at `org/repo/revision/file`."""

    protocol = "hf"
    root: Path
    opened: list[str]
    hangs: threading.Event | None = None

    def __init__(self, **options: Any) -> None:
        super().__init__(path=str(self.root), fs=LocalFileSystem(), **options)

    def open(self, path: str, *args: Any, **options: Any) -> Any:
        if self.hangs is not None:
            self.hangs.wait(30)
        org, repo, *rest = self._strip_protocol(path).split("/")
        name, _, revision = repo.partition("@")
        self.opened.append(rest[-1])
        return super().open("/".join([org, name, revision or "main", *rest]), *args, **options)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return path.removeprefix("hf://")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    kind = type("Hub", (Hub,), {"root": tmp_path / "hub", "opened": [], "cachable": False})
    monkeypatch.setitem(_registry, "hf", kind)  # as fsspec.register_implementation does, and undone
    write_adapter(tmp_path / "hub" / "org" / "repo" / "main", seed=1, template="t")
    write_adapter(tmp_path / "hub" / "org" / "repo" / "v2", seed=2)
    (tmp_path / "hub" / "org" / "repo" / "main" / "training_args.bin").write_bytes(b"pickle")
    return kind


@pytest.fixture
def memory() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def put(memory: Any, folder: Path, url: str) -> None:
    for path in folder.iterdir():
        memory.pipe_file(f"{url}/{path.name}", path.read_bytes())


def opened(tmp_path: Path, *prefixes: str, **policy: Any) -> AdapterRegistry:
    return AdapterRegistry(tmp_path / "root", tiny_base(), [], SourcePolicy(prefixes, **policy))


def test_an_adapter_comes_from_a_hub(hub: type[Hub], tmp_path: Path) -> None:
    registry = opened(tmp_path, "hf://org")
    record = registry.register("a", "hf://org/repo").record
    assert record.digest == read_adapter(tmp_path / "hub" / "org" / "repo" / "main").digest
    assert (record.version.source, record.has_chat_template) == ("hf://org/repo", True)
    assert "training_args.bin" not in hub.opened
    second = registry.register("a", "hf://org/repo@v2").record
    assert second.digest == read_adapter(tmp_path / "hub" / "org" / "repo" / "v2").digest
    assert list(registry.incoming.iterdir()) == []
    with pytest.raises(NotFoundError, match=r"hf://org/repo@v3 has no adapter_config\.json"):
        registry.register("a", "hf://org/repo@v3")
    registry.check_integrity()
    registry.close()


def test_an_adapter_comes_from_memory_and_may_change_there(memory: Any, tmp_path: Path) -> None:
    registry = opened(tmp_path, "memory://adapters/")
    for seed in (1, 2):
        folder = write_adapter(tmp_path / f"seed{seed}", seed=seed)
        put(memory, folder, "/adapters/a")
        assert registry.register("a", "memory://adapters/a/").record.digest == read_adapter(folder).digest
    assert [version.number for version in registry.get("a").adapter.versions] == [1, 2]
    registry.close()


def test_a_digest_is_pinned(hub: type[Hub], tmp_path: Path) -> None:
    registry = opened(tmp_path, "hf://org/repo")
    digests = [read_adapter(tmp_path / "hub" / "org" / "repo" / name).digest for name in ("main", "v2")]
    with pytest.raises(PreconditionError, match=f"is {digests[0]}, not the expected {digests[1]}"):
        registry.register("a", "hf://org/repo", expected_digest=digests[1])
    with pytest.raises(InvalidRequestError, match="expected_digest"):
        registry.register("a", "hf://org/repo", expected_digest="abc")
    assert registry.count() == 0
    assert registry.register("a", "hf://org/repo", expected_digest=digests[0]).record.digest == digests[0]
    registry.check_integrity()
    registry.close()


def test_a_file_url_is_a_folder_below_its_prefix(tmp_path: Path) -> None:
    inside = write_adapter(tmp_path / "allowed" / "a")
    write_adapter(tmp_path / "other" / "b")
    (tmp_path / "allowed" / "link").symlink_to(tmp_path / "other" / "b")
    registry = opened(tmp_path, f"file://{tmp_path}/allowed")
    digest = read_adapter(inside).digest
    assert registry.register("a", f"file://{inside}").record.digest == digest
    assert registry.register("b", inside).record.digest == digest
    for url in (f"file://{tmp_path}/other/b", f"file://{tmp_path}/allowed/link"):
        with pytest.raises(InvalidRequestError, match="not below the allowed"):
            registry.register("c", url)
    registry.close()


def test_the_whole_disk_may_be_allowed(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    with AdapterSources([], SourcePolicy(("file:///",)), tmp_path).folder(f"file://{folder}") as found:
        assert found == folder


@pytest.mark.parametrize(
    "url",
    [
        "hf://organisation/repo",
        "hf://other/repo",
        "hf://or",
        "s3://org/repo",
        "memory://org/repo",
        "hf://org/../other/repo",
        "hf://org/./repo",
        "hf://org/repo?x=1",
        "hf://org/%2e%2e/other",
        "hf://org/*",
        "simplecache::hf://org/repo",
        "hf://org/repo::s3://x",
        "http://org/repo",
        "file://relative",
        "hf://",
        "://",
        "HF://org/repo",
        "hf://org/re po",
        "hf://org/repo@refs/pr/7",
        "hf://org/repo@refs/pr/7/folder",
        "hf://org/repo@refs/convert/parquet",
        "hf://org@refs/pr/7",
        "hf://org/repo\n",
    ],
)
def test_what_is_not_allowed_is_not_asked_for(hub: type[Hub], tmp_path: Path, url: str) -> None:
    registry = opened(tmp_path, "hf://org")
    with pytest.raises(InvalidRequestError, match="path"):
        registry.register("a", url)
    assert hub.opened == []
    assert list(registry.incoming.iterdir()) == []
    registry.close()


def test_a_pull_request_is_allowed_by_its_own_name_only() -> None:
    request = SourcePolicy(("hf://org/repo@refs/pr/7",))
    assert request.allows("hf://org/repo@refs/pr/7")
    assert request.allows("hf://org/repo@refs/pr/7/folder")
    assert not request.allows("hf://org/repo@refs/pr/70")
    assert not request.allows("hf://org/repo")
    for revision in ("main", "v2", "refs-of-mine", "0123456789abcdef0123456789abcdef01234567"):
        assert SourcePolicy(("hf://org",)).allows(f"hf://org/repo@{revision}/folder")


def test_nothing_is_allowed_unless_it_is_said(hub: type[Hub], tmp_path: Path) -> None:
    registry = opened(tmp_path)
    with pytest.raises(InvalidRequestError, match="none are configured"):
        registry.register("a", "hf://org/repo")
    registry.close()


def test_a_missing_driver_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "s3fs", None)
    registry = opened(tmp_path, "s3://bucket")
    with pytest.raises(SourceError, match="s3:// needs the Python package s3fs"):
        registry.register("a", "s3://bucket/a")
    registry.close()


def test_too_much_is_not_taken(memory: Any, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "one")
    put(memory, folder, "/adapters/a")
    total = sum(path.stat().st_size for path in folder.iterdir())
    registry = opened(tmp_path, "memory://adapters", max_bytes=total - 1)
    with pytest.raises(SourceError, match=f"more than the {total - 1} bytes"):
        registry.register("a", "memory://adapters/a")
    assert list(registry.incoming.iterdir()) == []
    registry.close()
    exact = opened(tmp_path, "memory://adapters", max_bytes=total)
    assert exact.register("a", "memory://adapters/a").record.name == "a"
    exact.close()


def test_a_folder_on_the_servers_disk_has_the_same_limit(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "one")
    total = sum(path.stat().st_size for path in folder.iterdir())
    registry = opened(tmp_path, f"file://{tmp_path}", max_bytes=total - 1)
    with pytest.raises(AdapterFormatError, match=f"more than the {total - 1}"):
        registry.register("a", folder)
    registry.check_integrity()
    registry.close()


def test_a_source_that_hangs_is_given_up(hub: type[Hub], tmp_path: Path) -> None:
    released = threading.Event()
    hub.hangs = released
    registry = opened(tmp_path, "hf://org", timeout_s=0.05)
    with pytest.raises(SourceError, match=r"within 0\.05 s"):
        registry.register("a", "hf://org/repo")
    assert list(registry.incoming.iterdir()) == []
    released.set()
    for thread in threading.enumerate():
        if thread.name == "fetch":
            thread.join(10)
    assert list(registry.incoming.iterdir()) == [], "what was left behind writes nothing any more"
    registry.close()


def test_hanging_drivers_are_counted_and_a_caller_may_give_up(hub: type[Hub], tmp_path: Path) -> None:
    given_up = threading.Event()

    class Hang(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            given_up.set()
            return super().wait(timeout)

    released = hub.hangs = Hang()
    fetcher = Fetcher(1 << 20, timeout_s=60)
    for _ in range(MAX_DRIVERS):
        given_up.clear()
        with pytest.raises(SourceError, match="the caller has gone"):
            fetcher.fetch("hf://org/repo", tmp_path, given_up)
    with pytest.raises(ResourceExhaustedError, match=f"{MAX_DRIVERS} sources hang") as refused:
        fetcher.fetch("hf://org/repo", tmp_path, threading.Event())
    assert refused.value.retry_after_s is not None
    released.set()
    for thread in threading.enumerate():
        if thread.name == "fetch":
            thread.join(10)
    hub.hangs = None
    (tmp_path / "target").mkdir()
    fetcher.fetch("hf://org/repo", tmp_path / "target", threading.Event())
    assert (tmp_path / "target" / "adapter_config.json").is_file()


def test_a_driver_that_exits_has_not_read_all(hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(self: Hub, path: str, *args: Any) -> None:
        raise SystemExit("no credentials")

    monkeypatch.setattr(hub, "open", leave)
    with pytest.raises(SourceError, match="SystemExit: no credentials"):
        Fetcher(1 << 20, timeout_s=60).fetch("hf://org/repo", tmp_path, threading.Event())


def test_a_thread_that_cannot_start_holds_no_place(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    fetcher = Fetcher(1 << 20, timeout_s=60)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(MAX_DRIVERS):
            with pytest.raises(RuntimeError, match="new thread"):
                fetcher.fetch("hf://org/repo", tmp_path, threading.Event())
    fetcher.fetch("hf://org/repo", tmp_path, threading.Event())
    assert (tmp_path / "adapter_config.json").is_file()


def test_what_a_driver_says_is_passed_on(hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Hub, path: str, *args: Any) -> None:
        raise PermissionError("the token has expired")

    monkeypatch.setattr(hub, "open", refuse)
    registry = opened(tmp_path, "hf://org")
    with pytest.raises(SourceError, match="cannot be read: PermissionError: the token has expired"):
        registry.register("a", "hf://org/repo")
    registry.close()


@pytest.mark.parametrize("prefix", ["org", "ftp://x", "hf://a/../b", "", "memory:///", "s3://"])
def test_prefixes_are_checked(prefix: str) -> None:
    with pytest.raises(ValueError, match="no URL prefix"):
        SourcePolicy((prefix,))


def test_the_folder_of_a_path_is_read_in_place(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    sources = AdapterSources([tmp_path], SourcePolicy(), tmp_path)
    with sources.folder(str(folder)) as found:
        assert found == folder
    assert folder.is_dir()
    assert parse_url("hf://org/repo@main") == ("hf", "org/repo@main")
