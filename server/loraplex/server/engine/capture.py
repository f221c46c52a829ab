"""What steps are captured with: device work that is recorded once and replayed at the price of one launch.

Knows nothing of decoders or batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Wait = Callable[[], None]
"""Returns when the device has done what was launched before it was made."""


class CapturedStep(Protocol):
    """Recorded work: it reads and writes the memory that it was captured with, whatever is in it by then."""

    def replay(self) -> None:
        """Launch it again; waits for nothing."""
        ...


class CaptureBackend(Protocol):
    """Captures, and moves what a replay reads. All of it takes its turn in the device's current stream."""

    def capture(self, step: Callable[[], object]) -> CapturedStep:
        """Run `step` until everything in it is compiled, then record what it launches.

        Host code in it runs now and never again: numbers, shapes and addresses stay as they are. `step` must not wait
        for the device, and may run several times. What it allocates belongs to the record.

        Raises:
            torch.OutOfMemoryError: if the device has no memory for it.
        """
        ...

    def staging(self, nbytes: int) -> torch.Tensor:
        """Return zeroed memory of the host, (nbytes,) uint8, from which copies need not be waited for."""
        ...

    def upload(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy `source`, which is `staging` memory, to `target` on the device."""
        ...

    def mark(self) -> Wait:
        """Return what waits for all that was launched so far."""
        ...

    def reserved_bytes(self) -> int:
        """Return the memory of the device that this process holds, in bytes."""
        ...
