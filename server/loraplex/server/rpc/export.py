"""ExportService: merges an adapter into the base in a process of its own and streams the progress.

The process is `python -m loraplex.adapters.merge_process`: one JSON object in, JSON lines out. Serving goes on beside
it, and what it does to memory ends with it.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio

from loraplex.adapters.registry import AdapterRegistry
from loraplex.server.engine.request import MAX_ADAPTER_SCALE
from loraplex.server.errors import (
    AlreadyExistsError,
    EngineError,
    InvalidRequestError,
    LoraplexError,
    PreconditionError,
    ResourceExhaustedError,
)
from loraplex.server.rpc.adapter_use import adapter_use
from loraplex.v1 import export_pb2 as pb
from loraplex.v1 import export_pb2_grpc

MAX_NAME_BYTES = 200
"""What file systems take, less what the unfinished folder's name adds."""
_BASES = {
    pb.MERGE_BASE_UNSPECIFIED: "full_precision",
    pb.MERGE_BASE_FULL_PRECISION: "full_precision",
    pb.MERGE_BASE_DEQUANTIZED: "dequantized",
}


@dataclass(frozen=True)
class ExportSource:
    """What is merged into: the base model's folder, and how the server quantizes it ("none" if it does not)."""

    model_path: Path
    quantization: str


class ExportServicer(export_pb2_grpc.ExportServiceServicer):
    """Answers MergeAdapter, one merge at a time."""

    def __init__(
        self, registry: AdapterRegistry, source: ExportSource, export_root: Path | None, executor: Executor
    ) -> None:
        self._registry = registry
        self._source = source
        self._root = export_root
        self._executor = executor
        self._busy = asyncio.Lock()

    async def MergeAdapter(
        self, request: pb.MergeAdapterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.MergeAdapterResponse]:
        """Write the merged model below the export root; leaving the stream ends the process and leaves no output."""
        output = self._output(request.output)
        scale = request.scale if request.HasField("scale") else 1.0
        if not (math.isfinite(scale) and abs(scale) <= MAX_ADAPTER_SCALE):
            raise InvalidRequestError.of("scale", f"must be within ±{MAX_ADAPTER_SCALE}, got {scale}")
        base = _BASES.get(request.base)
        if base is None:
            raise InvalidRequestError.of("base", f"unknown value {request.base}")
        if base == "dequantized" and self._source.quantization == "none":
            raise PreconditionError("the base model is not quantized: merge into MERGE_BASE_FULL_PRECISION")
        async with adapter_use(self._registry, request.adapter, self._executor) as record:
            job = {
                "model_dir": str(self._source.model_path),
                "adapter_dir": str(self._registry.folder(record.digest)),
                "output": str(output),
                "base": base,
                "quantization": None if base == "full_precision" else self._source.quantization,
                "scale": scale,
            }
            done = total = 0
            async with self._busy, aclosing(_run_job(job)) as progress:
                async for done, total in progress:
                    yield pb.MergeAdapterResponse(tensors_done=done, tensors_total=total)
            yield pb.MergeAdapterResponse(
                tensors_done=done, tensors_total=total, output_path=str(output), adapter_digest=record.digest
            )

    def _output(self, relative: str) -> Path:
        if self._root is None:
            raise PreconditionError("exports are off: start the server with --export-root DIR")
        if not relative:
            raise InvalidRequestError.of("output", "is empty: name a folder below the export root")
        try:
            root = self._root.resolve()
            output = (root / relative).resolve()
            exists = os.path.lexists(output)
        except (OSError, ValueError, RuntimeError) as error:  # a zero byte, an over-long name, a loop of links
            raise InvalidRequestError.of("output", f"is no path: {error!s:.200}") from error
        if any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in output.parts):
            raise InvalidRequestError.of("output", f"has a name of more than {MAX_NAME_BYTES} bytes")
        if output == root or not output.is_relative_to(root):
            raise InvalidRequestError.of("output", f"{relative!r} does not lie below the export root")
        if exists:
            raise AlreadyExistsError(f"{relative!r} exists below the export root: choose another output")
        return output


async def _run_job(job: dict[str, Any]) -> AsyncGenerator[tuple[int, int], None]:
    """Run the merge process; yield (tensors written, tensors in all).

    Raises:
        LoraplexError: what the process reports.
        EngineError: if it dies without a word.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # what lies in the server's working directory is no module
        "-m",
        "loraplex.adapters.merge_process",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        # Ctrl-C in the server's terminal is for the server, which then ends its merge.
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(job).encode())
        process.stdin.close()
        async for line in process.stdout:
            event = json.loads(line)
            if "error" in event:
                raise _error(event["error"], event["message"])
            yield event["done"], event["total"]
        if await process.wait() != 0:
            raise EngineError(f"the merge process ended with status {process.returncode}; the server's log has more")
    finally:
        if process.returncode is None:
            # SIGTERM, not SIGKILL: the process removes its half-written folder.
            process.terminate()
            await process.wait()


def _error(kind: str, message: str) -> LoraplexError:
    """Return the error that the merge process told of."""
    if kind == InvalidRequestError.__name__:
        # The process has checked what only it can: the output's parent folder, for one.
        field, _, description = message.partition(": ")
        return InvalidRequestError.of(field, description)
    known = {k.__name__: k for k in (AlreadyExistsError, PreconditionError, ResourceExhaustedError)}
    return known.get(kind, EngineError)(message)
