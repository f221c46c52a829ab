"""Many tensors in one allocation: they come and go, are counted and are moved together.

Knows nothing of adapters.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

ALIGNMENT_BYTES = 64


class Buffer:
    """Hands out tensors side by side in one block of memory, each at the beginning of a cache line.

    Used twice with the same calls: once without memory, to learn `nbytes`, then with that many.
    """

    def __init__(self, memory: torch.Tensor | None = None) -> None:
        """Take `memory`, uint8 on any device; without it tensors are only counted and have no content."""
        self.nbytes = 0
        """Handed out so far, gaps included."""
        self._memory = memory

    def put(self, shape: tuple[int, ...], dtype: torch.dtype, values: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the next tensor, filled with what `values` returns, which is not called where there is no memory."""
        start, size = self.nbytes, math.prod(shape) * dtype.itemsize
        self.nbytes += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if self._memory is None:
            return torch.empty(shape, dtype=dtype, device="meta")
        return self._memory[start : start + size].view(dtype).view(shape).copy_(values())


def moved(tensor: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Return a tensor that `Buffer.put` made, in a copy of its buffer's memory."""
    start = tensor.storage_offset() * tensor.dtype.itemsize
    return memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
