"""Puts the files of an upload together in a folder, chunk by chunk, against what its header promised.

Trusts nothing: names come from a short list, sizes and checksums must come out as announced, and whatever goes wrong
leaves no file behind. Knows nothing about transports or about what the files mean.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from loraplex.adapters.disk import disk_full_is_typed
from loraplex.adapters.errors import FieldViolation, InvalidRequestError
from loraplex.adapters.folder import CONFIG_FILE, TEMPLATE_FILE, WEIGHTS_FILE

ALLOWED_FILES = (CONFIG_FILE, WEIGHTS_FILE, TEMPLATE_FILE, "README.md")
REQUIRED_FILES = (CONFIG_FILE, WEIGHTS_FILE)
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class UploadFile:
    """One file that a header announces; `sha256` is 64 lower-case hexadecimal digits."""

    name: str
    size_bytes: int
    sha256: str


class UploadStager:
    """One upload. Use as a context manager: leaving it removes the folder, unless it was handed on by then.

    ```
    with UploadStager(registry.incoming, files, registry.max_bytes) as stager:
        for chunk in chunks:
            stager.write(chunk.file, chunk.data)
        registry.register_upload(name, stager.finish())
    ```
    """

    def __init__(self, incoming: Path, files: Sequence[UploadFile], max_bytes: int) -> None:
        """Check the header and make an empty folder in `incoming`.

        Raises:
            InvalidRequestError: with everything that is wrong with the header.
            ResourceExhaustedError: the disk is full.
        """
        violations = _header_violations(files, max_bytes)
        if violations:
            raise InvalidRequestError(violations)
        self._files = tuple(files)
        with disk_full_is_typed("receiving an upload"):
            self._folder = Path(tempfile.mkdtemp(dir=incoming))
        self._position = 0
        self._received = 0
        self._hasher = hashlib.sha256()

    def __enter__(self) -> UploadStager:
        """Return the stager."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove the folder."""
        self.discard()

    def write(self, file: str, data: bytes) -> None:
        """Append `data` to `file`: the file that is being received, or the next one once that is complete.

        Raises:
            InvalidRequestError: another file's turn, more data than announced, or a wrong checksum.
            ResourceExhaustedError: the disk is full.
        """
        while self._complete() and self._current().name != file and self._position + 1 < len(self._files):
            self._next_file()
        current = self._current()
        if file != current.name:
            raise InvalidRequestError.of("chunk.file", f"is {file!r:.80}; {current.name} is due")
        self._received += len(data)
        if self._received > current.size_bytes:
            raise InvalidRequestError.of(
                "chunk.data", f"{file} is longer than the {current.size_bytes} bytes announced"
            )
        self._hasher.update(data)
        with disk_full_is_typed("receiving an upload"), (self._folder / file).open("ab") as target:
            target.write(data)

    def finish(self) -> Path:
        """Return the folder with all files, complete and checked.

        Raises:
            InvalidRequestError: a file is incomplete or has a wrong checksum.
        """
        while self._position + 1 < len(self._files):
            self._next_file()
        self._check_current()
        return self._folder

    def discard(self) -> None:
        """Remove what has been received; harmless when it has been moved or removed already."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _current(self) -> UploadFile:
        return self._files[self._position]

    def _complete(self) -> bool:
        return self._received == self._current().size_bytes

    def _next_file(self) -> None:
        self._check_current()
        self._position += 1
        self._received = 0
        self._hasher = hashlib.sha256()

    def _check_current(self) -> None:
        current = self._current()
        if not self._complete():
            reason = f"{current.name} ended after {self._received} of {current.size_bytes} bytes"
            raise InvalidRequestError.of("chunk.data", reason)
        if self._hasher.hexdigest() != current.sha256:
            raise InvalidRequestError.of("chunk.data", f"{current.name} does not have the SHA-256 that was announced")


def _header_violations(files: Sequence[UploadFile], max_bytes: int) -> list[FieldViolation]:
    allowed = ", ".join(ALLOWED_FILES)
    if len(files) > len(ALLOWED_FILES):
        return [FieldViolation("header.files", f"are {len(files)}; only {allowed} are taken, each once")]
    names = [file.name for file in files]
    found = [f"{name!r:.80} is not one of {allowed}" for name in names if name not in ALLOWED_FILES]
    found += [f"{name} is announced twice" for name in sorted({n for n in names if names.count(n) > 1})]
    found += [f"{name} is missing" for name in REQUIRED_FILES if name not in names]
    for file in files:
        if file.size_bytes <= 0:
            found.append(f"{file.name!r:.80} has a size of {file.size_bytes}")
        if not _SHA256.fullmatch(file.sha256):
            found.append(f"{file.name!r:.80} needs its SHA-256 as 64 lower-case hexadecimal digits")
    total = sum(file.size_bytes for file in files)
    if total > max_bytes:
        found.append(f"{total} bytes in all are more than the {max_bytes} that this server takes")
    return [FieldViolation("header.files", description) for description in found]
