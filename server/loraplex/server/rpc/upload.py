"""Receives an upload: messages in, files in the registry's incoming folder, then a registration."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Executor

from loraplex.adapters.records import Registration
from loraplex.adapters.registry import AdapterRegistry
from loraplex.adapters.upload import UploadFile, UploadStager
from loraplex.server.errors import InvalidRequestError
from loraplex.v1 import adapter_pb2 as pb


async def receive_upload(
    messages: AsyncIterator[pb.UploadAdapterRequest], registry: AdapterRegistry, executor: Executor
) -> Registration:
    """Take one header and then chunks; register what came. Nothing is left of an upload that fails or breaks off.

    Raises:
        InvalidRequestError: messages out of order, or files that are not what the header announced.
        LoraplexError: what the registration raises.
    """
    loop = asyncio.get_running_loop()
    first = await anext(aiter(messages), None)
    if first is None or first.WhichOneof("part") != "header":
        raise InvalidRequestError.of("header", "must come in the first message, before any chunk")
    header = first.header
    files = [UploadFile(f.name, f.size_bytes, f.sha256) for f in header.files]
    with UploadStager(registry.incoming, files) as stager:
        async for message in messages:
            if message.WhichOneof("part") != "chunk":
                raise InvalidRequestError.of("chunk", "is missing: only the first message carries a header")
            # On a thread, one after the other: hashing and writing megabytes would hold up every stream.
            await loop.run_in_executor(executor, stager.write, message.chunk.file, message.chunk.data)
        folder = await loop.run_in_executor(executor, stager.finish)
        return await loop.run_in_executor(executor, registry.register_upload, header.name, folder, header.description)
