"""Sends an adapter's stored files: one header with their sizes and checksums, then chunks."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from concurrent.futures import Executor
from pathlib import Path

from loraplex.adapters.registry import AdapterRegistry
from loraplex.adapters.upload import ALLOWED_FILES
from loraplex.server.rpc.adapter_use import adapter_use
from loraplex.v1 import adapter_pb2 as pb

CHUNK_BYTES = 1 << 20


async def send_download(
    name: str, registry: AdapterRegistry, executor: Executor
) -> AsyncGenerator[pb.DownloadAdapterResponse, None]:
    """Yield the messages; the version is held until the last of them, as a request holds it.

    Raises:
        NotFoundError: nothing has that name.
        PreconditionError: the adapter cannot be used.
    """
    loop = asyncio.get_running_loop()
    async with adapter_use(registry, name, executor) as record:
        folder = registry.folder(record.digest)
        paths = [folder / file for file in ALLOWED_FILES if (folder / file).is_file()]
        files = [await loop.run_in_executor(executor, _describe, path) for path in paths]
        yield pb.DownloadAdapterResponse(header=pb.DownloadHeader(digest=record.digest, files=files))
        for path in paths:
            with path.open("rb") as file:
                while data := await loop.run_in_executor(executor, file.read, CHUNK_BYTES):
                    yield pb.DownloadAdapterResponse(chunk=pb.UploadChunk(file=path.name, data=data))


def _describe(path: Path) -> pb.UploadFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return pb.UploadFile(name=path.name, size_bytes=path.stat().st_size, sha256=digest)
