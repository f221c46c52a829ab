"""Names, their versions and aliases: SQLite through SQLAlchemy, mirrored in memory.

Reads come from an immutable `Directory` and take no lock. Writes go to the database first, one transaction each, and
then exchange the directory, so a reader sees a change whole or not at all. Knows nothing about weights or base models.
One process owns a catalog (the registry locks its folder) and one thread at a time may write.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from loraplex.adapters.directory import Directory, NamedAdapter, Version
from loraplex.adapters.errors import CorruptStoreError, ResourceExhaustedError

SCHEMA_VERSION = 1
_metadata = sa.MetaData()
_schema = sa.Table("schema", _metadata, sa.Column("version", sa.Integer, primary_key=True))
_names = sa.Table(
    "names",
    _metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("description", sa.String, nullable=False),
)
_versions = sa.Table(
    "versions",
    _metadata,
    sa.Column("name", sa.ForeignKey("names.name", ondelete="CASCADE"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("digest", sa.String, nullable=False, index=True),
    sa.Column("rank", sa.Integer, nullable=False),
    sa.Column("target_modules", sa.JSON, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("base_fingerprint", sa.String, nullable=False),
    sa.Column("created_at", sa.String, nullable=False),
)
_aliases = sa.Table(
    "aliases",
    _metadata,
    sa.Column("alias", sa.String, primary_key=True),
    sa.Column("name", sa.ForeignKey("names.name"), nullable=False),
)


class Catalog:
    """The catalog in one SQLite file."""

    def __init__(self, url: str) -> None:
        """Open or create the database that the SQLAlchemy `url` names.

        Raises:
            CorruptStoreError: if the file is not a catalog, or one of a newer version.
        """
        self._engine = sa.create_engine(url)
        sa.event.listen(self._engine, "connect", _configure)
        try:
            _metadata.create_all(self._engine)
            with self._transaction() as connection:
                version = connection.scalar(sa.select(_schema.c.version))
                if version is None:
                    connection.execute(_schema.insert().values(version=SCHEMA_VERSION))
            if version not in (None, SCHEMA_VERSION):
                raise CorruptStoreError(f"the catalog has format {version}; this program knows {SCHEMA_VERSION}")
            self.directory = self.read()
        except sa.exc.DatabaseError as error:
            self._engine.dispose()
            raise CorruptStoreError(
                f"the adapter catalog {self._engine.url.database} cannot be read: {error}"
            ) from error

    def read(self) -> Directory:
        """Read the whole catalog from the database."""
        with self._engine.connect() as connection:
            descriptions = {row.name: row.description for row in connection.execute(sa.select(_names))}
            versions: dict[str, list[Version]] = {name: [] for name in descriptions}
            for row in connection.execute(sa.select(_versions).order_by(_versions.c.name, _versions.c.number)):
                versions[row.name].append(_version(row))
            aliases = {row.alias: row.name for row in connection.execute(sa.select(_aliases))}
        names = {name: NamedAdapter(name, text, tuple(versions[name])) for name, text in descriptions.items()}
        return Directory(names, aliases)

    def publish(self, name: str, description: str, version: Version) -> None:
        """Make `version` what `name` means; the name is new or gets one more version."""
        known = self.directory.names.get(name)
        versions = known.versions if known else ()
        with self._transaction() as connection:
            if known:
                connection.execute(_names.update().where(_names.c.name == name).values(description=description))
            else:
                connection.execute(_names.insert().values(name=name, description=description))
            connection.execute(
                _versions.insert().values(
                    name=name,
                    number=len(versions) + 1,
                    digest=version.digest,
                    rank=version.rank,
                    target_modules=list(version.target_modules),
                    size_bytes=version.size_bytes,
                    base_fingerprint=version.base_fingerprint,
                    created_at=version.created_at.isoformat(),
                )
            )
        self._set_name(NamedAdapter(name, description, (*versions, version)))

    def describe(self, name: str, description: str) -> None:
        """Set the description of the registered `name`."""
        with self._transaction() as connection:
            connection.execute(_names.update().where(_names.c.name == name).values(description=description))
        self._set_name(replace(self.directory.names[name], description=description))

    def remove(self, name: str) -> None:
        """Take the registered `name` and all its versions out; no alias may point at it."""
        with self._transaction() as connection:
            connection.execute(_names.delete().where(_names.c.name == name))
        names = {key: value for key, value in self.directory.names.items() if key != name}
        self.directory = Directory(names, self.directory.aliases)

    def set_alias(self, alias: str, name: str) -> None:
        """Make `alias` point at the registered `name`, in one step if it pointed elsewhere."""
        with self._transaction() as connection:
            connection.execute(_aliases.delete().where(_aliases.c.alias == alias))
            connection.execute(_aliases.insert().values(alias=alias, name=name))
        self.directory = replace(self.directory, aliases={**self.directory.aliases, alias: name})

    def delete_alias(self, alias: str) -> None:
        """Take `alias` out."""
        with self._transaction() as connection:
            connection.execute(_aliases.delete().where(_aliases.c.alias == alias))
        self.directory = replace(
            self.directory, aliases={k: v for k, v in self.directory.aliases.items() if k != alias}
        )

    def set_fingerprint(self, digests: Collection[str], base_fingerprint: str) -> None:
        """Note that the adapters `digests` were found to fit another base, in every version that has them."""
        with self._transaction() as connection:
            for digest in digests:
                chosen = _versions.update().where(_versions.c.digest == digest)
                connection.execute(chosen.values(base_fingerprint=base_fingerprint))
        self.directory = self.read()

    def close(self) -> None:
        """Close the database."""
        self._engine.dispose()

    def _set_name(self, adapter: NamedAdapter) -> None:
        self.directory = Directory({**self.directory.names, adapter.name: adapter}, self.directory.aliases)

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except sa.exc.OperationalError as error:
            if "is full" in str(error.orig):
                raise ResourceExhaustedError("the disk is full while writing the adapter catalog") from error
            raise


def _version(row: sa.Row[Any]) -> Version:
    return Version(
        digest=row.digest,
        rank=row.rank,
        target_modules=tuple(row.target_modules),
        size_bytes=row.size_bytes,
        base_fingerprint=row.base_fingerprint,
        created_at=datetime.fromisoformat(row.created_at),
    )


def _configure(connection: Any, _record: object) -> None:
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}")
