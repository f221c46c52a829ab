"""What building an engine needs of a GPU beyond torch's tensors; a CPU has none of it.

The one place that knows that the GPU is CUDA's, beside the parts that it makes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from loraplex.server.engine.capture import CaptureBackend
from loraplex.server.engine.cuda_graphs import CudaGraphs
from loraplex.server.engine.memory_plan import DeviceMemory
from loraplex.server.lora.device_copies import DeviceCopies, SideStreamCopies


class Accelerator(Protocol):
    """One GPU."""

    def memory(self) -> DeviceMemory:
        """Return what the driver says now."""
        ...

    def current(self) -> AbstractContextManager[object]:
        """Return what makes it the current thread's device: kernels are launched on that one."""
        ...

    def capture_backend(self) -> CaptureBackend:
        """Return what steps are captured with."""
        ...

    def copies(self, on_done: Callable[[], None]) -> DeviceCopies:
        """Return what brings adapters to it; `on_done` is called on a background thread."""
        ...


class CudaAccelerator:
    """Implements `Accelerator`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def memory(self) -> DeviceMemory:
        """See `Accelerator`; what torch holds without using it counts as free."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return DeviceMemory(total=total, free=free)

    def current(self) -> AbstractContextManager[object]:
        """See `Accelerator`."""
        return torch.cuda.device(self._device)

    def capture_backend(self) -> CaptureBackend:
        """See `Accelerator`."""
        return CudaGraphs(self._device)

    def copies(self, on_done: Callable[[], None]) -> DeviceCopies:
        """See `Accelerator`."""
        return SideStreamCopies(self._device, on_done)


def accelerator_for(device: torch.device) -> Accelerator | None:
    """Return the accelerator that `device` is, None for a CPU."""
    return None if device.type == "cpu" else CudaAccelerator(device)
