"""The adapters that a server knows: names, versions, aliases, weights and the requests that use them.

The one object of this package that the server talks to. Names live in the catalog, weights in the stock, which also
counts the requests that use them. Thread-safe; admitting a request never waits for a disk. Knows nothing about devices,
batches or transports.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

from loraplex.adapters.alias_book import AliasBook
from loraplex.adapters.binding import BaseModel, BindReport, BoundAdapter
from loraplex.adapters.catalog import Catalog
from loraplex.adapters.directory import Directory, NamedAdapter, Version
from loraplex.adapters.disk import lock_folder, removed_at_exit
from loraplex.adapters.errors import PreconditionError
from loraplex.adapters.metadata import MetadataChange
from loraplex.adapters.names import check_name, page_of, parse_selector
from loraplex.adapters.pins import Pins
from loraplex.adapters.publisher import Published, Publisher
from loraplex.adapters.records import AdapterFilter, AdapterPage, AdapterRecord, Registration, Unregistration
from loraplex.adapters.sources import AdapterSources, SourcePolicy
from loraplex.adapters.stock import Stock
from loraplex.adapters.usage_book import UsageBook

UPLOADED = "upload"
NO_CHANGE = MetadataChange()
EVERY = AdapterFilter()
NO_URLS = SourcePolicy()


class AdapterRegistry:
    """Registered adapters for one base model, kept below `root`.

    A name keeps its versions until they are unregistered, so that `name@2` finds an earlier one. `aliases`, `pins`
    and `usage` are changed through the objects of that name; `stock` tells of weights and of the requests on them.
    """

    def __init__(
        self, root: Path, base: BaseModel, allowed_roots: Sequence[Path] = (), policy: SourcePolicy = NO_URLS
    ) -> None:
        """Open or create the registry at `root`; `register` reads only below `allowed_roots` and what `policy` allows.

        Uploads are put together in new folders in `incoming`.

        `warnings` then says which registered adapters cannot be used, because they do not fit `base` or their weights
        are gone. They stay registered: another start with the right base serves them again.

        Raises:
            PreconditionError: if another process has `root`.
            CorruptStoreError: if the catalog cannot be read.
        """
        root = root.absolute()
        root.mkdir(parents=True, exist_ok=True)
        self.incoming = root / "incoming"
        self._sources = AdapterSources(allowed_roots, policy, self.incoming)
        self._owner = lock_folder(root)
        try:
            self.stock = Stock(root / "store", base, policy.max_bytes)
            self._catalog = Catalog(f"sqlite:///{root / 'catalog.sqlite'}")
            shutil.rmtree(self.incoming, ignore_errors=True)
            self.incoming.mkdir()
            rebound = self.stock.attach(self._catalog.directory, lambda: self.digests)
            if rebound:
                self._catalog.set_fingerprint(rebound, base.fingerprint)
            self.aliases = AliasBook(self._catalog, self.stock.writing)
            self.pins = Pins(self._catalog, self.stock.writing, self.stock.problem)
            self.usage = UsageBook(self._catalog, self.stock.writing)
            self._publisher = Publisher(self._catalog, self.stock)
        except BaseException:
            self._owner.close()
            raise

    @property
    def warnings(self) -> tuple[str, ...]:
        """One line for each registered version that cannot serve requests."""
        problems = self.stock.problems
        named = ((a.name, v) for a in self.directory.names.values() for v in a.versions)
        return tuple(f"{name}@{v.digest}: {problems[v.digest]}" for name, v in named if v.digest in problems)

    @property
    def directory(self) -> Directory:
        """What every name means now."""
        return self._catalog.directory

    @property
    def max_bytes(self) -> int:
        """The largest adapter that is taken in, all its files together."""
        return self._sources.policy.max_bytes

    @property
    def digests(self) -> frozenset[str]:
        """Digests of all versions that some name has."""
        return self._catalog.directory.digests

    def count(self) -> int:
        """Return how many names are registered."""
        return len(self.directory.names)

    def register(
        self,
        name: str,
        source: str | Path,
        change: MetadataChange = NO_CHANGE,
        expected_digest: str = "",
        *,
        restore: bool = True,
        cancelled: threading.Event | None = None,
    ) -> Registration:
        """Take in the adapter at `source`, a folder or a URL, under `name`, which may have an earlier version.

        The current content again changes nothing but the metadata; so does an earlier one, unless it is to `restore` it
        as the latest. A registration that fails changes nothing. Setting `cancelled` ends the fetching from a URL.

        Raises:
            InvalidRequestError: the name, the metadata or the source are not allowed.
            NotFoundError: the source has no adapter.
            PreconditionError: the adapter cannot be served (`report_id` leads to all findings), or is not the one
                with `expected_digest`.
            AlreadyExistsError: `name` is an alias.
            ResourceExhaustedError: the disk is full, or too many URLs are being read.
        """
        check_name(name)
        with self._sources.folder(str(source), cancelled) as folder:
            published = self._publisher.publish(name, folder, str(source), change, expected_digest, restore=restore)
        return self._registration(published)

    def register_upload(
        self, name: str, staged: Path, change: MetadataChange = NO_CHANGE, expected_digest: str = ""
    ) -> Registration:
        """Like `register` for a folder below `incoming`, which is removed whether or not it works out."""
        if staged.parent != self.incoming:
            raise ValueError(f"{staged} is not a folder in {self.incoming}")
        with removed_at_exit(staged):
            check_name(name)
            published = self._publisher.publish(name, staged, UPLOADED, change, expected_digest, restore=True)
        return self._registration(published)

    def unregister(self, selector: str) -> Unregistration:
        """Take a name away at once, or one of its versions; requests in flight keep their weights until they end.

        Raises:
            NotFoundError: no adapter has that name or version.
            InvalidRequestError: it is an alias.
            PreconditionError: an alias needs it.
        """
        wanted = parse_selector(selector)
        with self.stock.writing():
            before = self.directory
            adapter = before.adapter(wanted.name)
            version, left = adapter.select(wanted), adapter.without(wanted)
            if version is None or left is None:
                raise before.not_found(selector)
            dangling = before.with_adapter(left).dangling()
            if dangling:
                raise PreconditionError(f"{selector} has aliases ({', '.join(dangling)}); move or delete them first")
            gone = {v.digest: v.size_bytes for v in adapter.versions if v not in left.versions}
            active = self.stock.active(gone)
            self._catalog.reduce(left)
            if not left.versions:
                self.usage.forget(adapter.name)
            self.stock.collect(gone)
            unnamed = {digest: size for digest, size in gone.items() if digest not in self.digests}
        return Unregistration(adapter.name, version.digest, active, unnamed)

    def resolve(self, name: str) -> AdapterRecord:
        """Return the version that `name`, an alias, or either with a version means now.

        An alias with several targets means the one with the most weight.

        Raises:
            NotFoundError: nothing has that name; says which names are close.
            PreconditionError: it is registered but cannot serve requests.
        """
        return _usable(name, self.get(name))

    def acquire(self, name: str, routing_key: str | None = None) -> AdapterRecord:
        """Resolve `name` and count one active request on its version; `release` its digest when the request ends.

        `routing_key` chooses between the targets of an alias: equal keys get the same one, an empty key any of them by
        chance, None the one with the most weight.

        Raises:
            NotFoundError: as `resolve`.
            PreconditionError: as `resolve`.
        """
        record = self.stock.hold(lambda: self._find(name, routing_key))
        if record is None:
            raise self.directory.not_found(name)
        return _usable(name, record)

    def release(self, digest: str) -> None:
        """End one active request. The last one on a version that no name has any more deletes its weights.

        Raises:
            ValueError: if no request is active on `digest`.
        """
        self.stock.release(digest)

    def load(self, digest: str) -> BoundAdapter:
        """Read the weights of `digest` from the store and check that they are what was registered.

        Takes as long as reading and hashing the file; call it off the engine's thread.

        Raises:
            NotFoundError: the digest is not in the store.
            CorruptStoreError: the files are not what the digest says.
            BindError: the adapter does not fit this base.
        """
        return self.stock.load(digest)

    def folder(self, digest: str) -> Path:
        """Return the stored folder of `digest`, to be read only while a request holds it.

        Raises:
            NotFoundError: the digest is not in the store.
        """
        return self.stock.folder(digest)

    def chat_template(self, digest: str) -> str | None:
        """Return the chat template that the adapter brings, if it does."""
        return self.stock.template(digest)

    def get(self, name: str) -> AdapterRecord:
        """Like `resolve`, but also for an adapter that cannot serve requests."""
        return self._record(*self.directory.require(name))

    def list(self, chosen: AdapterFilter = EVERY, page_size: int = 0, page_token: str = "") -> AdapterPage:
        """Return a page of the adapters that are `chosen`, by name; size 0 means 100, 1000 is the most.

        Raises:
            InvalidRequestError: a negative size, or a token that no earlier page gave.
        """
        names = self.directory.names
        page, token = page_of(sorted(name for name in names if chosen(names[name])), page_size, page_token)
        return AdapterPage(tuple(self._record(names[name], names[name].current) for name in page), token)

    def update(self, name: str, change: MetadataChange) -> AdapterRecord:
        """Change what is given.

        Raises:
            NotFoundError: no adapter has that name.
            InvalidRequestError: it is an alias, or the metadata are not allowed.
        """
        with self.stock.writing():
            adapter = self.directory.adapter(name)
            metadata = change.applied_to(adapter.metadata)
            if metadata != adapter.metadata:
                self._catalog.describe(name, metadata)
        return self.get(name)

    def bind_report(self, report_id: str) -> BindReport:
        """Return the findings on one of the last 100 refused registrations, or on the adapter with a digest.

        Raises:
            NotFoundError: there is no such report (any more), or no such adapter.
            CorruptStoreError: the adapter's files are not what the digest says.
        """
        return self.stock.report(report_id)

    def check_integrity(self) -> None:
        """Assert what always holds between calls: memory, catalog and store agree, and nothing is kept for nobody."""
        with self.stock.writing():
            now = self.directory
            assert now == self._catalog.read()
            assert not now.dangling()
            assert not set(now.aliases) & set(now.names)
            assert all(adapter.versions for adapter in now.names.values())
            self.stock.check_integrity()

    def close(self) -> None:
        """Save what is not saved yet, close the catalog and give `root` free."""
        self.usage.close()
        self._catalog.close()
        self._owner.close()

    def _registration(self, published: Published) -> Registration:
        now, before = published.adapter, published.before
        return Registration(self._record(now, now.current), before.current.digest if before else None)

    def _find(self, name: str, routing_key: str | None) -> AdapterRecord | None:
        found = self.directory.find(name, routing_key)
        return self._record(*found) if found else None

    def _record(self, adapter: NamedAdapter, version: Version) -> AdapterRecord:
        now = self.directory
        return AdapterRecord(
            adapter=adapter,
            version=version,
            active_requests=self.stock.count(version.digest),
            aliases=now.aliases_of.get(adapter.name, ()),
            pinned=version.digest in now.pinned_digests,
            problem=self.stock.problem(version.digest),
            has_chat_template=self.stock.has_template(version.digest),
            usage=self.usage.of(adapter.name),
        )


def _usable(name: str, record: AdapterRecord) -> AdapterRecord:
    if record.problem:
        raise PreconditionError(f"{name} cannot be used: {record.problem}")
    return record
