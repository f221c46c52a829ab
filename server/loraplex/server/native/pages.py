"""Memory on huge pages, for what is read from end to end again and again.

A read of memory that is in no cache first needs its page's address translated. With pages of 2 MiB instead of 4 KiB all
of an adapter's translations stay known; on a virtual machine, where each takes two walks, one thread reads nearly twice
as fast. Linux gives such pages to who asks for them, where it has any; elsewhere this is memory like any other.
"""

from __future__ import annotations

import mmap
import threading

import torch

HUGE_PAGE_BYTES = 2 << 20
SLAB_BYTES = 8 * HUGE_PAGE_BYTES
# Tensors in a slab begin at cache lines of their own, two of which the processor likes to fetch together.
_ALIGNMENT = 128


def zeros_on_huge_pages(nbytes: int) -> torch.Tensor:
    """Return (nbytes,) uint8 zeros that begin at a huge page; their memory goes back to the system with the tensor.

    Only whole huge pages are asked for and the rest is on small ones, so that no more memory is used than `nbytes`.
    """
    whole = nbytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if not whole or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(nbytes, dtype=torch.uint8)
    # Memory that was in use before keeps its small pages, hence a mapping of its own instead of the allocator's.
    try:
        mapping = mmap.mmap(-1, nbytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        everything = torch.frombuffer(mapping, dtype=torch.uint8)
        start = -everything.data_ptr() % HUGE_PAGE_BYTES
        mapping.madvise(mmap.MADV_HUGEPAGE, start, whole)
    except OSError:  # a kernel built without huge pages, or too little memory: PyTorch says how much was asked for
        return torch.zeros(nbytes, dtype=torch.uint8)
    return everything[start : start + nbytes]


class _Slabs:
    """Huge pages that tensors share which are too small, or too odd, for pages of their own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slab = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> torch.Tensor:
        """Return (nbytes,) uint8 of the slab, or of a new one that takes its place."""
        with self._lock:
            padded = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
            if len(self._slab) < padded:
                self._slab = zeros_on_huge_pages(max(SLAB_BYTES, padded))
            taken, self._slab = self._slab[:nbytes], self._slab[padded:]
            return taken


_slabs = _Slabs()


def copy_to_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy of a tensor of the CPU, beside the copies made before it.

    A slab's memory goes back to the system when all tensors in it have gone, so this is for what lives long.
    """
    memory = _slabs.take(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
    return memory.copy_(tensor)
