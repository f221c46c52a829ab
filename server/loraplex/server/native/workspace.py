"""Memory for the results of kernels: torch's, or while calls are recorded, memory that outlives its tensors.

A recorded call writes to where its result lay at that time, whenever it runs again. What a forward pass has let go of
is given out again within the same pass, as it would be by an allocator.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
import threading
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from loraplex.server.native.intrinsics import CACHE_LINE

# What `sys.getrefcount` says of an element of a list that nobody else refers to.
_PROBE = [object()]
_UNUSED = sys.getrefcount(_PROBE[0])


class Workspace:
    """Pieces of memory that are never given back. Not for two recordings at once, but for many one after the other.

    Their sizes are powers of two: of steps with one row more each time, none would find the last one's large enough.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self._pieces: list[npt.NDArray[np.uint8]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(piece.nbytes for piece in self._pieces)

    def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor in a piece that no tensor uses any more: the smallest that is large enough, or a new one."""
        nbytes = math.prod(shape) * dtype.itemsize
        piece = self._unused_piece(nbytes + CACHE_LINE)
        first = -piece.ctypes.data % CACHE_LINE
        return torch.from_numpy(piece[first : first + nbytes]).view(dtype).view(shape)

    def _unused_piece(self, nbytes: int) -> npt.NDArray[np.uint8]:
        pieces = self._pieces
        fitting = [
            (pieces[index].nbytes, index)
            for index in range(len(pieces))
            if sys.getrefcount(pieces[index]) == _UNUSED and pieces[index].nbytes >= nbytes
        ]
        if fitting:
            return pieces[min(fitting)[1]]
        pieces.append(np.empty(1 << (nbytes - 1).bit_length(), dtype=np.uint8))
        return pieces[-1]


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """Return another tensor over the memory of `tensor`, contiguous, that does not count as a use of it."""
    memory = (ctypes.c_uint8 * tensor.nbytes).from_address(tensor.data_ptr())
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)


class _Current(threading.local):
    workspace: Workspace | None = None


_current = _Current()


@contextlib.contextmanager
def memory_from(workspace: Workspace) -> Iterator[None]:
    """Let this thread's results lie in `workspace`."""
    assert _current.workspace is None, "one workspace at a time"
    _current.workspace = workspace
    try:
        yield
    finally:
        _current.workspace = None


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialized tensor on the CPU, for the result of a kernel."""
    if _current.workspace is not None:
        return _current.workspace.empty(*shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype)


def team_size(worth_it: bool) -> int:
    """Return the threads to call, or to have scratch memory for: one if more are not worth it, unless recorded."""
    return torch.get_num_threads() if worth_it or _current.workspace is not None else 1
