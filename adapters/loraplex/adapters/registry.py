"""The adapters that a server knows: names, versions, weights and the requests that use them.

The one object of this package that the server talks to. Names live in the catalog, weights in the store; which request
uses which version is counted here, in memory. Thread-safe: `_writing` is held by whoever changes names or blobs, one
after the other; `_lock` only for a few dictionary operations, so that admitting a request never waits for a disk.
Knows nothing about devices, batches or transports.
"""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

from loraplex.adapters.binding import BaseModel, BindReport, BoundAdapter
from loraplex.adapters.catalog import Catalog
from loraplex.adapters.directory import NamedAdapter, Version
from loraplex.adapters.disk import lock_folder, removed_at_exit
from loraplex.adapters.errors import (
    AlreadyExistsError,
    CorruptStoreError,
    InvalidRequestError,
    NotFoundError,
    PreconditionError,
)
from loraplex.adapters.folder import read_chat_template, require_inside
from loraplex.adapters.intake import Intake
from loraplex.adapters.names import check_name, decode_page_token, encode_page_token
from loraplex.adapters.records import AdapterPage, AdapterRecord, Registration, Unregistration
from loraplex.adapters.store import BlobStore, LocalBlobStore

DEFAULT_PAGE, MAX_PAGE = 100, 1000


