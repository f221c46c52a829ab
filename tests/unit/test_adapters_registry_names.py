"""Versions, weighted aliases, pins, metadata and usage, over restarts."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from loraplex.adapters.catalog import Catalog
from loraplex.adapters.errors import InvalidRequestError, NotFoundError, PreconditionError
from loraplex.adapters.metadata import MAX_TAGS, MetadataChange
from loraplex.adapters.records import AdapterFilter
from loraplex.adapters.registry import AdapterRegistry
from loraplex.adapters.usage import Usage, UsageMeter
from tests.adapter_factory import write_adapter
from tests.unit.conftest import Opener, blobs, to


@pytest.fixture
def versions(registry: AdapterRegistry, source: Path) -> list[str]:
    """The digests of a@1, a@2 and a@3; the third is the first again."""
    return [registry.register("a", source / name).record.digest for name in ("one", "two", "one")]


def test_versions_are_found_by_number_and_digest(registry: AdapterRegistry, versions: list[str]) -> None:
    for number, digest in enumerate(versions, 1):
        assert registry.get(f"a@{number}").digest == digest
    assert registry.get(f"a@{versions[0]}").version.number == 3, "of several with one content the latest"
    assert registry.get(f"a@{versions[1][:15]}").version.number == 2
    assert registry.get("a").version.number == 3
    assert [version.number for version in registry.get("a@1").adapter.versions] == [1, 2, 3]
    for wrong in ("a@0", "a@4", "a@", "a@two", "a@sha256:", f"a@{versions[1][:14]}", f"a@{versions[1]}0", "a@2@2"):
        with pytest.raises(NotFoundError, match="has no version"):
            registry.get(wrong)


def test_a_number_is_never_given_again(opener: Opener, source: Path) -> None:
    registry = opener()
    for name in ("one", "two"):
        registry.register("a", source / name)
    assert registry.unregister("a@2").digest == registry.register("b", source / "two").record.digest
    assert registry.get("a").version.number == 1
    assert registry.register("a", source / "two").record.version.number == 3
    registry.unregister("a")
    again = opener()
    assert again.register("a", source / "one").record.version.number == 4
    with pytest.raises(NotFoundError):
        again.get("a@1")


def test_an_earlier_content_comes_back_only_if_that_is_asked(registry: AdapterRegistry, source: Path) -> None:
    for name in ("one", "two"):
        registry.register("a", source / name)
    assert registry.register("a", source / "one", restore=False).record.version.number == 2
    assert registry.register("a", source / "one", MetadataChange("d"), restore=False).record.metadata.description == "d"
    three = registry.register("a", write_adapter(source / "three", seed=3), restore=False).record
    assert three.version.number == 3
    assert registry.register("a", source / "one").record.version.number == 4


def test_one_version_goes(registry: AdapterRegistry, versions: list[str], tmp_path: Path) -> None:
    registry.acquire("a@2")
    gone = registry.unregister(f"a@{versions[1]}")
    assert (gone.name, gone.digest, gone.active_requests) == ("a", versions[1], 1)
    assert set(gone.unnamed) == {versions[1]}
    assert blobs(tmp_path) == set(versions), "a request still uses it"
    drained = registry.stock.drained(gone.unnamed)
    assert not drained.done()
    registry.release(versions[1])
    assert drained.done()
    assert blobs(tmp_path) == {versions[0]}
    assert registry.unregister("a@1").unnamed == {}, "version 3 has the same content"
    assert set(registry.unregister(f"a@{versions[0]}").unnamed) == {versions[0]}
    with pytest.raises(NotFoundError):
        registry.get("a")
    with pytest.raises(NotFoundError, match="no adapter named"):
        registry.unregister("a@3")


def test_an_alias_splits_requests_and_keeps_to_a_key(registry: AdapterRegistry, versions: list[str]) -> None:
    registry.aliases.set("live", to(**{"a@1": 1.0, "a@2": 1.0}))
    chosen = {key: registry.acquire("live", key).digest for key in map(str, range(64))}
    assert set(chosen.values()) == set(versions)
    assert {key: registry.acquire("live", key).digest for key in chosen} == chosen
    assert {registry.acquire("live", "").digest for _ in range(64)} == set(versions)
    registry.aliases.set("live", to(**{"a@1": 1.0, "a@2": 3.0}))
    assert registry.resolve("live").digest == registry.acquire("live").digest == versions[1]
    assert registry.get("live@1").version.number == 1, "all targets are of one name"
    assert registry.get("a").aliases == ("live",)


def test_an_alias_of_several_names_takes_no_version(registry: AdapterRegistry, source: Path) -> None:
    for name in ("one", "two"):
        registry.register(name, source / name)
    registry.aliases.set("live", to(one=1.0, two=1.0))
    with pytest.raises(NotFoundError, match="live is an alias of one and two"):
        registry.get("live@1")
    assert registry.get("one").aliases == registry.get("two").aliases == ("live",)


def test_an_alias_of_a_name_follows_it_and_one_of_a_version_stays(registry: AdapterRegistry, source: Path) -> None:
    first = registry.register("a", source / "one").record.digest
    registry.aliases.set("stable", to("a@1"))
    registry.aliases.set("latest", to("a"))
    second = registry.register("a", source / "two").record.digest
    assert registry.resolve("stable").digest == first
    assert registry.resolve("latest").digest == second
    with pytest.raises(PreconditionError, match=r"a@1 has aliases \(stable\)"):
        registry.unregister("a@1")
    with pytest.raises(PreconditionError, match=r"a has aliases \(latest, stable\)"):
        registry.unregister("a")
    registry.unregister("a@2")
    assert registry.resolve("latest").digest == first
    with pytest.raises(NotFoundError, match="a has no version 2"):
        registry.aliases.set("stable", to("a@2"))


def test_a_rollback_is_taken_back_by_another(opener: Opener, source: Path) -> None:
    registry = opener()
    for name in ("one", "two"):
        registry.register(name, source / name)
    registry.aliases.set("live", to("one"))
    with pytest.raises(PreconditionError, match="has not pointed at anything else"):
        registry.aliases.rollback("live")
    registry.aliases.set("live", to(one=9.0, two=1.0))
    registry = opener()
    assert registry.aliases.rollback("live") == to("one")
    assert registry.aliases.rollback("live") == to(one=9.0, two=1.0)
    registry.aliases.set("live", to("two"))
    registry.aliases.set("live", to("one"))
    registry.unregister("two")
    with pytest.raises(PreconditionError, match="live pointed at two, which is not registered any more"):
        registry.aliases.rollback("live")
    assert registry.resolve("live").name == "one"
    with pytest.raises(NotFoundError, match="no alias"):
        registry.aliases.rollback("other")


def test_a_pin_follows_its_name_and_outlives_a_restart(opener: Opener, source: Path) -> None:
    registry = opener()
    one = registry.register("a", source / "one").record.digest
    registry.aliases.set("live", to("a"))
    registry.pins.add("live")
    two = registry.register("a", source / "two").record.digest
    registry = opener()
    assert registry.pins.digests == {two}
    assert registry.get("a").pinned
    assert not registry.get("a@1").pinned
    registry.pins.add("a@1")
    registry.pins.add("a@2")
    assert registry.pins.digests == {one, two}
    registry.pins.remove("a")
    assert registry.pins.digests == {one}
    registry.aliases.delete("live")
    registry.unregister("a@1")
    assert registry.pins.digests == frozenset()
    with pytest.raises(NotFoundError):
        registry.pins.add("a@1")
    registry.pins.add("a")
    registry.unregister("a")
    assert opener().directory.pins == frozenset()


def test_metadata_stay_where_nothing_new_is_said(opener: Opener, source: Path) -> None:
    registry = opener()
    given = MetadataChange("text", ("b", "a", "b"), "me", {"temperature": 0.5, "stop": ["x"]})
    first = registry.register("a", source / "one", given).record.metadata
    assert (first.description, first.tags, first.owner) == ("text", ("a", "b"), "me")
    second = registry.register("a", source / "two", MetadataChange(owner="you")).record.metadata
    assert (second.description, second.tags, second.owner) == ("text", ("a", "b"), "you")
    assert second.default_sampling == {"temperature": 0.5, "stop": ["x"]}
    assert registry.update("a", MetadataChange(tags=(), default_sampling={})).metadata.tags == ()
    again = opener().get("a").metadata
    assert (again.description, again.tags, again.owner, again.default_sampling) == ("text", (), "you", {})


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (MetadataChange(tags=("",)), "tags"),
        (MetadataChange(tags=tuple(map(str, range(MAX_TAGS + 1)))), "tags"),
        (MetadataChange(tags=("x" * 101,)), "tags"),
        (MetadataChange(owner="x" * 201), "owner"),
        (MetadataChange(description="x" * 10_001), "description"),
    ],
)
def test_metadata_have_limits(registry: AdapterRegistry, source: Path, change: MetadataChange, field: str) -> None:
    registry.register("a", source / "one")
    for call in (lambda: registry.update("a", change), lambda: registry.register("b", source / "one", change)):
        with pytest.raises(InvalidRequestError, match=field):
            call()
    assert registry.count() == 1


def test_listing_by_tag_and_owner(registry: AdapterRegistry, source: Path) -> None:
    for name, tags, owner in (("a", ("x", "y"), "me"), ("b", ("x",), "you"), ("c", (), "me")):
        registry.register(name, source / "one", MetadataChange(tags=tags, owner=owner))

    def found(**wanted: object) -> list[str]:
        return [record.name for record in registry.list(AdapterFilter(**wanted)).records]  # type: ignore[arg-type]

    assert found(tags=("x",)) == ["a", "b"]
    assert found(tags=("x", "y")) == ["a"]
    assert found(owner="me") == ["a", "c"]
    assert found(owner="me", tags=("x",), name_contains="b") == []
    page = registry.list(AdapterFilter(owner="me"), page_size=1)
    assert [record.name for record in page.records] == ["a"]
    assert [r.name for r in registry.list(AdapterFilter(owner="me"), 1, page.next_page_token).records] == ["c"]


def test_usage_is_of_the_name_and_outlives_a_restart(opener: Opener, source: Path) -> None:
    registry = opener()
    registry.register("a", source / "one")
    assert registry.get("a").usage == Usage()
    before = datetime.now(UTC)
    registry.usage.count("a", 3, 5)
    registry.usage.count("a", 1, 0)
    registry.usage.count("nothing", 1, 1)
    registry.register("a", source / "two")
    used = registry.get("a").usage
    assert (used.requests, used.prompt_tokens, used.generation_tokens) == (2, 4, 5)
    assert used.last_used_at is not None
    assert before <= used.last_used_at <= datetime.now(UTC)
    registry = opener()
    assert registry.get("a").usage == used
    registry.unregister("a")
    registry.register("a", source / "one")
    assert registry.get("a").usage == Usage()
    assert opener().get("a").usage == Usage()


def test_usage_is_written_in_batches_and_not_lost_by_a_failure() -> None:
    saved: list[dict[str, Usage]] = []
    wrote = threading.Event()
    failures = iter([OSError("the disk is full"), None, None])

    ready = threading.Event()

    def save() -> None:
        assert ready.wait(10)
        failure = next(failures, None)
        with meter.unsaved() as usage:
            if failure:
                raise failure
            saved.append(dict(usage))
            wrote.set()

    meter = UsageMeter({"a": Usage(7, 1, 1)}, save, every_s=0.01)
    for _ in range(100):
        meter.count("a", 1, 2)
    ready.set()
    assert wrote.wait(10)
    assert [(used["a"].requests, used["a"].generation_tokens) for used in saved] == [(107, 201)]
    meter.count("b", 1, 1)
    meter.close()
    assert set(saved[-1]) == {"b"}


def test_counting_waits_for_no_disk(registry: AdapterRegistry, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.register("a", source / "one")
    registry.register("a", source / "two")
    registry.aliases.set("live", to(**{"a@1": 1.0, "a@2": 1.0}))
    publishing, go_on = threading.Event(), threading.Event()
    publish = Catalog.publish

    def slow(*arguments: object) -> None:
        publishing.set()
        assert go_on.wait(30)
        publish(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Catalog, "publish", slow)
    third = write_adapter(source / "three", seed=3)
    registering = threading.Thread(target=registry.register, args=("a", third))
    registering.start()
    assert publishing.wait(30)
    # Were any of these to wait for the registration, it would never end.
    digest = registry.acquire("live", "key").digest
    registry.usage.count("a", 1, 1)
    registry.release(digest)
    assert registry.get("a").usage.requests == 1
    assert registry.list().records[0].version.number == 2
    go_on.set()
    registering.join(30)
    assert registry.get("a").version.number == 3
