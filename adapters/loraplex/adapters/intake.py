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

from loraplex.adapters.binding import BaseModel, BindEntry, BindError, BindReport, BoundAdapter, bind, bind_report
from loraplex.adapters.digest import is_digest
from loraplex.adapters.directory import Version
from loraplex.adapters.disk import disk_full_is_typed, sync_folder
from loraplex.adapters.errors import CorruptStoreError, NotFoundError, PreconditionError
from loraplex.adapters.files import AdapterFiles
from loraplex.adapters.folder import WEIGHTS_FILE
from loraplex.adapters.folder_copy import copy_adapter
from loraplex.adapters.formats import Adapter, parse_adapter
from loraplex.adapters.layout import Layout, Layouts
from loraplex.adapters.store import BlobStore

KEPT_REPORTS = 100


@dataclass(frozen=True)
class Candidate:
    """A checked copy of an adapter in the store's staging area, ready for `BlobStore.put`."""

    staged: Path
    version: Version


@dataclass(frozen=True)
class _Checked:
    """An adapter that can be served, with what of it is written down with its version."""

    bound: BoundAdapter
    rank: int
    target_modules: tuple[str, ...]


class Intake:
    """Checks adapters against one base model."""

    def __init__(self, store: BlobStore, base: BaseModel, max_bytes: int) -> None:
        """`max_bytes` is the largest adapter that is taken in, all its files together."""
        self._store = store
        self._base = base
        self._max_bytes = max_bytes
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
                copy_adapter(folder, staged, self._max_bytes)
                checked = self._checked(AdapterFiles.read(staged), staged)
            digest = checked.bound.digest
            if expected_digest and digest != expected_digest:
                raise PreconditionError(f"the adapter is {digest}, not the expected {expected_digest}")
            # Here, beside other registrations: `put` is called by one at a time, and finds nothing left to wait for.
            sync_folder(staged)
            size_bytes = (staged / WEIGHTS_FILE).stat().st_size
            yield Candidate(staged, self._version(checked, size_bytes, source))

    def load(self, digest: str) -> BoundAdapter:
        """Read `digest` from the store, check that it is what was stored, and bind it.

        Raises:
            NotFoundError: the digest is not in the store.
            CorruptStoreError: the files are not what the digest says.
            BindError: the adapter does not fit the base.
        """
        folder = self._store.folder(digest)
        try:
            return self._checked(AdapterFiles.read(folder), folder, digest).bound
        except BindError:
            raise  # the files are what the digest says
        except (PreconditionError, OSError) as error:
            raise CorruptStoreError(f"the stored weights of {digest} cannot be read: {error}") from error

    def is_damaged(self, digest: str) -> bool:
        """Say whether the store has `digest`, but with another content."""
        try:
            self.load(digest)
        except CorruptStoreError:
            return True
        except (NotFoundError, BindError):
            return False
        return False

    def report(self, report_id: str) -> BindReport:
        """Return the findings on one of the last 100 refused candidates, or on what the store has under a digest.

        Raises:
            NotFoundError: there is no such report (any more), or no such digest.
            CorruptStoreError: the files are not what the digest says.
        """
        if is_digest(report_id):
            return self._stored_report(report_id)
        with self._lock:
            report = self._reports.get(report_id)
        if report is None:
            raise NotFoundError(
                f"there is no report {report_id!r:.80}; the last {KEPT_REPORTS} are kept until a restart"
            )
        return report

    def _stored_report(self, digest: str) -> BindReport:
        folder = self._store.folder(digest)
        try:
            adapter = parse_adapter(AdapterFiles.read(folder), folder)
        except (PreconditionError, OSError) as error:
            raise CorruptStoreError(f"the stored weights of {digest} cannot be read: {error}") from error
        _require(digest, adapter)
        return replace(bind_report(adapter, self._base), report_id=digest)

    def _checked(self, files: AdapterFiles, folder: Path, digest: str = "") -> _Checked:
        """Check what was read from `folder` in full or, if all but the numbers is known, the numbers.

        Raises:
            CorruptStoreError: if it is not `digest`, if that is given.
            PreconditionError: if it cannot be served.
            OSError: if it cannot be read.
        """
        layout = self._layouts.find(files)
        if layout is not None and layout.is_finite(files):
            known = layout.bound(files)
            _require(digest, known)
            return _Checked(known, layout.rank, layout.target_modules)
        adapter = parse_adapter(files, folder)
        _require(digest, adapter)
        bound = bind(adapter, self._base)
        layout = Layout.of(files, adapter, bound)
        if layout is not None:
            self._layouts.add(files, layout)
        return _Checked(replace(bound, layout=layout), adapter.rank, adapter.target_modules)

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

    def _version(self, checked: _Checked, size_bytes: int, source: str) -> Version:
        return Version(
            digest=checked.bound.digest,
            rank=checked.rank,
            target_modules=checked.target_modules,
            size_bytes=size_bytes,
            base_fingerprint=self._base.fingerprint,
            created_at=datetime.now(UTC),
            traits=checked.bound.traits,
            source=source,
        )


def _require(digest: str, found: Adapter | BoundAdapter) -> None:
    if digest and found.digest != digest:
        raise CorruptStoreError(f"the stored weights of {digest} have changed; register the adapter again")
