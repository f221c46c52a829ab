"""ExportService: merges adapters into the base in a process of its own and streams the progress."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Executor
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio

from loraplex.adapters.merge import DEFAULT_SHARD_BYTES, MERGING, MergeOptions
from loraplex.adapters.merge_job import MergeJob, MergeReport
from loraplex.adapters.merge_methods import MergeMethod, Mixing
from loraplex.adapters.merge_plan import MergeBase
from loraplex.adapters.registry import AdapterRegistry
from loraplex.server.engine.request import MAX_ADAPTER_SCALE
from loraplex.server.errors import AlreadyExistsError, InvalidRequestError, PreconditionError
from loraplex.server.rpc.adapter_use import adapter_use
from loraplex.server.rpc.merge_runner import THREADS, MergeStep, run_merge
from loraplex.server.speed import SpeedSettings
from loraplex.v1 import export_pb2 as pb
from loraplex.v1 import export_pb2_grpc

MAX_NAME_BYTES = 200
"""What file systems take, less what the unfinished folder's name adds."""
_BASES = {
    pb.MERGE_BASE_UNSPECIFIED: MergeBase.FULL_PRECISION,
    pb.MERGE_BASE_FULL_PRECISION: MergeBase.FULL_PRECISION,
    pb.MERGE_BASE_DEQUANTIZED: MergeBase.DEQUANTIZED,
}
_METHODS = {
    pb.MERGE_METHOD_UNSPECIFIED: MergeMethod.LINEAR,
    pb.MERGE_METHOD_LINEAR: MergeMethod.LINEAR,
    pb.MERGE_METHOD_TIES: MergeMethod.TIES,
    pb.MERGE_METHOD_DARE_LINEAR: MergeMethod.DARE_LINEAR,
    pb.MERGE_METHOD_DARE_TIES: MergeMethod.DARE_TIES,
}
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class ExportSource:
    """What is merged into: the base model's folder, and how the server holds it."""

    model_path: Path
    settings: SpeedSettings


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
        wanted = _adapters(request)
        options = self._options(request)
        async with AsyncExitStack() as stack:
            records = [
                await stack.enter_async_context(adapter_use(self._registry, name, self._executor)) for name, _ in wanted
            ]
            folders = [self._registry.folder(record.digest) for record in records]
            adapters = tuple(zip(folders, (weight for _, weight in wanted), strict=True))
            job = MergeJob(self._source.model_path, adapters, output, options, THREADS)
            last = MergeStep("", 0, 0)
            async with self._busy, aclosing(run_merge(job)) as steps:
                async for step in steps:
                    if isinstance(step, MergeReport):
                        yield _finished(step, last, output)
                    else:
                        last = step if step.phase == MERGING else last
                        yield pb.MergeAdapterResponse(
                            tensors_done=step.done, tensors_total=step.total, phase=step.phase
                        )

    def _options(self, request: pb.MergeAdapterRequest) -> MergeOptions:
        base = _known("base", _BASES, request.base)
        quantization = self._source.settings.quantization
        if base is MergeBase.DEQUANTIZED and quantization == "none":
            raise PreconditionError("the base model is not quantized: merge into MERGE_BASE_FULL_PRECISION")
        mixing = Mixing(
            _known("method", _METHODS, request.method),
            request.density if request.HasField("density") else None,
            request.seed if request.HasField("seed") else None,
        )
        return MergeOptions(
            base=base,
            quantization=quantization if base is MergeBase.DEQUANTIZED else None,
            mixing=mixing,
            quantize=request.quantize,
            max_shard_bytes=request.max_shard_bytes if request.HasField("max_shard_bytes") else DEFAULT_SHARD_BYTES,
            max_mean_kl=request.max_mean_kl if request.HasField("max_mean_kl") else None,
            prompts=tuple(request.prompts),
            speed_command=self._source.settings.command() if request.measure_speed else (),
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


def _adapters(request: pb.MergeAdapterRequest) -> list[tuple[str, float]]:
    """Return the names and weights, checked."""
    if bool(request.adapter) == bool(request.adapters):
        raise InvalidRequestError.of("adapters", "or adapter: give one name, or several with weights, not both")
    if request.adapters and request.HasField("scale"):
        raise InvalidRequestError.of("scale", "is for a single adapter; several have a weight each")
    if request.adapter:
        wanted = [(request.adapter, request.scale if request.HasField("scale") else 1.0)]
    else:
        wanted = [(each.adapter, each.weight) for each in request.adapters]
    field = "scale" if request.adapter else "adapters.weight"
    for _, weight in wanted:
        if not (math.isfinite(weight) and abs(weight) <= MAX_ADAPTER_SCALE):
            raise InvalidRequestError.of(field, f"must be within ±{MAX_ADAPTER_SCALE}, got {weight}")
    return wanted


def _known(field: str, values: Mapping[Any, _Value], found: int) -> _Value:
    value = values.get(found)
    if value is None:
        raise InvalidRequestError.of(field, f"unknown value {found}")
    return value


def _finished(report: MergeReport, last: MergeStep, output: Path) -> pb.MergeAdapterResponse:
    difference = report.comparison
    return pb.MergeAdapterResponse(
        tensors_done=last.done,
        tensors_total=last.total,
        output_path=str(output),
        adapter_digest=report.adapter_digests[0],
        adapter_digests=report.adapter_digests,
        comparison=pb.MergeComparison(
            max_logit_difference=difference.max_logit_difference,
            top1_agreement=difference.top1_agreement,
            mean_kl=difference.mean_kl,
            positions=difference.positions,
        ),
        speed=[
            pb.SpeedFigures(
                model=side.model,
                tokens_per_second=side.tokens_per_second,
                first_token_ms=side.first_token_ms,
                inter_token_ms_p50=side.inter_token_ms_p50,
            )
            for side in report.speed
        ],
    )
