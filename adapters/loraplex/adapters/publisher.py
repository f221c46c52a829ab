"""Gives a name a new version: takes the weights in and writes the catalog, both or neither.

Knows nothing about where a folder came from, nor about requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loraplex.adapters.catalog import Catalog
from loraplex.adapters.digest import PREFIX, is_digest
from loraplex.adapters.directory import NamedAdapter
from loraplex.adapters.errors import AlreadyExistsError, InvalidRequestError
from loraplex.adapters.metadata import Metadata, MetadataChange
from loraplex.adapters.stock import Stock


@dataclass(frozen=True)
class Published:
    """A name as it is after a registration, and as it was `before`, None if it is new."""

    adapter: NamedAdapter
    before: NamedAdapter | None


class Publisher:
    """Publishes versions in one catalog, whose weights are in one stock."""

    def __init__(self, catalog: Catalog, stock: Stock) -> None:
        self._catalog = catalog
        self._stock = stock

    def publish(
        self, name: str, folder: Path, source: str, change: MetadataChange, expected_digest: str, *, restore: bool
    ) -> Published:
        """Take in the adapter in `folder`, which came from `source`, as the latest version of `name`.

        A content that is the latest already changes nothing but the metadata; so does any known one without `restore`.

        Raises:
            InvalidRequestError: the metadata are not allowed, or `expected_digest` is no digest.
            PreconditionError: the adapter cannot be served, or is not the one with `expected_digest`.
            AlreadyExistsError: `name` is an alias.
            ResourceExhaustedError: the disk is full.
        """
        change.applied_to(Metadata())  # what is wrong with it is said before anything is read
        if expected_digest and not is_digest(expected_digest):
            raise InvalidRequestError.of("expected_digest", f"is no digest ({PREFIX} and 64 hexadecimal digits)")
        with self._stock.candidate(folder, source, expected_digest) as candidate:
            digest = candidate.version.digest
            damaged = self._stock.is_damaged(digest)
            with self._stock.writing():
                now = self._catalog.directory
                if name in now.aliases:
                    raise AlreadyExistsError(f"{name} is an alias; delete it first or choose another name")
                known = now.names.get(name)
                versions = known.versions if known else ()
                kept = {v.digest for v in (versions[-1:] if restore else versions)}
                metadata = change.applied_to(known.metadata if known else Metadata())
                try:
                    self._stock.put(candidate, replace=damaged)
                    if digest not in kept:
                        self._catalog.publish(name, metadata, candidate.version)
                    elif known and known.metadata != metadata:
                        self._catalog.describe(name, metadata)
                finally:
                    self._stock.collect((digest,))
                return Published(self._catalog.directory.names[name], known)
