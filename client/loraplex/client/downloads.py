"""Puts the messages of a download together in a folder that appears whole and checked, or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from types import TracebackType
from typing import Self

from loraplex.client.errors import InternalError, InvalidRequestError
from loraplex.client.results import DownloadedAdapter
from loraplex.client.uploads import OPTIONAL, REQUIRED
from loraplex.v1 import adapter_pb2


@dataclass(frozen=True)
class DownloadProgress:
    """Bytes received so far, of all files together."""

    bytes_received: int
    bytes_total: int


class Download:
    """One download into `folder`. Use as a context manager: leaving it removes whatever is not finished."""

    def __init__(self, folder: Path, progress: Callable[[DownloadProgress], None] | None) -> None:
        """Make a hidden folder beside `folder`, which must not exist yet or be empty.

        Raises:
            InvalidRequestError: if there is something in `folder`, or it is a file.
            OSError: if the folder cannot be made.
        """
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InvalidRequestError.of("folder", f"{folder} exists; choose another or remove it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._progress = progress or (lambda state: None)
        self._unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        self._header: adapter_pb2.DownloadHeader | None = None
        self._open: dict[str, BufferedRandom] = {}
        self._received = 0

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files, and remove them unless they were finished."""
        for file in self._open.values():
            file.close()
        shutil.rmtree(self._unfinished, ignore_errors=True)

    def add(self, message: adapter_pb2.DownloadAdapterResponse) -> None:
        """Take the next message.

        Raises:
            InternalError: if it is not what a server sends next.
            OSError: if it cannot be written.
        """
        if message.WhichOneof("part") == "header":
            self._begin(message.header)
            return
        file = self._open.get(message.chunk.file)
        if self._header is None or file is None:
            raise InternalError(f"the server sent {message.chunk.file!r:.80} without announcing it")
        file.write(message.chunk.data)
        self._received += len(message.chunk.data)
        total = sum(announced.size_bytes for announced in self._header.files)
        self._progress(DownloadProgress(self._received, total))

    def finish(self) -> DownloadedAdapter:
        """Check every file against the header and give the folder its name.

        Raises:
            InternalError: if a file is not what was announced, or nothing was.
            OSError: if the folder cannot be renamed.
        """
        if self._header is None:
            raise InternalError("the download ended before it began")
        for announced in self._header.files:
            file = self._open[announced.name]
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() != announced.sha256:
                raise InternalError(f"{announced.name} did not arrive as the server announced it; try again")
        self._unfinished.chmod(0o755)
        self._unfinished.rename(self._folder)
        return DownloadedAdapter(self._header.digest, self._folder)

    def _begin(self, header: adapter_pb2.DownloadHeader) -> None:
        names = [file.name for file in header.files]
        # The names are the server's word: only those that an adapter has may become files here.
        if self._header is not None or len(set(names)) < len(names) or not set(names) <= {*REQUIRED, *OPTIONAL}:
            raise InternalError("the server announced something else than an adapter's files")
        self._header = header
        self._open = {name: (self._unfinished / name).open("x+b") for name in names}
