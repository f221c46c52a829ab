"""Receives an upload: messages in, files in the registry's incoming folder, then a registration."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from typing import TypeVar

from loraplex.adapters.records import Registration
from loraplex.adapters.registry import AdapterRegistry
from loraplex.adapters.upload import UploadFile, UploadStager
from loraplex.server.errors import InvalidRequestError
from loraplex.server.rpc.adapter_messages import given_metadata
from loraplex.v1 import adapter_pb2 as pb

T = TypeVar("T")


async def receive_upload(
    messages: AsyncIterator[pb.UploadAdapterRequest], registry: AdapterRegistry, vocab_size: int, executor: Executor
) -> Registration:
    """Take one header and then chunks; register what came. Nothing is left of an upload that fails or breaks off.

    Raises:
        InvalidRequestError: messages out of order, or files that are not what the header announced.
        LoraplexError: what the registration raises.
    """
    first = await anext(aiter(messages), None)
    if first is None or first.WhichOneof("part") != "header":
        raise InvalidRequestError.of("header", "must come in the first message, before any chunk")
    header = first.header
    files = [UploadFile(f.name, f.size_bytes, f.sha256) for f in header.files]
    with UploadStager(registry.incoming, files, registry.max_bytes) as stager:
        async for message in messages:
            if message.WhichOneof("part") != "chunk":
                raise InvalidRequestError.of("chunk", "is missing: only the first message carries a header")
            # On a thread, one after the other: hashing and writing megabytes would hold up every stream.
            await _finish(executor, stager.write, message.chunk.file, message.chunk.data)
        folder = await _finish(executor, stager.finish)
        change = given_metadata(header, vocab_size)
        return await _finish(executor, registry.register_upload, header.name, folder, change, header.expected_digest)


async def _finish(executor: Executor, function: Callable[..., T], *args: object) -> T:
    """Call `function` on a thread; a caller that goes away is answered when it has returned.

    Otherwise it would still be writing while the upload's folder is removed.
    """
    call = asyncio.get_running_loop().run_in_executor(executor, lambda: function(*args))
    try:
        return await asyncio.shield(call)
    except asyncio.CancelledError:
        await asyncio.wait([call])
        raise
