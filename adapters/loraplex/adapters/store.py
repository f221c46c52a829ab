"""Content-addressed folders: what a digest names is written once, whole, and never changed.

Knows nothing about what is in a folder, nor who needs it; the registry decides what is deleted.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from loraplex.adapters.digest import PREFIX, is_digest
from loraplex.adapters.disk import disk_full_is_typed, move_folder, removed_at_exit, sync_folder
from loraplex.adapters.errors import NotFoundError


class BlobStore(Protocol):
    """Folders by digest. A local disk now; an object store needs no more than this."""

    def staging(self) -> AbstractContextManager[Path]:
        """Yield a new empty folder to fill for `put`; it is removed afterwards unless `put` took it."""

    def put(self, digest: str, staged: Path, *, replace: bool = False) -> None:
        """Take the folder `staged` in under `digest`, or drop it if the digest is there already and not to be replaced.

        Raises:
            ResourceExhaustedError: if the disk is full; then nothing has changed.
        """

    def folder(self, digest: str) -> Path:
        """Return a local folder with the content.

        Raises:
            NotFoundError: if the digest is not in the store.
        """

    def delete(self, digest: str) -> None:
        """Forget `digest`; a digest that is not there is no error."""

    def digests(self) -> frozenset[str]:
        """Return the digests of everything in the store."""


class LocalBlobStore:
    """A `BlobStore` in one local folder: `sha256/<hex>` for content, `staging` for what is being written."""

    def __init__(self, root: Path) -> None:
        """Create the folders and remove what an earlier process left half-written."""
        self._blobs = root / "sha256"
        self._staging = root / "staging"
        shutil.rmtree(self._staging, ignore_errors=True)
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._staging.mkdir()

    def staging(self) -> AbstractContextManager[Path]:
        """See `BlobStore.staging`."""
        return removed_at_exit(Path(tempfile.mkdtemp(dir=self._staging)))

    def put(self, digest: str, staged: Path, *, replace: bool = False) -> None:
        """See `BlobStore.put`."""
        target = self._path(digest)
        if target.exists() and not replace:
            return
        with disk_full_is_typed("storing an adapter"):
            sync_folder(staged)
            self.delete(digest)
            move_folder(staged, target)

    def folder(self, digest: str) -> Path:
        """See `BlobStore.folder`."""
        path = self._path(digest)
        if not path.is_dir():
            raise NotFoundError(f"no adapter weights with digest {digest} are stored")
        return path

    def delete(self, digest: str) -> None:
        """See `BlobStore.delete`."""
        path = self._path(digest)
        if path.exists():
            # Renamed first, so that nobody ever sees a folder with only some of its files.
            with removed_at_exit(Path(tempfile.mkdtemp(dir=self._staging))) as trash:
                path.rename(trash / path.name)

    def digests(self) -> frozenset[str]:
        """See `BlobStore.digests`."""
        return frozenset(PREFIX + path.name for path in self._blobs.iterdir() if is_digest(PREFIX + path.name))

    def _path(self, digest: str) -> Path:
        if not is_digest(digest):
            raise NotFoundError(f"{digest!r:.100} is not a digest")
        return self._blobs / digest.removeprefix(PREFIX)
