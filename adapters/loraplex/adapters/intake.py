"""From a folder to a candidate for registration, and from the store back to weights: every check of the content.

Keeps the findings of refused candidates for a while. Knows nothing about names or requests. Thread-safe.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from loraplex.adapters.binding import BaseModel, BindEntry, BindError, BindReport, BoundAdapter, bind
from loraplex.adapters.directory import Version
from loraplex.adapters.disk import disk_full_is_typed
from loraplex.adapters.errors import CorruptStoreError, NotFoundError, PreconditionError
from loraplex.adapters.files import AdapterFiles
from loraplex.adapters.folder import WEIGHTS_FILE, copy_adapter
from loraplex.adapters.formats import Adapter, parse_adapter, read_adapter
from loraplex.adapters.layout import Layout, Layouts
from loraplex.adapters.store import BlobStore
from loraplex.adapters.traits import AdapterTraits

KEPT_REPORTS = 100


@dataclass(frozen=True)
class Candidate:
    """A checked copy of an adapter in the store's staging area, ready for `BlobStore.put`."""

    staged: Path
    version: Version


class Intake:
    """Checks adapters against one base model."""

    def __init__(self, store: BlobStore, base: BaseModel) -> None:
        self._store = store
        self._base = base
        self._lock = threading.Lock()
        self._reports: dict[str, BindReport] = {}
        self._layouts = Layouts()

    @contextmanager
    def candidate(self, folder: Path, source: str, expected_digest: str = "") -> Iterator[Candidate]:
        """Copy the adapter in `folder`, check the copy (nobody else can change it), and remove it afterwards.

        `source` says where it comes from; anything else than `expected_digest`, if there is one, is refused.

        Raises:
            PreconditionError: the adapter cannot be served (then `report_id` leads to all findings) or is another one.
            ResourceExhaustedError: the disk is full.
        """
        with disk_full_is_typed("taking in an adapter"), self._store.staging() as staged:
            with self._refusals_kept():
                copy_adapter(folder, staged)
                adapter = read_adapter(staged)
                bound = bind(adapter, self._base)
            if expected_digest and adapter.digest != expected_digest:
                raise PreconditionError(f"the adapter is {adapter.digest}, not the expected {expected_digest}")
            size_bytes = (staged / WEIGHTS_FILE).stat().st_size
            yield Candidate(staged, self._version(adapter, bound.traits, size_bytes, source))

    def load(self, digest: str) -> BoundAdapter:
        """Read `digest` from the store, check that it is what was stored, and bind it.

        Raises:
            NotFoundError: the digest is not in the store.
            CorruptStoreError: the files are not what the digest says.
            BindError: the adapter does not fit the base.
        """
        files = self._files(digest)
        layout = self._layouts.find(files)
        if layout is not None:
            _require(digest, layout.digest(files))
            return layout.bound(files, digest)
        adapter = self._parse(files, digest)
        bound = bind(adapter, self._base)
        layout = Layout.of(files, adapter.canonical_form, bound)
        if layout is not None:
            self._layouts.add(files, layout)
        return replace(bound, layout=layout)

    def is_damaged(self, digest: str) -> bool:
        """Say whether the store has `digest`, but with another content."""
        try:
            self._parse(self._files(digest), digest)
        except NotFoundError:
            return False
        except CorruptStoreError:
            return True
        return False

    def report(self, report_id: str) -> BindReport:
        """Return the findings on one of the last 100 refused candidates.

        Raises:
            NotFoundError: there is no such report (any more).
        """
        with self._lock:
            report = self._reports.get(report_id)
        if report is None:
            raise NotFoundError(
                f"there is no report {report_id!r:.80}; the last {KEPT_REPORTS} are kept until a restart"
            )
        return report

    def _files(self, digest: str) -> AdapterFiles:
        folder = self._store.folder(digest)
        try:
            return AdapterFiles.read(folder)
        except (PreconditionError, OSError) as error:
            raise _unreadable(digest, error) from error

    def _parse(self, files: AdapterFiles, digest: str) -> Adapter:
        try:
            adapter = parse_adapter(files, self._store.folder(digest))
        except (PreconditionError, OSError) as error:
            raise _unreadable(digest, error) from error
        _require(digest, adapter.digest)
        return adapter

    @contextmanager
    def _refusals_kept(self) -> Iterator[None]:
        try:
            yield
        except PreconditionError as error:
            error.report_id = uuid.uuid4().hex
            if isinstance(error, BindError):
                error.report = report = replace(error.report, report_id=error.report_id)
            else:
                entries = tuple(BindEntry(v.field, problem=v.description) for v in error.violations)
                report = BindReport(self._base.fingerprint, entries, error.report_id)
            with self._lock:
                self._reports[error.report_id] = report
                if len(self._reports) > KEPT_REPORTS:
                    del self._reports[next(iter(self._reports))]
            raise

    def _version(self, adapter: Adapter, traits: AdapterTraits, size_bytes: int, source: str) -> Version:
        return Version(
            digest=adapter.digest,
            rank=adapter.rank,
            target_modules=adapter.target_modules,
            size_bytes=size_bytes,
            base_fingerprint=self._base.fingerprint,
            created_at=datetime.now(UTC),
            traits=traits,
            source=source,
        )


def _require(digest: str, found: str) -> None:
    if found != digest:
        raise CorruptStoreError(f"the stored weights of {digest} have changed; register the adapter again")


def _unreadable(digest: str, error: Exception) -> CorruptStoreError:
    return CorruptStoreError(f"the stored weights of {digest} cannot be read: {error}")
