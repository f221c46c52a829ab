"""Names, their versions, aliases and pins: SQLite through SQLAlchemy, mirrored in memory.

Reads come from an immutable `Directory` and take no lock. Writes go to the database first, one transaction each, and
then exchange the directory, so a reader sees a change whole or not at all. Knows nothing about weights or base models.
One process owns a catalog (the registry locks its folder) and one thread at a time may write.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from loraplex.adapters import schema
from loraplex.adapters.alias import Alias, AliasTarget
from loraplex.adapters.directory import Directory, NamedAdapter, Pin, Version
from loraplex.adapters.errors import CorruptStoreError, ResourceExhaustedError
from loraplex.adapters.metadata import Metadata
from loraplex.adapters.traits import AdapterTraits
from loraplex.adapters.usage import Usage


class Catalog:
    """The catalog in one SQLite file."""

    def __init__(self, url: str) -> None:
        """Open or create the database that the SQLAlchemy `url` names; one of an earlier format is converted.

        Raises:
            CorruptStoreError: if the file is not a catalog, or one of a newer version.
        """
        self._engine = schema.connect(url)
        try:
            with self._transaction() as connection:
                schema.prepare(connection)
            self.directory = self.read()
        except sa.exc.DatabaseError as error:
            self._engine.dispose()
            raise CorruptStoreError(
                f"the adapter catalog {self._engine.url.database} cannot be read: {error}"
            ) from error

    def read(self) -> Directory:
        """Read the whole catalog from the database."""
        with self._engine.connect() as connection:
            metadata = {row.name: _metadata(row) for row in connection.execute(sa.select(schema.names))}
            versions: dict[str, list[Version]] = {name: [] for name in metadata}
            in_order = sa.select(schema.versions).order_by(schema.versions.c.name, schema.versions.c.number)
            for row in connection.execute(in_order):
                versions[row.name].append(_version(row))
            aliases = {row.alias: _alias(row) for row in connection.execute(sa.select(schema.aliases))}
            pins = frozenset((row.name, row.number) for row in connection.execute(sa.select(schema.pins)))
        names = {name: NamedAdapter(name, found, tuple(versions[name])) for name, found in metadata.items()}
        return Directory(names, aliases, pins)

    def publish(self, name: str, metadata: Metadata, version: Version) -> None:
        """Make `version` what `name` means, under a number that the name never had; the name may be new."""
        known = self.directory.names.get(name)
        with self._transaction() as connection:
            last = connection.scalar(sa.select(schema.numbers.c.last).where(schema.numbers.c.name == name)) or 0
            version = replace(version, number=last + 1)
            connection.execute(schema.numbers.delete().where(schema.numbers.c.name == name))
            connection.execute(schema.numbers.insert().values(name=name, last=version.number))
            if known:
                connection.execute(schema.names.update().where(schema.names.c.name == name).values(_row(metadata)))
            else:
                connection.execute(schema.names.insert().values(name=name, **_row(metadata)))
            connection.execute(schema.versions.insert().values(name=name, **_version_row(version)))
        versions = known.versions if known else ()
        self.directory = self.directory.with_adapter(NamedAdapter(name, metadata, (*versions, version)))

    def describe(self, name: str, metadata: Metadata) -> None:
        """Set the metadata of the registered `name`."""
        with self._transaction() as connection:
            connection.execute(schema.names.update().where(schema.names.c.name == name).values(_row(metadata)))
        self.directory = self.directory.with_adapter(replace(self.directory.names[name], metadata=metadata))

    def reduce(self, adapter: NamedAdapter) -> None:
        """Take out the versions of a registered name that `adapter` lacks, and the name with the last of them."""
        table = schema.versions.c
        with self._transaction() as connection:
            for version in self.directory.names[adapter.name].versions:
                if version not in adapter.versions:
                    chosen = (table.name == adapter.name) & (table.number == version.number)
                    connection.execute(schema.versions.delete().where(chosen))
                    gone = (schema.pins.c.name == adapter.name) & (schema.pins.c.number == version.number)
                    connection.execute(schema.pins.delete().where(gone))
            if not adapter.versions:
                connection.execute(schema.names.delete().where(schema.names.c.name == adapter.name))
        self.directory = self.directory.with_adapter(adapter)

    def set_alias(self, alias: Alias) -> None:
        """Make or replace an alias, in one step."""
        with self._transaction() as connection:
            connection.execute(schema.aliases.delete().where(schema.aliases.c.alias == alias.alias))
            row = {"targets": _pairs(alias.targets), "previous": _pairs(alias.previous)}
            connection.execute(schema.aliases.insert().values(alias=alias.alias, **row))
        self.directory = self.directory.with_alias(alias)

    def delete_alias(self, alias: str) -> None:
        """Take `alias` out."""
        with self._transaction() as connection:
            connection.execute(schema.aliases.delete().where(schema.aliases.c.alias == alias))
        self.directory = self.directory.without_alias(alias)

    def set_pins(self, pins: frozenset[Pin]) -> None:
        """Replace all pins; each is of a registered name, and of a version that it has."""
        with self._transaction() as connection:
            for name, number in self.directory.pins - pins:
                gone = (schema.pins.c.name == name) & (schema.pins.c.number == number)
                connection.execute(schema.pins.delete().where(gone))
            for name, number in pins - self.directory.pins:
                connection.execute(schema.pins.insert().values(name=name, number=number))
        self.directory = replace(self.directory, pins=pins)

    def set_fingerprint(self, digests: Collection[str], base_fingerprint: str) -> None:
        """Note that the adapters `digests` were found to fit another base, in every version that has them."""
        with self._transaction() as connection:
            for digest in digests:
                chosen = schema.versions.update().where(schema.versions.c.digest == digest)
                connection.execute(chosen.values(base_fingerprint=base_fingerprint))
        self.directory = self.read()

    def read_usage(self) -> Mapping[str, Usage]:
        """Read how much each name has been used."""
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(schema.usage)).all()
        return {
            row.name: Usage(
                row.requests, row.prompt_tokens, row.generation_tokens, datetime.fromisoformat(row.last_used_at)
            )
            for row in rows
        }

    def write_usage(self, usage: Mapping[str, Usage]) -> None:
        """Replace the usage of these registered names."""
        rows = [
            {
                "name": name,
                "requests": used.requests,
                "prompt_tokens": used.prompt_tokens,
                "generation_tokens": used.generation_tokens,
                "last_used_at": used.last_used_at.isoformat(),
            }
            for name, used in usage.items()
            if used.last_used_at is not None
        ]
        if not rows:
            return
        with self._transaction() as connection:
            connection.execute(schema.usage.delete().where(schema.usage.c.name.in_(usage)))
            connection.execute(schema.usage.insert(), rows)

    def close(self) -> None:
        """Close the database."""
        self._engine.dispose()

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except sa.exc.OperationalError as error:
            if "is full" in str(error.orig):
                raise ResourceExhaustedError("the disk is full while writing the adapter catalog") from error
            raise


def _metadata(row: sa.Row[Any]) -> Metadata:
    return Metadata(row.description, tuple(row.tags), row.owner, row.default_sampling)


def _row(metadata: Metadata) -> Mapping[str, Any]:
    return {
        "description": metadata.description,
        "tags": list(metadata.tags),
        "owner": metadata.owner,
        "default_sampling": dict(metadata.default_sampling),
    }


def _version(row: sa.Row[Any]) -> Version:
    return Version(
        digest=row.digest,
        rank=row.rank,
        target_modules=tuple(row.target_modules),
        size_bytes=row.size_bytes,
        base_fingerprint=row.base_fingerprint,
        created_at=datetime.fromisoformat(row.created_at),
        traits=AdapterTraits.from_json(row.traits),
        source=row.source,
        number=row.number,
    )


def _version_row(version: Version) -> Mapping[str, Any]:
    return {
        "number": version.number,
        "digest": version.digest,
        "rank": version.rank,
        "target_modules": list(version.target_modules),
        "size_bytes": version.size_bytes,
        "base_fingerprint": version.base_fingerprint,
        "created_at": version.created_at.isoformat(),
        "traits": version.traits.to_json(),
        "source": version.source,
    }


def _alias(row: sa.Row[Any]) -> Alias:
    return Alias(row.alias, _targets(row.targets), _targets(row.previous))


def _targets(pairs: list[list[Any]]) -> tuple[AliasTarget, ...]:
    return tuple(AliasTarget(name, weight) for name, weight in pairs)


def _pairs(targets: tuple[AliasTarget, ...]) -> list[list[Any]]:
    return [[target.name, target.weight] for target in targets]
