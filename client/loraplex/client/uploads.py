"""Reads an adapter's folder into the messages of an upload. Judges no content: the server does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from loraplex.client import responses
from loraplex.client.calls import Call
from loraplex.client.errors import InvalidRequestError
from loraplex.client.options import RegistrationKeywords
from loraplex.client.requests import set_metadata
from loraplex.client.results import Registration
from loraplex.v1 import adapter_pb2

CHUNK_BYTES = 1024**2
REQUIRED = ("adapter_config.json", "adapter_model.safetensors")
OPTIONAL = ("chat_template.jinja", "README.md")


@dataclass(frozen=True)
class UploadProgress:
    """Bytes read for sending so far, of all files together."""

    bytes_sent: int
    bytes_total: int


@dataclass(frozen=True)
class _File:
    path: Path
    size: int
    sha256: str


class Upload:
    """The messages of one upload, and what went wrong on this side while they were made.

    A file that cannot be read ends the messages early: the server refuses an upload shorter than its header says, and
    `failure` holds the reason. Iterating again starts from the header.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        description: str,
        progress: Callable[[UploadProgress], None] | None,
        **metadata: Unpack[RegistrationKeywords],
    ) -> None:
        """Hash the files of `folder` (reads them once in full).

        Raises:
            InvalidRequestError: if the folder or one of the two files that every adapter has is not there, or for
                metadata that do not fit their fields.
            OSError: if a file cannot be read.
        """
        self._name = name
        self._header = adapter_pb2.UploadHeader(name=name)
        set_metadata(self._header, description, **metadata)
        self._progress = progress or (lambda state: None)
        self._files = [_describe(path) for path in _files_of(folder)]
        for file in self._files:
            self._header.files.add(name=file.path.name, size_bytes=file.size, sha256=file.sha256)
        self.failure: Exception | None = None
        """What `progress` raised or why a file could not be read."""
        self.repeatable = True
        """False once a message has gone out: from then on the upload is not tried again."""

    @property
    def call(self) -> Call[Registration]:
        """The call whose request messages are this object's."""
        return Call(lambda stubs: stubs.adapters.UploadAdapter, self, responses.registration, self._name)

    def __iter__(self) -> Iterator[adapter_pb2.UploadAdapterRequest]:
        """Yield the header, then the files' chunks in the header's order."""
        try:
            yield adapter_pb2.UploadAdapterRequest(header=self._header)
            # gRPC asks for the second message when the first has been handed to a connection.
            self.repeatable = False
            yield from self._chunks()
        except Exception as error:
            self.failure = error

    def _chunks(self) -> Iterator[adapter_pb2.UploadAdapterRequest]:
        sent, total = 0, sum(file.size for file in self._files)
        for file in self._files:
            with file.path.open("rb") as stream:
                while data := stream.read(CHUNK_BYTES):
                    chunk = adapter_pb2.UploadChunk(file=file.path.name, data=data)
                    yield adapter_pb2.UploadAdapterRequest(chunk=chunk)
                    sent += len(data)
                    self._progress(UploadProgress(sent, total))


def _files_of(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InvalidRequestError.of("folder", f"{folder} is not a folder")
    missing = [name for name in REQUIRED if not (folder / name).is_file()]
    if missing:
        hint = "; pickled weights (.bin, .pt) are never taken: save them as safetensors"
        pickled = [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
        raise InvalidRequestError.of("folder", f"{folder} has no {' and no '.join(missing)}{hint if pickled else ''}")
    return [folder / name for name in (*REQUIRED, *OPTIONAL) if (folder / name).is_file()]


def _describe(path: Path) -> _File:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return _File(path, path.stat().st_size, digest)
