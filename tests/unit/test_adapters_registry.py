"""The registry: names, versions, aliases, requests in flight, restarts, and what a failure leaves behind."""

from __future__ import annotations

import errno
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.adapters.binding import BindError
from loraplex.adapters.errors import (
    AdapterFormatError,
    AlreadyExistsError,
    InvalidRequestError,
    NotFoundError,
    PreconditionError,
    ResourceExhaustedError,
)
from loraplex.adapters.formats import read_adapter
from loraplex.adapters.metadata import MetadataChange
from loraplex.adapters.records import AdapterFilter
from loraplex.adapters.registry import AdapterRegistry
from loraplex.adapters.store import LocalBlobStore
from tests.adapter_factory import tensors, tiny_base, write_adapter
from tests.unit.conftest import blobs, to


def test_a_registered_adapter_is_described_and_loaded(registry: AdapterRegistry, source: Path) -> None:
    registration = registry.register("team/two", source / "two", MetadataChange("the second"))
    record = registration.record
    assert registration.previous_digest is None
    assert (record.name, record.metadata.description, record.rank) == ("team/two", "the second", 4)
    assert record.target_modules == ("q_proj", "v_proj")
    assert record.size_bytes == (source / "two" / "adapter_model.safetensors").stat().st_size
    assert record.created_at.tzinfo is not None
    assert registry.resolve("team/two") == record == registry.get("team/two")
    assert read_adapter(registry.folder(record.digest)).digest == record.digest
    bound = registry.load(record.digest)
    assert bound.digest == record.digest
    assert bound.chat_template == "two's template"
    expected = tensors(tiny_base(), seed=2)["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"]
    assert torch.equal(bound.modules["model.layers.1.self_attn.v_proj"].b, expected)


def test_a_name_gets_versions(registry: AdapterRegistry, source: Path) -> None:
    one = registry.register("a", source / "one", MetadataChange("text")).record
    again = registry.register("a", source / "one")
    assert (again.record, again.previous_digest) == (one, one.digest)
    second = registry.register("a", source / "two")
    two = second.record
    assert second.previous_digest == one.digest != two.digest
    assert two.metadata.description == "text"
    assert registry.resolve("a") == two
    assert registry.resolve(f"a@{one.digest}").digest == one.digest
    assert registry.register("a", source / "one").previous_digest == two.digest
    assert registry.resolve("a").digest == one.digest
    with pytest.raises(NotFoundError, match="has no version 'sha256:0'"):
        registry.resolve("a@sha256:0")


def test_requests_in_flight_keep_their_version(registry: AdapterRegistry, source: Path, tmp_path: Path) -> None:
    registry.register("a", source / "one")
    digest = registry.acquire("a").digest
    assert registry.acquire(f"a@{digest}").active_requests == 2
    registry.register("a", source / "two")
    current = registry.acquire("a").digest
    gone = registry.unregister("a")
    assert (gone.digest, gone.active_requests) == (current, 3)
    with pytest.raises(NotFoundError):
        registry.acquire("a")
    assert blobs(tmp_path) == {digest, current}
    assert registry.load(digest).modules
    registry.release(current)
    registry.release(digest)
    assert blobs(tmp_path) == {digest}
    registry.release(digest)
    assert blobs(tmp_path) == set()
    with pytest.raises(NotFoundError):
        registry.load(digest)
    with pytest.raises(ValueError, match="more often than acquired"):
        registry.release(digest)


