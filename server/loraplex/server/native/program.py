"""Kernel calls that were recorded once and run again as one: no Python, no lock and no waking of threads in between.

While `record` is active in a thread, kernels that are called there do not run: the call and its argument block are
noted. A program then runs all of them in order, on every thread of one team, each call after the end of the one before.
What changes from run to run is set with `update`; everything else, addresses included, is as it was recorded. It is
what CUDA graphs are to a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from loraplex.server.native.intrinsics import CACHE_LINE, atomic_add, atomic_load, call_at, i64_at, spin
from loraplex.server.native.team import Kernel, kernel_calls

BYTES = 8  # of an int64
_LINE_WORDS = CACHE_LINE // BYTES
# One call: where its code is, its argument block, and how many threads have begun and ended it, on a line of its own.
FUNCTION, ARGUMENTS, BEGUN, ENDED = range(4)
# The program's own argument block.
CALLS, NUM_CALLS = range(2)


@dataclass(frozen=True)
class StepArguments:
    """What all calls of `kernel` have in common in one run: `values` are the arguments `first` and following.

    `kept` owns the memory that they point into.
    """

    kernel: Kernel
    first: int
    values: npt.NDArray[np.int64]
    kept: object


@dataclass
class Recording:
    """The calls of one forward pass, in order, each with a copy of its argument block."""

    kernels: list[Kernel] = field(default_factory=list)
    blocks: list[npt.NDArray[np.int64]] = field(default_factory=list)

    def add(self, kernel: Kernel, arguments: int) -> None:
        """Note a call; the block at the address `arguments` may change or go after this."""
        block = (ctypes.c_int64 * kernel.num_arguments).from_address(arguments)
        self.kernels.append(kernel)
        self.blocks.append(np.array(block, dtype=np.int64))


@contextlib.contextmanager
def record() -> Iterator[Recording]:
    """Note the calls of kernels in this thread instead of making them."""
    assert kernel_calls.take is None, "one recording at a time"
    recording = Recording()
    kernel_calls.take = recording.add
    try:
        yield recording
    finally:
        kernel_calls.take = None


class Program:
    """Runs what was recorded. Not for two threads at once; the recorded memory must outlive it."""

    def __init__(self, recording: Recording) -> None:
        """Lay out the recorded calls.

        Raises:
            ValueError: if nothing was recorded.
        """
        if not recording.kernels:
            raise ValueError("nothing was recorded")
        width = _whole_lines(max(len(block) for block in recording.blocks))
        self._recorded = np.zeros((len(recording.blocks), width), dtype=np.int64)
        for row, block in zip(self._recorded, recording.blocks, strict=True):
            row[: len(block)] = block
        # Copied from what was recorded before each run: kernels count in their blocks.
        self._blocks = _aligned(self._recorded.shape)
        self._calls = _aligned((len(recording.kernels), _LINE_WORDS))
        self._calls[:, FUNCTION] = [kernel.address for kernel in recording.kernels]
        self._calls[:, ARGUMENTS] = self._blocks.ctypes.data + np.arange(len(self._blocks)) * self._blocks.strides[0]
        self._rows = _rows_by_kernel(recording.kernels)
        self._arguments = np.array([self._calls.ctypes.data, len(self._calls)], dtype=np.int64)
        self._address = self._arguments.ctypes.data
        self._kernel = program_kernel()

    def update(self, step: StepArguments) -> None:
        """Set these arguments in every recorded call of their kernel; they must stay alive until `run` returns."""
        rows = self._rows.get(step.kernel)
        if rows is not None:
            self._recorded[rows, step.first : step.first + len(step.values)] = step.values

    def run(self, threads: int) -> None:
        """Make the calls, on up to `threads` threads: no more than had scratch memory when they were recorded."""
        np.copyto(self._blocks, self._recorded)
        self._calls[:, BEGUN : ENDED + 1] = 0
        self._kernel(self._address, threads)


def _rows_by_kernel(kernels: Sequence[Kernel]) -> dict[Kernel, npt.NDArray[np.int64]]:
    rows: dict[Kernel, list[int]] = {}
    for index, kernel in enumerate(kernels):
        rows.setdefault(kernel, []).append(index)
    return {kernel: np.array(indices) for kernel, indices in rows.items()}


def _whole_lines(words: int) -> int:
    return -(-words // _LINE_WORDS) * _LINE_WORDS


def _aligned(shape: tuple[int, int]) -> npt.NDArray[np.int64]:
    """Return zeros (n, words) that begin at a cache line."""
    words = shape[0] * shape[1]
    memory = np.zeros(words + _LINE_WORDS, dtype=np.int64)
    first = -memory.ctypes.data % CACHE_LINE // BYTES
    return memory[first : first + words].reshape(shape)


def _run(arguments: int) -> None:
    """Make every call. One is over when each thread that has begun it has ended it.

    A thread ends a call when no part of it is left to take, so those who hold parts have begun before. Threads need not
    be there from the start: one that comes late finds calls without parts until it has caught up.
    """
    p = i64_at(arguments)
    for index in range(p[NUM_CALLS]):
        at = p[CALLS] + index * CACHE_LINE
        call = i64_at(at)
        atomic_add(at + BEGUN * BYTES, 1)
        call_at(call[FUNCTION], call[ARGUMENTS])
        ended = atomic_add(at + ENDED * BYTES, 1) + 1
        # In this order: read the other way round, a late thread could stand in for one that is still at work.
        while ended != atomic_load(at + BEGUN * BYTES):
            spin()
            ended = atomic_load(at + ENDED * BYTES)


@functools.cache
def program_kernel() -> Kernel:
    """Return the kernel that runs a program, compiled when a process first asks and finds none on disk."""
    return Kernel(_run, _LINE_WORDS)
