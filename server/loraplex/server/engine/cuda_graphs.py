"""Captures steps as CUDA graphs, through torch.

All graphs take their memory from one pool: they never run at the same time, and none leaves anything there for another.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from loraplex.server.engine.capture import Wait

WARM_UPS = 2
"""Runs before a capture: the first compiles and allocates what lasts, the second shows what a usual run allocates."""


class CudaGraphs:
    """Implements `CaptureBackend` for one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, step: Callable[[], object]) -> _CudaGraph:
        """See `CaptureBackend`."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                step()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads (loads of adapters) may allocate pinned memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            step()
        return _CudaGraph(graph)

    def staging(self, nbytes: int) -> torch.Tensor:
        """See `CaptureBackend`."""
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)

    def upload(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """See `CaptureBackend`."""
        target.copy_(source, non_blocking=True)

    def mark(self) -> Wait:
        """See `CaptureBackend`."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event.synchronize

    def reserved_bytes(self) -> int:
        """See `CaptureBackend`: what the driver counts, for graphs take memory beside torch's allocator."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free


class _CudaGraph:
    """Implements `CapturedStep`."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph

    def replay(self) -> None:
        """See `CapturedStep`."""
        self._graph.replay()
