"""The catalog: what it keeps, and databases of an earlier format."""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from loraplex.adapters.alias import Alias
from loraplex.adapters.catalog import Catalog
from loraplex.adapters.directory import Version
from loraplex.adapters.metadata import Metadata
from loraplex.adapters.traits import AdapterTraits
from tests.unit.conftest import to

FORMAT_1 = """
CREATE TABLE schema (version INTEGER NOT NULL, PRIMARY KEY (version));
CREATE TABLE names (name VARCHAR NOT NULL, description VARCHAR NOT NULL, PRIMARY KEY (name));
CREATE TABLE versions (
    name VARCHAR NOT NULL, number INTEGER NOT NULL, digest VARCHAR NOT NULL, rank INTEGER NOT NULL,
    target_modules JSON NOT NULL, size_bytes BIGINT NOT NULL, base_fingerprint VARCHAR NOT NULL,
    created_at VARCHAR NOT NULL, PRIMARY KEY (name, number),
    FOREIGN KEY(name) REFERENCES names (name) ON DELETE CASCADE
);
CREATE INDEX ix_versions_digest ON versions (digest);
CREATE TABLE aliases (
    alias VARCHAR NOT NULL, name VARCHAR NOT NULL, PRIMARY KEY (alias), FOREIGN KEY(name) REFERENCES names (name)
);
INSERT INTO schema VALUES (1);
INSERT INTO names VALUES ('a', 'the first'), ('b', '');
INSERT INTO versions VALUES
    ('a', 1, 'sha256:a1', 4, '["q_proj"]', 100, 'base', '2026-01-02T03:04:05+00:00'),
    ('a', 2, 'sha256:a2', 8, '["q_proj", "v_proj"]', 200, 'base', '2026-01-03T03:04:05+00:00'),
    ('b', 1, 'sha256:b1', 4, '["q_proj"]', 100, 'base', '2026-01-02T03:04:05+00:00');
INSERT INTO aliases VALUES ('live', 'a');
"""


def version(digest: str, **changes: Any) -> Version:
    values: dict[str, Any] = {"rank": 4, "target_modules": ("q_proj",), "size_bytes": 1, "base_fingerprint": "base"}
    return Version(digest=digest, created_at=datetime(2026, 1, 2, tzinfo=UTC), **{**values, **changes})


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'catalog.sqlite'}"


def test_a_catalog_of_format_1_is_converted(tmp_path: Path, url: str) -> None:
    with sqlite3.connect(tmp_path / "catalog.sqlite") as connection:
        connection.executescript(FORMAT_1)
    catalog = Catalog(url)
    a, b = catalog.directory.names["a"], catalog.directory.names["b"]
    assert (a.metadata, b.metadata) == (Metadata("the first"), Metadata())
    assert [(v.number, v.digest, v.rank, v.traits, v.source) for v in a.versions] == [
        (1, "sha256:a1", 4, AdapterTraits(), ""),
        (2, "sha256:a2", 8, AdapterTraits(), ""),
    ]
    assert catalog.directory.aliases == {"live": Alias("live", to("a"))}
    catalog.publish("a", a.metadata, version("sha256:a3"))
    assert catalog.directory.names["a"].current.number == 3
    catalog.close()
    again = Catalog(url)
    assert again.directory == catalog.directory
    again.close()


def test_a_conversion_that_is_ended_has_not_begun(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with sqlite3.connect(tmp_path / "catalog.sqlite") as connection:
        connection.executescript(FORMAT_1)
    with monkeypatch.context() as patched:
        patched.setattr("loraplex.adapters.schema._COPY_FROM_1", ("DROP TABLE aliases_1", "not SQL"))
        with pytest.raises(Exception, match="cannot be read"):
            Catalog(url)
    catalog = Catalog(url)
    assert catalog.directory.aliases == {"live": Alias("live", to("a"))}
    catalog.close()


def test_a_catalog_that_was_not_finished_is_made_anew(tmp_path: Path, url: str) -> None:
    with sqlite3.connect(tmp_path / "catalog.sqlite") as connection:
        connection.executescript(FORMAT_1[: FORMAT_1.index("CREATE TABLE versions")])
    catalog = Catalog(url)
    catalog.publish("a", Metadata(), version("sha256:1"))
    assert set(catalog.read().names) == {"a"}
    catalog.close()


def test_traits_and_source_are_kept(url: str) -> None:
    catalog = Catalog(url)
    traits = AdapterTraits("alora", True, (1, 2))
    catalog.publish("a", Metadata("d", ("x",), "me", {"top_k": 3}), version("sha256:1", traits=traits, source="upload"))
    catalog.set_pins(frozenset({("a", 0), ("a", 1)}))
    before = catalog.directory
    catalog.close()
    again = Catalog(url)
    assert again.directory == before
    assert again.directory.names["a"].current.traits == traits
    assert again.directory.pinned_digests == {"sha256:1"}
    again.close()