class AdapterRegistry:
    """Registered adapters for one base model, kept below `root`.

    A name keeps all its versions until it is unregistered, so that `name@sha256:...` finds an earlier one. Weights are
    deleted as soon as no name has them and no request uses them.
    """

    def __init__(self, root: Path, base: BaseModel, allowed_roots: Sequence[Path] = ()) -> None:
        """Open or create the registry at `root`; `register` reads only below `allowed_roots`.

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
        self._allowed_roots = tuple(folder.resolve() for folder in allowed_roots)
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._active: Counter[str] = Counter()
        self._garbage: set[str] = set()
        """Released for the last time and perhaps without a name: for the next one who may write."""
        self._templates: dict[str, str | None] = {}
        self._owner = lock_folder(root)
        try:
            self._store: BlobStore = LocalBlobStore(root / "store")
            self._intake = Intake(self._store, base)
            self._catalog = Catalog(f"sqlite:///{root / 'catalog.sqlite'}")
            shutil.rmtree(self.incoming, ignore_errors=True)
            self.incoming.mkdir()
            for digest in self._store.digests() - self._catalog.directory.digests:
                self._store.delete(digest)
            self._problems = self._check_stored(base.fingerprint)
        except BaseException:
            self._owner.close()
            raise

    @property
    def warnings(self) -> tuple[str, ...]:
        """One line for each registered version that cannot serve requests."""
        named = ((a.name, v) for a in self._catalog.directory.names.values() for v in a.versions)
        problems = dict(self._problems)
        return tuple(f"{name}@{v.digest}: {problems[v.digest]}" for name, v in named if v.digest in problems)

    def register(self, name: str, path: Path, description: str = "") -> Registration:
        """Take in the adapter in the folder `path` under `name`; the name may have an earlier version.

        The same content again changes nothing but the description. A registration that fails changes nothing.

        Raises:
            InvalidRequestError: the name is not allowed, or `path` is not below the allowed roots.
            PreconditionError: the adapter cannot be served; `report_id` leads to all findings.
            AlreadyExistsError: `name` is an alias.
            ResourceExhaustedError: the disk is full.
        """
        check_name(name)
        return self._register(name, require_inside(path, self._allowed_roots), description)

    def register_upload(self, name: str, staged: Path, description: str = "") -> Registration:
        """Like `register` for a folder below `incoming`, which is removed whether or not it works out."""
        if staged.parent != self.incoming:
            raise ValueError(f"{staged} is not a folder in {self.incoming}")
        with removed_at_exit(staged):
            check_name(name)
            return self._register(name, staged, description)

    def unregister(self, name: str) -> Unregistration:
        """Take `name` away at once; requests in flight keep their version's weights until they are released.

        Raises:
            NotFoundError: no adapter has that name.
            InvalidRequestError: `name` is an alias.
            PreconditionError: aliases point at it.
        """
        with self._write():
            adapter = self._catalog.directory.adapter(name)
            aliases = self._catalog.directory.aliases_of.get(name)
            if aliases:
                raise PreconditionError(f"{name} has aliases ({', '.join(aliases)}); move or delete them first")
            self._catalog.remove(name)
            digests = {version.digest for version in adapter.versions}
            with self._lock:
                active = sum(self._active[digest] for digest in digests)
            self._collect(digests)
        return Unregistration(adapter.current.digest, active)

    def resolve(self, name: str) -> AdapterRecord:
        """Return the version that `name`, an alias, or either with `@sha256:...` means now.

        Raises:
            NotFoundError: nothing has that name; says which names are close.
            PreconditionError: it is registered but cannot serve requests.
        """
        record = self.get(name)
        if record.problem:
            raise _unusable(name, record)
        return record

    def acquire(self, name: str) -> AdapterRecord:
        """Resolve `name` and count one active request on its version; `release` its digest when the request ends.

        Raises:
            NotFoundError: as `resolve`.
            PreconditionError: as `resolve`.
        """
        with self._lock:
            # Found and counted under one lock: an unregistration in between could delete the weights.
            found = self._catalog.directory.find(name)
            record = self._record(*found) if found else None
            if record and not record.problem:
                self._active[record.digest] += 1
                return replace(record, active_requests=self._active[record.digest])
        if record is None:
            raise self._catalog.directory.not_found(name)
        raise _unusable(name, record)

    def release(self, digest: str) -> None:
        """End one active request. The last one on a version that no name has any more deletes its weights.

        Raises:
            ValueError: if no request is active on `digest`.
        """
        with self._lock:
            if not self._active[digest]:
                raise ValueError(f"{digest} was released more often than acquired")
            self._active[digest] -= 1
            idle = not self._active[digest]
            if idle:
                del self._active[digest]
        if idle and digest not in self._catalog.directory.digests:
            with self._lock:
                self._garbage.add(digest)
            self._sweep()

    def load(self, digest: str) -> BoundAdapter:
        """Read the weights of `digest` from the store and check that they are what was registered.

        Takes as long as reading and hashing the file; call it off the engine's thread.

        Raises:
            NotFoundError: the digest is not in the store.
            CorruptStoreError: the files are not what the digest says.
            BindError: the adapter does not fit this base.
        """
        return self._intake.load(digest)

    def folder(self, digest: str) -> Path:
        """Return the stored folder of `digest`, to be read only while a request holds it.

        Raises:
            NotFoundError: the digest is not in the store.
        """
        return self._store.folder(digest)

    def chat_template(self, digest: str) -> str | None:
        """Return the chat template that the adapter brings, if it does; read from the store once.

        Raises:
            NotFoundError: the digest is not in the store.
        """
        with self._lock:
            if digest in self._templates:
                return self._templates[digest]
        template = read_chat_template(self._store.folder(digest))
        with self._lock:
            self._templates[digest] = template
        return template

    @property
    def digests(self) -> frozenset[str]:
        """Digests of all versions that some name has."""
        return self._catalog.directory.digests

    def count(self) -> int:
        """Return how many names are registered."""
        return len(self._catalog.directory.names)

    def get(self, name: str) -> AdapterRecord:
        """Like `resolve`, but also for an adapter that cannot serve requests."""
        found = self._catalog.directory.find(name)
        if found is None:
            raise self._catalog.directory.not_found(name)
        return self._record(*found)

    def list(self, name_contains: str = "", page_size: int = 0, page_token: str = "") -> AdapterPage:
        """Return a page of the registered names that contain `name_contains`; size 0 means 100, 1000 is the most.

        Raises:
            InvalidRequestError: a negative size, or a token that no earlier page gave.
        """
        if page_size < 0:
            raise InvalidRequestError.of("page_size", "must not be negative")
        after = decode_page_token(page_token)
        size = min(page_size or DEFAULT_PAGE, MAX_PAGE)
        names = self._catalog.directory.names
        chosen = list(islice((n for n in sorted(names) if n > after and name_contains in n), size + 1))
        records = tuple(self._record(names[n], names[n].current) for n in chosen[:size])
        return AdapterPage(records, encode_page_token(chosen[size - 1]) if len(chosen) > size else "")

    def update(self, name: str, description: str | None = None) -> AdapterRecord:
        """Change what is given; None leaves it as it is.

        Raises:
            NotFoundError: no adapter has that name.
        """
        with self._write():
            self._catalog.directory.adapter(name)
            if description is not None:
                self._catalog.describe(name, description)
        return self.get(name)

    def set_alias(self, alias: str, name: str) -> str | None:
        """Make `alias` point at the registered `name` in one step; return the name it pointed at before.

        Raises:
            InvalidRequestError: the alias is not an allowed name, or `name` is itself an alias.
            NotFoundError: `name` is not registered.
            AlreadyExistsError: an adapter has the alias as its name.
        """
        check_name(alias, "alias")
        with self._write():
            self._catalog.directory.adapter(name)
            if alias in self._catalog.directory.names:
                raise AlreadyExistsError(f"{alias} is the name of an adapter; choose another alias")
            previous = self._catalog.directory.aliases.get(alias)
            self._catalog.set_alias(alias, name)
        return previous

    def delete_alias(self, alias: str) -> None:
        """Take `alias` away; the adapter stays.

        Raises:
            NotFoundError: there is no such alias.
        """
        with self._write():
            if alias not in self._catalog.directory.aliases:
                known = ", ".join(sorted(self._catalog.directory.aliases)[:5]) or "none"
                raise NotFoundError(f"there is no alias {alias!r:.140} (known: {known})")
            self._catalog.delete_alias(alias)

    def bind_report(self, report_id: str) -> BindReport:
        """Return the findings on one of the last 100 refused registrations.

        Raises:
            NotFoundError: there is no such report (any more).
        """
        return self._intake.report(report_id)

    def check_integrity(self) -> None:
        """Assert what always holds between calls: memory, catalog and store agree, and nothing is kept for nobody."""
        with self._write(), self._lock:
            now = self._catalog.directory
            assert now == self._catalog.read()
            assert set(now.aliases.values()) <= set(now.names)
            assert not set(now.aliases) & set(now.names)
            assert all(count > 0 for count in self._active.values())
            stored, needed = self._store.digests(), now.digests | set(self._active) | self._garbage
            assert stored <= needed
            assert needed - stored <= set(self._problems)

    def close(self) -> None:
        """Close the catalog and give `root` free."""
        self._catalog.close()
        self._owner.close()

    def _register(self, name: str, folder: Path, description: str) -> Registration:
        with self._intake.candidate(folder) as candidate:
            digest = candidate.version.digest
            damaged = self._intake.is_damaged(digest)
            with self._write():
                if name in self._catalog.directory.aliases:
                    raise AlreadyExistsError(f"{name} is an alias; delete it first or choose another name")
                known = self._catalog.directory.names.get(name)
                description = description or (known.description if known else "")
                try:
                    self._store.put(digest, candidate.staged, replace=damaged)
                    if known is None or known.current.digest != digest:
                        self._catalog.publish(name, description, candidate.version)
                    elif known.description != description:
                        self._catalog.describe(name, description)
                    self._problems.pop(digest, None)
                finally:
                    self._collect((digest,))
                adapter = self._catalog.directory.names[name]
                return Registration(self._record(adapter, adapter.current), known.current.digest if known else None)

    @contextmanager
    def _write(self) -> Iterator[None]:
        """Hold `_writing`, and afterwards delete what became garbage meanwhile."""
        try:
            with self._writing:
                yield
        finally:
            self._sweep()

    def _sweep(self) -> None:
        """Delete garbage unless somebody is writing, who will do it: a request's end waits for no registration."""
        while self._garbage and self._writing.acquire(blocking=False):
            try:
                with self._lock:
                    garbage = self._garbage
                    self._garbage = set()
                self._collect(garbage)
            finally:
                self._writing.release()

    def _collect(self, digests: Iterable[str]) -> None:
        """Delete the weights among `digests` that no name has and no request uses; the caller holds `_writing`."""
        for digest in digests:
            with self._lock:
                needed = digest in self._catalog.directory.digests or self._active[digest]
            if not needed:
                self._store.delete(digest)
                self._problems.pop(digest, None)
                self._templates.pop(digest, None)

    def _check_stored(self, fingerprint: str) -> dict[str, str]:
        """Return what is wrong with registered versions: weights that are missing or do not fit the base of today."""
        problems: dict[str, str] = {}
        stored, rebound = self._store.digests(), set[str]()
        for version in (v for adapter in self._catalog.directory.names.values() for v in adapter.versions):
            if version.digest not in stored:
                problems[version.digest] = "its weights are missing from the store; register the adapter again"
            elif not fingerprint or version.base_fingerprint != fingerprint:
                try:
                    self._intake.load(version.digest)
                    rebound.add(version.digest)
                except (PreconditionError, CorruptStoreError) as error:
                    problems[version.digest] = str(error)
        if rebound:
            self._catalog.set_fingerprint(rebound, fingerprint)
        return problems

    def _record(self, adapter: NamedAdapter, version: Version) -> AdapterRecord:
        return AdapterRecord(
            name=adapter.name,
            digest=version.digest,
            description=adapter.description,
            rank=version.rank,
            target_modules=version.target_modules,
            size_bytes=version.size_bytes,
            created_at=version.created_at,
            active_requests=self._active[version.digest],
            aliases=self._catalog.directory.aliases_of.get(adapter.name, ()),
            problem=self._problems.get(version.digest, ""),
        )


def _unusable(name: str, record: AdapterRecord) -> PreconditionError:
    return PreconditionError(f"{name} cannot be used: {record.problem}")
