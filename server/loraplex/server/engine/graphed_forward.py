"""A forward pass that replays captured decode steps where it can, and runs the decoder itself where it cannot.

A step is replayed if every row has one token and wants its logits, and every adapter in it is plain LoRA within what
was reserved: the step of a running server. Prompts, other adapters, and steps larger than what was captured run as they
are. Both give the same tokens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from loraplex.server.engine.batch import Batch
from loraplex.server.engine.capture import CaptureBackend, CapturedStep
from loraplex.server.engine.deferred_lora import DeferredLoraOps, DeferredSegments
from loraplex.server.engine.kv_cache import KVCache
from loraplex.server.engine.step_buffers import StepBuffers, StepLimits
from loraplex.server.engine.step_shapes import StepShape, choose_shapes, step_shapes
from loraplex.server.lora.ops.interface import LoraContext, StaticLoraOps

logger = logging.getLogger(__name__)

_NO_SEGMENTS = DeferredSegments((), {})

Forward = Callable[[Batch, KVCache, LoraContext | None], torch.Tensor]


@dataclass(frozen=True)
class CaptureBudget:
    """When to stop capturing: after this many seconds, or bytes of the device's memory."""

    max_seconds: float = 60.0
    max_bytes: int = 2**31


@dataclass(frozen=True)
class CaptureReport:
    """What was captured, what it took, and whether a budget left shapes out."""

    shapes: tuple[StepShape, ...]
    seconds: float
    nbytes: int
    complete: bool


@dataclass(frozen=True)
class _Captured:
    """A recorded step, and what keeps the memory alive that it reads."""

    step: CapturedStep
    batch: Batch
    prepared: object | None


class GraphedForward:
    """Implements `ForwardPass` for batches on the host and a decoder on a device.

    Use `lora_ops` in the runner. Between a replay and the next, nothing writes to what the first one reads: adapters in
    use are not evicted before their step is launched, and the device does later work after earlier work.
    """

    def __init__(
        self,
        forward: Forward,
        kv_cache: KVCache,
        ops: StaticLoraOps,
        backend: CaptureBackend,
        limits: StepLimits,
        vocab_size: int,
        device: torch.device,
        site_groups: Sequence[frozenset[int] | None] = (None,),
    ) -> None:
        """Capture nothing yet; `kv_cache` holds the limits' scratch block.

        With LoRA every step is captured for each of `site_groups`, in which each is part of the next: adapters for few
        modules, the usual ones, then cost no launches at others.
        """
        self._forward = forward
        self._kv_cache = kv_cache
        self._ops = ops
        self._backend = backend
        self._limits = limits
        self._device = device
        self._site_groups = site_groups
        self._buffers = StepBuffers(limits, backend, device)
        self._logits = torch.zeros(limits.max_rows, vocab_size, dtype=torch.float32, device=device)
        self._captured: dict[StepShape, _Captured] = {}
        self.lora_ops = DeferredLoraOps(ops)
        """What the runner prepares adapters with."""
        self.replays = 0
        """Steps that were replayed."""

    @torch.inference_mode()
    def capture(
        self, budget: CaptureBudget = CaptureBudget(), clock: Callable[[], float] = time.monotonic
    ) -> CaptureReport:
        """Capture decode steps, the largest first, until all are captured or the budget is spent.

        Raises:
            torch.OutOfMemoryError: if the device has no memory for the largest.
        """
        started, before = clock(), self._backend.reserved_bytes()
        shapes = step_shapes(self._limits.max_rows, len(self._site_groups))
        self._buffers.clear()
        for shape in shapes:
            if clock() - started > budget.max_seconds or self._backend.reserved_bytes() - before > budget.max_bytes:
                break
            self._captured[shape] = self._capture(shape)
        report = CaptureReport(
            tuple(self._captured),
            clock() - started,
            self._backend.reserved_bytes() - before,
            complete=len(self._captured) == len(shapes),
        )
        logger.info(
            "captured %d of %d decode steps in %.1f s, %.0f MiB",
            *(len(report.shapes), len(shapes), report.seconds, report.nbytes / 2**20),
        )
        return report

    @torch.inference_mode()
    def forward(self, batch: Batch, kv_cache: KVCache, lora: LoraContext | None) -> torch.Tensor:
        """Return the float32 logits (L, vocab) at `batch.logits_indices`; they hold until the next call.

        `batch` is on the host, `lora` was prepared by `lora_ops`.
        """
        assert kv_cache is self._kv_cache, "the captured steps read one cache"
        if self._replayed(batch, lora):
            self.replays += 1
            return self._logits[: len(batch.query_lens_cpu)]
        resolved = None if lora is None else self.lora_ops.resolved(lora)
        return self._forward(batch.to(self._device), kv_cache, resolved)

    def _capture(self, shape: StepShape) -> _Captured:
        batch = self._buffers.batch(shape.rows)
        sites = self._site_groups[shape.group]
        prepared = self._ops.reserve(shape.rows, shape.segments, sites) if shape.segments else None
        lora = None if prepared is None else LoraContext(self._ops, tokens=prepared, logits=prepared)
        logits = self._logits[: shape.rows]
        # Copied, so that no shape keeps logits of its own.
        step = self._backend.capture(lambda: logits.copy_(self._forward(batch, self._kv_cache, lora)))
        return _Captured(step, batch, prepared)

    def _replayed(self, batch: Batch, lora: LoraContext | None) -> bool:
        """Replay the step if one that was captured can stand for it."""
        rows, width = batch.block_tables.shape
        if batch.num_decodes != rows or len(batch.logits_indices) != rows or width > self._limits.max_blocks:
            return False
        if lora is not None and lora.overrides is not None:
            return False
        asked = _NO_SEGMENTS if lora is None else lora.tokens
        assert isinstance(asked, DeferredSegments), "lora_ops prepares what the runner hands over"
        for shape in choose_shapes(self._captured, rows, len(asked.segments)):
            captured = self._captured[shape]
            if captured.prepared is None or self._ops.refill(captured.prepared, asked.segments, asked.slots):
                self._buffers.load(batch, shape.rows)
                captured.step.replay()
                return True
        return False
