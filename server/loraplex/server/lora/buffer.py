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
        self._once: dict[tuple[int, tuple[int, ...], torch.dtype], torch.Tensor] = {}

    def put(self, shape: tuple[int, ...], dtype: torch.dtype, values: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the next tensor, filled with what `values` returns, which is not called where there is no memory."""
        start, size = self.nbytes, math.prod(shape) * dtype.itemsize
        self.nbytes += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if self._memory is None:
            return torch.empty(shape, dtype=dtype, device="meta")
        return self._memory[start : start + size].view(dtype).view(shape).copy_(values())

    def put_once(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return a copy of `tensor`, the same one as before if the same memory has been put so already."""
        shape = tuple(tensor.shape)
        key = (tensor.data_ptr(), shape, dtype)
        if key not in self._once:
            self._once[key] = self.put(shape, dtype, lambda: tensor)
        return self._once[key]


def moved(tensor: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Return a tensor that `Buffer.put` made, in a copy of its buffer's memory."""
    start = tensor.storage_offset() * tensor.dtype.itemsize
    return memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
