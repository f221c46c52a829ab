"""The stored weights of a registry: which of them can be used, which requests use them, and when they go.

Knows digests, and of names only which digests have one. Thread-safe: whoever changes names or blobs does it inside
`writing`, one after the other; the counting of requests takes a lock of its own for a few dictionary operations, so
that admitting a request never waits for a disk.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

from loraplex.adapters.binding import BaseModel, BindReport, BoundAdapter
from loraplex.adapters.directory import Directory
from loraplex.adapters.errors import CorruptStoreError, NotFoundError, PreconditionError
from loraplex.adapters.folder import TEMPLATE_FILE, read_chat_template
from loraplex.adapters.intake import Candidate, Intake
from loraplex.adapters.records import AdapterRecord
from loraplex.adapters.store import BlobStore, LocalBlobStore


class Stock:
    """Weights by digest for one base model; deleted as soon as no name has them and no request uses them."""

    def __init__(self, root: Path, base: BaseModel, max_bytes: int) -> None:
        """Open or create the store at `root`, which takes adapters of at most `max_bytes` bytes."""
        self._store: BlobStore = LocalBlobStore(root)
        self._intake = Intake(self._store, base, max_bytes)
        self._base = base
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._named: Callable[[], frozenset[str]] = frozenset
        self._active: Counter[str] = Counter()
        self._garbage: set[str] = set()
        """Released for the last time and perhaps without a name: for the next one who may write."""
        self._draining: list[tuple[frozenset[str], Future[None]]] = []
        self._templates: dict[str, str | None] = {}
        """Of the adapters that have one; None until it is asked for."""
        self._problems: dict[str, str] = {}

    def attach(self, directory: Directory, named: Callable[[], frozenset[str]]) -> frozenset[str]:
        """Check the store against what is registered; return the digests that were found to fit another base.

        `named` tells from now on which digests have a name. Weights without one are removed.
        """
        self._named = named
        for digest in self._store.digests() - directory.digests:
            self._store.delete(digest)
        stored, rebound = self._store.digests(), set[str]()
        for version in (version for adapter in directory.names.values() for version in adapter.versions):
            if version.digest not in stored:
                self._problems[version.digest] = "its weights are missing from the store; register the adapter again"
            elif not self._base.fingerprint or version.base_fingerprint != self._base.fingerprint:
                try:
                    self._intake.load(version.digest)
                    rebound.add(version.digest)
                except (PreconditionError, CorruptStoreError) as error:
                    self._problems[version.digest] = str(error)
        for digest in stored & directory.digests:
            self._note_template(digest)
        return frozenset(rebound)

    @property
    def problems(self) -> Mapping[str, str]:
        """Why the weights of some digests cannot be used."""
        return dict(self._problems)

    def problem(self, digest: str) -> str:
        """Return why the weights of `digest` cannot be used, or nothing."""
        return self._problems.get(digest, "")

    def count(self, digest: str) -> int:
        """Return how many requests use `digest`; takes no lock."""
        return self._active[digest]

    def active(self, digests: Iterable[str]) -> int:
        """Return how many requests use any of `digests`."""
        with self._lock:
            return sum(self._active[digest] for digest in digests)

    def hold(self, find: Callable[[], AdapterRecord | None]) -> AdapterRecord | None:
        """Return what `find` does, with one more request counted on it if it can be used.

        Found and counted under one lock: an unregistration in between could delete the weights.
        """
        with self._lock:
            record = find()
            if record is None or record.problem:
                return record
            self._active[record.digest] += 1
            return replace(record, active_requests=self._active[record.digest])

    def release(self, digest: str) -> None:
        """End one request; the last one on weights without a name deletes them.

        Raises:
            ValueError: if no request uses `digest`.
        """
        with self._lock:
            if not self._active[digest]:
                raise ValueError(f"{digest} was released more often than acquired")
            self._active[digest] -= 1
            if self._active[digest]:
                return
            del self._active[digest]
            if digest not in self._named():
                self._garbage.add(digest)
        self._sweep()

    def drained(self, digests: Iterable[str]) -> Future[None]:
        """Return a future that is done once no request uses any of `digests`, and what has no name is deleted."""
        future: Future[None] = Future()
        with self._lock:
            self._draining.append((frozenset(digests), future))
        self._tell_drained()
        return future

    def load(self, digest: str) -> BoundAdapter:
        """See `Intake.load`."""
        return self._intake.load(digest)

    def folder(self, digest: str) -> Path:
        """See `BlobStore.folder`."""
        return self._store.folder(digest)

    def has(self, digest: str) -> bool:
        """Whether weights are stored under `digest`."""
        try:
            self._store.folder(digest)
        except NotFoundError:
            return False
        return True

    def has_template(self, digest: str) -> bool:
        """Whether the adapter brings a chat template."""
        return digest in self._templates

    def template(self, digest: str) -> str | None:
        """Return the chat template that the adapter brings, if it does; read from the disk once."""
        found = self._templates.get(digest)
        if found is None and digest in self._templates:
            found = read_chat_template(self._store.folder(digest))
            self._templates[digest] = found
        return found

    def report(self, report_id: str) -> BindReport:
        """See `Intake.report`."""
        return self._intake.report(report_id)

    def candidate(self, folder: Path, source: str, expected_digest: str) -> AbstractContextManager[Candidate]:
        """See `Intake.candidate`."""
        return self._intake.candidate(folder, source, expected_digest)

    def is_damaged(self, digest: str) -> bool:
        """See `Intake.is_damaged`."""
        return self._intake.is_damaged(digest)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Let one thread at a time change names and blobs, and delete afterwards what became garbage meanwhile."""
        try:
            with self._writing:
                yield
        finally:
            self._sweep()

    def put(self, candidate: Candidate, *, replace: bool) -> None:
        """Take a candidate in, in the place of what is there if that is to be replaced; the caller is `writing`."""
        digest = candidate.version.digest
        self._store.put(digest, candidate.staged, replace=replace)
        self._problems.pop(digest, None)
        self._note_template(digest)

    def collect(self, digests: Iterable[str]) -> None:
        """Delete the weights among `digests` that no name has and no request uses; the caller is `writing`."""
        for digest in digests:
            with self._lock:
                needed = digest in self._named() or self._active[digest]
            if not needed:
                self._store.delete(digest)
                self._problems.pop(digest, None)
                self._templates.pop(digest, None)

    def check_integrity(self) -> None:
        """Assert that nothing is kept for nobody and nothing is missing; the caller is `writing`."""
        with self._lock:
            assert all(count > 0 for count in self._active.values())
            stored, needed = self._store.digests(), self._named() | set(self._active) | self._garbage
            assert stored <= needed
            assert needed - stored <= set(self._problems)
            assert set(self._templates) <= needed

    def _note_template(self, digest: str) -> None:
        if (self._store.folder(digest) / TEMPLATE_FILE).is_file():
            self._templates.setdefault(digest, None)

    def _sweep(self) -> None:
        """Delete garbage unless somebody is writing, who will do it: a request's end waits for no registration."""
        while self._garbage and self._writing.acquire(blocking=False):
            try:
                with self._lock:
                    garbage = set(self._garbage)
                self.collect(garbage)
                with self._lock:
                    self._garbage -= garbage
            finally:
                self._writing.release()
        self._tell_drained()

    def _tell_drained(self) -> None:
        with self._lock:
            busy = self._active.keys() | self._garbage
            done = [entry for entry in self._draining if not entry[0] & busy]
            self._draining = [entry for entry in self._draining if entry[0] & busy]
        for _, future in done:
            if future.set_running_or_notify_cancel():
                future.set_result(None)
