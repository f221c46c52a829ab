"""The catalog's tables, and how a database of an earlier format becomes one of this.

Knows SQL and nothing about what the rows mean.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from loraplex.adapters.errors import CorruptStoreError

SCHEMA_VERSION = 2
metadata = sa.MetaData()
schema = sa.Table("schema", metadata, sa.Column("version", sa.Integer, primary_key=True))
names = sa.Table(
    "names",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("description", sa.String, nullable=False),
    sa.Column("tags", sa.JSON, nullable=False),
    sa.Column("owner", sa.String, nullable=False),
    sa.Column("default_sampling", sa.JSON, nullable=False),
)
# Outlives the name: `name@2` never comes to mean something else.
numbers = sa.Table(
    "numbers",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("last", sa.Integer, nullable=False),
)
versions = sa.Table(
    "versions",
    metadata,
    sa.Column("name", sa.ForeignKey("names.name", ondelete="CASCADE"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("digest", sa.String, nullable=False, index=True),
    sa.Column("rank", sa.Integer, nullable=False),
    sa.Column("target_modules", sa.JSON, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("base_fingerprint", sa.String, nullable=False),
    sa.Column("created_at", sa.String, nullable=False),
    sa.Column("traits", sa.JSON, nullable=False),
    sa.Column("source", sa.String, nullable=False),
)
aliases = sa.Table(
    "aliases",
    metadata,
    sa.Column("alias", sa.String, primary_key=True),
    # Lists of [name, weight].
    sa.Column("targets", sa.JSON, nullable=False),
    sa.Column("previous", sa.JSON, nullable=False),
)
pins = sa.Table(
    "pins",
    metadata,
    sa.Column("name", sa.ForeignKey("names.name", ondelete="CASCADE"), primary_key=True),
    # 0 is whichever version is current.
    sa.Column("number", sa.Integer, primary_key=True),
)
usage = sa.Table(
    "usage",
    metadata,
    sa.Column("name", sa.ForeignKey("names.name", ondelete="CASCADE"), primary_key=True),
    sa.Column("requests", sa.BigInteger, nullable=False),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("generation_tokens", sa.BigInteger, nullable=False),
    sa.Column("last_used_at", sa.String, nullable=False),
)
_FROM_1 = (
    "ALTER TABLE names ADD COLUMN tags JSON NOT NULL DEFAULT '[]'",
    "ALTER TABLE names ADD COLUMN owner VARCHAR NOT NULL DEFAULT ''",
    "ALTER TABLE names ADD COLUMN default_sampling JSON NOT NULL DEFAULT '{}'",
    "ALTER TABLE versions ADD COLUMN traits JSON NOT NULL DEFAULT '{}'",
    "ALTER TABLE versions ADD COLUMN source VARCHAR NOT NULL DEFAULT ''",
    "ALTER TABLE aliases RENAME TO aliases_1",
)
_COPY_FROM_1 = (
    "INSERT INTO aliases (alias, targets, previous) "
    "SELECT alias, json_array(json_array(name, 1.0)), '[]' FROM aliases_1",
    "DROP TABLE aliases_1",
    "INSERT INTO numbers (name, last) SELECT name, max(number) FROM versions GROUP BY name",
)


def connect(url: str) -> sa.Engine:
    """Return an engine whose transactions are whole, changes of tables included; connects with the first use."""
    engine = sa.create_engine(url)
    sa.event.listen(engine, "connect", _configure)
    sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return engine


def prepare(connection: sa.Connection) -> None:
    """Make the tables, or bring those of an earlier format to this one; nothing happens if they are there.

    Raises:
        CorruptStoreError: if a newer program has made them.
    """
    found = None
    if sa.inspect(connection).has_table(schema.name):
        found = connection.scalar(sa.select(schema.c.version))
    if found not in (None, 1, SCHEMA_VERSION):
        raise CorruptStoreError(f"the catalog has format {found}; this program knows {SCHEMA_VERSION}")
    if found == SCHEMA_VERSION:
        return
    if found is None:
        metadata.drop_all(connection)  # an earlier program was ended while it made them
    for statement in _FROM_1 if found else ():
        connection.exec_driver_sql(statement)
    metadata.create_all(connection)
    for statement in _COPY_FROM_1 if found else ():
        connection.exec_driver_sql(statement)
    connection.execute(schema.delete())
    connection.execute(schema.insert().values(version=SCHEMA_VERSION))


def _configure(connection: Any, _record: object) -> None:
    # The driver would begin transactions by itself, but not for changes of tables; see `connect`.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}")
