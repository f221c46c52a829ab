"""The registry over restarts: what survives, another base, damaged or missing weights."""

from __future__ import annotations

import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from loraplex.adapters.binding import BaseModel, BaseModule
from loraplex.adapters.errors import (
    CorruptStoreError,
    PreconditionError,
)
from loraplex.adapters.metadata import MetadataChange
from loraplex.adapters.registry import AdapterRegistry
from tests.adapter_factory import tiny_base
from tests.unit.conftest import Opener, blobs, to


def test_everything_survives_a_restart(opener: Opener, source: Path, tmp_path: Path) -> None:
    registry = opener()
    one = registry.register("a", source / "one", MetadataChange("first")).record
    two = registry.register("a", source / "two").record
    registry.register("b", source / "one")
    registry.aliases.set("live", to("a"))
    registry.acquire("b")
    registry.unregister("b")
    opener.close()
    (tmp_path / "root" / "incoming" / "left").mkdir()
    (tmp_path / "root" / "store" / "sha256" / ("f" * 64)).mkdir()
    again = opener()
    assert again.warnings == ()
    assert again.resolve("live") == replace(two, aliases=("live",))
    assert again.resolve(f"a@{one.digest}").created_at == one.created_at
    assert blobs(tmp_path) == {one.digest, two.digest}
    assert list(again.incoming.iterdir()) == []


def test_another_base_makes_warnings_not_crashes(
    opener: Opener, registry: AdapterRegistry, source: Path, tmp_path: Path
) -> None:
    record = registry.register("a", source / "one").record
    narrow = {name: BaseModule(name, 2, 2) for name in tiny_base().modules}
    other = opener(BaseModel("narrow", "LlamaForCausalLM", "narrow", narrow))
    assert len(other.warnings) == 1
    assert other.warnings[0].startswith(f"a@{record.digest}: the adapter does not fit the base model narrow")
    assert "does not fit" in other.get("a").problem
    assert other.list().records[0].problem
    for call in (other.resolve, other.acquire):
        with pytest.raises(PreconditionError, match="a cannot be used: the adapter does not fit"):
            call("a")
    same_shapes = opener(tiny_base("retrained"))
    assert same_shapes.warnings == ()
    assert same_shapes.acquire("a").digest == record.digest


def test_a_damaged_store_is_noticed_and_repaired(registry: AdapterRegistry, source: Path, tmp_path: Path) -> None:
    digest = registry.register("a", source / "one").record.digest
    stored = tmp_path / "root" / "store" / "sha256" / digest.removeprefix("sha256:") / "adapter_model.safetensors"
    data = bytearray(stored.read_bytes())
    data[-1] ^= 1
    stored.write_bytes(data)
    with pytest.raises(CorruptStoreError, match="have changed"):
        registry.load(digest)
    stored.write_bytes(data[:-1])
    with pytest.raises(CorruptStoreError, match="cannot be read"):
        registry.load(digest)
    assert registry.register("a", source / "one").record.digest == digest
    assert registry.load(digest).digest == digest


def test_missing_weights_are_a_warning_and_can_be_registered_again(source: Path, tmp_path: Path) -> None:
    registry = AdapterRegistry(tmp_path / "root", tiny_base(), [source])
    digest = registry.register("a", source / "one").record.digest
    registry.close()
    shutil.rmtree(tmp_path / "root" / "store" / "sha256" / digest.removeprefix("sha256:"))
    again = AdapterRegistry(tmp_path / "root", tiny_base(), [source])
    with pytest.raises(PreconditionError, match="missing from the store"):
        again.resolve("a")
    again.check_integrity()
    assert again.register("a", source / "one").record.problem == ""
    assert again.acquire("a").digest == digest
    again.check_integrity()
    again.close()


def test_one_process_has_the_root(registry: AdapterRegistry, tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="in use by another process"):
        AdapterRegistry(tmp_path / "root", tiny_base())


def test_a_catalog_of_something_else_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    AdapterRegistry(root, tiny_base()).close()
    with sqlite3.connect(root / "catalog.sqlite") as connection:
        connection.execute("UPDATE schema SET version = 99")
    with pytest.raises(CorruptStoreError, match="format 99"):
        AdapterRegistry(root, tiny_base())
    for path in root.glob("catalog.sqlite*"):
        path.unlink()
    (root / "catalog.sqlite").write_text("not a database " * 100)
    with pytest.raises(CorruptStoreError, match="cannot be read"):
        AdapterRegistry(root, tiny_base())
