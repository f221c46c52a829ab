"""The compiled part of 4-bit quantization on a CPU: bitsandbytes' arithmetic, many times faster.

bitsandbytes 0.50 quantizes on a CPU with `torch.bucketize`: 20 s for the 106 M weights of a 135M model. The codes and
scales made here are the same to the bit (a test compares them). Whole blocks only.
"""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import numpy as np
import torch
from numba import njit

from loraplex.server.native.intrinsics import atomic_add, f32_at, i64_at, u16_at, widen
from loraplex.server.native.team import Kernel

# The argument block, an int64 each. The counters that all threads write lie on cache lines of their own.
WEIGHTS, IS_BF16, BLOCKS, BLOCKSIZE, BOUNDS, ORDER, CODES, ABSMAX, SCRATCH = range(9)
NEXT_TICKET, NEXT_UNIT, NUM_ARGUMENTS = 16, 24, 32
BYTES = 8  # of an int64

UNIT_BLOCKS = 1024  # what a thread takes at a time
# A thread for less work than this (2.5 ms) would wait longer at the end than it helps, on a machine that is busy.
THREAD_BLOCKS = 16 * UNIT_BLOCKS

Pointer: TypeAlias = Any

# No fast math: a product or sum in another order would move weights that lie near a bound to another code.
_compiled = njit(error_model="numpy")


@_compiled
def _widen(source: Pointer, first: int, weights: Pointer, blocksize: int) -> None:
    for i in range(blocksize):
        weights[i] = widen(source[first + i])


@_compiled
def _absmax(weights: Pointer, blocksize: int) -> Any:
    largest = np.float32(0)
    for i in range(blocksize):
        largest = max(largest, abs(weights[i]))
    return largest


@_compiled
def _rank(weights: Pointer, blocksize: int, inverse: Any, bounds: Pointer, ranks: Pointer) -> None:
    """Set ranks[i] to how many of the 15 bounds lie below weight i, which is what bucketize finds by bisection."""
    for i in range(blocksize):
        ranks[i] = np.float32(0)
    for k in range(15):
        bound = bounds[k]
        for i in range(blocksize):
            ranks[i] += np.float32(1) if weights[i] * inverse > bound else np.float32(0)


@_compiled
def _quantize(p: Pointer, first_block: int, end_block: int, weights: Pointer, ranks: Pointer) -> None:
    blocksize, bounds, order = p[BLOCKSIZE], f32_at(p[BOUNDS]), i64_at(p[ORDER])
    codes, absmax = u16_at(p[CODES]), f32_at(p[ABSMAX])
    for block in range(first_block, end_block):
        first = block * blocksize
        if p[IS_BF16]:
            _widen(u16_at(p[WEIGHTS]), first, weights, blocksize)
        else:
            _widen(f32_at(p[WEIGHTS]), first, weights, blocksize)
        largest = _absmax(weights, blocksize)
        absmax[block] = largest
        _rank(weights, blocksize, np.float32(1) / max(largest, np.float32(1e-38)), bounds, ranks)
        # Two bytes at a time, the earlier weight in the high half of each byte (the machine is little-endian).
        for i in range(0, blocksize, 4):
            low = order[int(ranks[i])] << 4 | order[int(ranks[i + 1])]
            high = order[int(ranks[i + 2])] << 4 | order[int(ranks[i + 3])]
            codes[(first + i) >> 2] = np.uint16(high << 8 | low)


def _quantize_4bit(arguments: int) -> None:
    """Take units of blocks until none is left."""
    p = i64_at(arguments)
    scratch = p[SCRATCH] + 8 * p[BLOCKSIZE] * atomic_add(arguments + NEXT_TICKET * BYTES, 1)
    weights, ranks = f32_at(scratch), f32_at(scratch + 4 * p[BLOCKSIZE])
    first = UNIT_BLOCKS * atomic_add(arguments + NEXT_UNIT * BYTES, 1)
    while first < p[BLOCKS]:
        _quantize(p, first, min(first + UNIT_BLOCKS, p[BLOCKS]), weights, ranks)
        first = UNIT_BLOCKS * atomic_add(arguments + NEXT_UNIT * BYTES, 1)


@functools.cache
def _kernel() -> Kernel:
    """Return the kernel, compiled on the first call in a process that finds nothing in Numba's cache."""
    return Kernel(_quantize_4bit, NUM_ARGUMENTS)


def quantize_blocks(weights: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize blocks of weights to the nearest of 16 values, scaled by each block's largest.

    Semantics: the value of code[b, i] is the one nearest to weights[b, i] / absmax[b]; absmax[b] = max |weights[b]|.

    Args:
        weights: (blocks, blocksize) on the CPU, of any float type and strides; blocksize a multiple of 4.
        values: (16,) float32 in [-1, 1], in the order of the codes.

    Returns:
        (blocks, blocksize // 2) uint8 codes, the first of each pair in the high half, and (blocks,) float32 absmax.

    Raises:
        ValueError: if the blocks cannot be divided by four.
    """
    blocks, blocksize = weights.shape
    if blocksize % 4:
        raise ValueError(f"the block size must be a multiple of 4, got {blocksize}")
    source = (weights if weights.dtype == torch.bfloat16 else weights.float()).contiguous()
    codes = torch.empty(blocks, blocksize // 2, dtype=torch.uint8)
    absmax = torch.empty(blocks, dtype=torch.float32)
    order = torch.argsort(values)
    bounds = (values[order[:-1]] + values[order[1:]]) / 2
    threads = max(1, min(torch.get_num_threads(), blocks // THREAD_BLOCKS))
    scratch = torch.empty(threads, 2, blocksize)
    sizes = (source.dtype == torch.bfloat16, blocks, blocksize)
    arguments = np.zeros(NUM_ARGUMENTS, np.int64)
    pointers = (tensor.data_ptr() for tensor in (bounds, order, codes, absmax, scratch))
    arguments[: SCRATCH + 1] = (source.data_ptr(), *sizes, *pointers)
    _kernel()(arguments.ctypes.data, threads)
    return codes, absmax