def test_the_last_release_waits_for_no_registration(
    registry: AdapterRegistry, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.register("a", source / "one")
    digest = registry.acquire("a").digest
    registry.unregister("a")
    drained = registry.stock.drained([digest])
    put = LocalBlobStore.put

    def release_meanwhile(store: LocalBlobStore, *args: Any, **options: Any) -> None:
        registry.release(digest)
        assert digest in blobs(tmp_path), "whoever writes deletes it, later"
        assert not drained.done()
        put(store, *args, **options)

    monkeypatch.setattr(LocalBlobStore, "put", release_meanwhile)
    other = registry.register("b", source / "two").record.digest
    assert blobs(tmp_path) == {other}
    assert drained.done()
    registry.check_integrity()


def test_content_shared_by_two_names_stays_for_the_other(registry: AdapterRegistry, source: Path) -> None:
    digest = registry.register("a", source / "one").record.digest
    assert registry.register("b", source / "one").record.digest == digest
    registry.unregister("a")
    assert registry.load(digest).modules


def test_aliases_move_in_one_step(registry: AdapterRegistry, source: Path) -> None:
    registry.register("v1", source / "one")
    registry.register("v2", source / "two")
    assert registry.aliases.set("live", to("v1")) == ()
    assert registry.aliases.set("live", to("v2")) == to("v1")
    assert registry.acquire("live").name == "v2"
    registry.release(registry.resolve("live").digest)
    assert registry.get("v2").aliases == ("live",)
    with pytest.raises(AlreadyExistsError, match="is the name of an adapter"):
        registry.aliases.set("v1", to("v2"))
    with pytest.raises(AlreadyExistsError, match="is an alias"):
        registry.register("live", source / "one")
    with pytest.raises(NotFoundError):
        registry.aliases.set("live", to("v3"))
    with pytest.raises(InvalidRequestError, match="is an alias of v2"):
        registry.aliases.set("other", to("live"))
    with pytest.raises(InvalidRequestError, match="is an alias of v2"):
        registry.unregister("live")
    with pytest.raises(PreconditionError, match=r"v2 has aliases \(live\)"):
        registry.unregister("v2")
    registry.aliases.delete("live")
    with pytest.raises(NotFoundError, match="no alias 'live'"):
        registry.aliases.delete("live")
    registry.unregister("v2")


def test_listing_filters_and_pages(registry: AdapterRegistry, source: Path) -> None:
    names = [f"x{i}" for i in range(7)]
    for name in [*reversed(names), "y"]:
        registry.register(name, source / "one")
    page = registry.list(AdapterFilter("x"), page_size=3)
    seen = [record.name for record in page.records]
    registry.unregister("x2")
    while page.next_page_token:
        page = registry.list(AdapterFilter("x"), page_size=3, page_token=page.next_page_token)
        seen += [record.name for record in page.records]
    assert seen == names
    assert [record.name for record in registry.list().records] == [n for n in [*names, "y"] if n != "x2"]
    with pytest.raises(InvalidRequestError, match="page_size"):
        registry.list(page_size=-1)
    with pytest.raises(InvalidRequestError, match="page_token"):
        registry.list(page_token="!")


def test_update_changes_the_description(registry: AdapterRegistry, source: Path) -> None:
    registry.register("a", source / "one", MetadataChange("old"))
    assert registry.update("a", MetadataChange()).metadata.description == "old"
    assert registry.update("a", MetadataChange("new")).metadata.description == "new"
    assert registry.update("a", MetadataChange("")).metadata.description == ""
    with pytest.raises(NotFoundError):
        registry.update("b", MetadataChange("x"))


@pytest.mark.parametrize(
    "name", ["", "base", "-a", ".a", "/a", "a/", "a//b", "a b", "ä", "a@b", "a\n", "x" * 129, "../a", "a:b"]
)
def test_names_that_are_not_allowed(registry: AdapterRegistry, source: Path, name: str) -> None:
    with pytest.raises(InvalidRequestError, match="name"):
        registry.register(name, source / "one")
    registry.register("fine-Name_1.0/x", source / "one")
    with pytest.raises(InvalidRequestError, match="alias"):
        registry.aliases.set(name, to("fine-Name_1.0/x"))


def test_unknown_names_hear_what_there_is(registry: AdapterRegistry, source: Path) -> None:
    with pytest.raises(NotFoundError, match="registered: none"):
        registry.resolve("sentiment")
    registry.register("sentiment", source / "one")
    with pytest.raises(NotFoundError, match="did you mean sentiment"):
        registry.resolve("sentimant")
    with pytest.raises(NotFoundError, match="registered: sentiment"):
        registry.acquire("zzz")


def test_a_refused_adapter_changes_nothing_and_leaves_a_report(
    registry: AdapterRegistry, source: Path, tmp_path: Path
) -> None:
    before = registry.register("a", source / "one").record
    weights = tensors(tiny_base())
    weights["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 8)
    weights["base_model.model.model.layers.9.mlp.up_proj.lora_B.weight"] = torch.zeros(8, 4)
    with pytest.raises(BindError) as unbound:
        registry.register("a", write_adapter(source / "bad", weights=weights))
    report = registry.bind_report(unbound.value.report_id)
    assert report == unbound.value.report
    assert {entry.subject for entry in report.problems} == {key for key in weights if ".9." in key}
    assert len(report.entries) == len(weights)
    with pytest.raises(AdapterFormatError) as unread:
        registry.register("a", write_adapter(source / "bad", use_qalora=True))
    assert [e.subject for e in registry.bind_report(unread.value.report_id).problems] == ["use_qalora"]
    assert registry.resolve("a") == before
    assert blobs(tmp_path) == {before.digest}
    good = registry.bind_report(before.digest)
    assert (good.report_id, good.problems) == (before.digest, ())
    assert {(entry.rank, entry.scaling) for entry in good.entries} == {(4, 2.0)}
    assert len(good.entries) == len(tensors(tiny_base()))
    with pytest.raises(NotFoundError):
        registry.bind_report("sha256:" + "0" * 64)
    with pytest.raises(NotFoundError, match="no report"):
        registry.bind_report("unknown")


def test_the_last_hundred_reports_are_kept(registry: AdapterRegistry, source: Path) -> None:
    (source / "empty").mkdir()
    ids = []
    for _ in range(101):
        with pytest.raises(AdapterFormatError) as caught:
            registry.register("a", source / "empty")
        ids.append(caught.value.report_id)
    with pytest.raises(NotFoundError):
        registry.bind_report(ids[0])
    assert registry.bind_report(ids[1]).report_id == ids[1]


def test_a_path_outside_the_roots_is_refused(registry: AdapterRegistry, source: Path, tmp_path: Path) -> None:
    outside = write_adapter(tmp_path / "outside")
    (source / "link").symlink_to(outside)
    for path in (outside, source / "link", source / ".." / "outside"):
        with pytest.raises(InvalidRequestError, match=f"not below the allowed adapter roots \\({source}\\)"):
            registry.register("a", path)


def test_without_roots_no_path_is_allowed(tmp_path: Path, source: Path) -> None:
    registry = AdapterRegistry(tmp_path / "other", tiny_base())
    with pytest.raises(InvalidRequestError, match="none are configured"):
        registry.register("a", source / "one")
    registry.close()


def test_a_full_disk_changes_nothing(
    registry: AdapterRegistry, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = registry.register("a", source / "one").record
    for target in ("loraplex.adapters.folder_copy._copy", "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(target, full)
            with pytest.raises(ResourceExhaustedError, match="disk is full"):
                registry.register("a", source / "two")
        assert registry.resolve("a") == before
        assert blobs(tmp_path) == {before.digest}
        assert list((tmp_path / "root" / "store" / "staging").iterdir()) == []


def test_a_catalog_that_cannot_be_written_changes_nothing(
    registry: AdapterRegistry, source: Path, tmp_path: Path
) -> None:
    before = registry.register("a", source / "one").record
    blocker = sqlite3.connect(tmp_path / "root" / "catalog.sqlite")
    blocker.execute("CREATE TRIGGER no BEFORE INSERT ON versions BEGIN SELECT RAISE(ABORT, 'refused'); END")
    blocker.commit()
    with pytest.raises(Exception, match="refused"):
        registry.register("a", source / "two")
    blocker.execute("DROP TRIGGER no")
    blocker.commit()
    blocker.close()
    assert registry.resolve("a") == before
    assert blobs(tmp_path) == {before.digest}


def test_threads_do_not_disturb_each_other(registry: AdapterRegistry, source: Path) -> None:
    registry.register("a", source / "one")
    failures: list[BaseException] = []

    def use() -> None:
        try:
            for _ in range(20):
                digest = registry.acquire("a").digest
                assert registry.load(digest).digest == digest
                registry.release(digest)
        except BaseException as error:
            failures.append(error)

    def change() -> None:
        try:
            for turn in range(10):
                registry.register("a", source / ("two" if turn % 2 else "one"))
                registry.register("b", source / "two")
                registry.unregister("b")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=target) for target in (use, use, use, change)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
