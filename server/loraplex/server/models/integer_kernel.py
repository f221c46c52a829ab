"""The compiled part of products with integer weights: rows of activations become 16-bit integers, then tiles multiply.

Two phases in one call, the second after the end of the first. Each block of a row's inputs goes by its own largest
value. A unit of the second phase is a panel, the weights of sixteen outputs, which lie together in the order in which
they are read; it is read from memory once, whatever the number of rows, and each thread walks through a share of the
panels from end to end. An output is summed in a fixed order, so it depends neither on the other rows nor on the number
of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch

from loraplex.server.native import shares
from loraplex.server.native.intrinsics import atomic_add, atomic_load, f32_at, f64_at, i32_at, i64_at, pointer_like
from loraplex.server.native.simd import load, store
from loraplex.server.native.team import Kernel
from loraplex.server.native.tile import (
    OUTPUTS,
    STEP_INPUTS,
    TILE_ROWS,
    store_rounded,
    tile1,
    tile2,
    tile4,
    tile8,
    tile12,
    tile16,
    widen_step,
)
from loraplex.server.native.vector import Float32, Pointer, compiled, fill, round_up

# The argument block, eight bytes each: int64, but for one float. Every call writes the first ones; the counters, which
# all threads write, lie on cache lines of their own.
X, Y, ROWS, X16, X_SCALES, SCRATCH, UNITS, TILES_PER_UNIT = range(8)
IN_FEATURES, OUT_FEATURES, BLOCK, LARGEST, UNIT = range(8, 13)  # UNIT is the float
WEIGHTS, PANEL_BYTES, SCALES, PANEL_SCALES, BLOCK_SCALES, TABLE, SCRATCH_SIZE = range(13, 20)  # strides in bytes
SHARES = 20
NUM_FIELDS, NEXT_TICKET, NEXT_ROUND, ROUNDED, NEXT_UNIT = 21, 24, 32, 40, 48
NUM_ARGUMENTS = NEXT_UNIT + shares.WORDS
BYTES = 8  # of an int64

MOST_ROWS = TILE_ROWS[-1]  # of a tile
INPUTS_AT_ONCE = 16  # rounded together: rows of weights are filled up to a multiple of this

# A thread's scratch holds the float32 sums of a tile, the last inputs of a row, and a panel of weights as int16.
TAIL = 4 * MOST_ROWS * OUTPUTS
WIDENED = TAIL + 4 * INPUTS_AT_ONCE
WIDENED_BYTES = 2 * OUTPUTS  # for each input


@compiled
def _blocks(p: Pointer) -> int:
    """Return how many blocks a row of inputs has."""
    blocks: int = (p[IN_FEATURES] + p[BLOCK] - 1) // p[BLOCK]
    return blocks


@compiled
def _tile_rows(rows: int) -> int:
    """Return how many rows the tile has that takes the next of `rows` rows."""
    if rows > 12:
        return 16
    if rows > 8:
        return 12
    if rows > 4:
        return 8
    return 4 if rows > 2 else rows


@compiled
def _largest(bits: Pointer, at: int, n: int) -> Float32:
    """Return the largest absolute value's bits, which are in the order of the numbers, with NaN above all."""
    largest = np.int32(0)
    for i in range(n):
        largest = np.int32(max(largest, np.int32(bits[at + i] & 0x7FFFFFFF)))
    return largest


@compiled
def _round_block(arguments: int, tile: int, block: int, scratch: int) -> None:
    """Set the 16-bit integers and scales of one block of inputs, for all rows of a tile.

    They lie row by row in every cache line, so threads that shared a tile out by rows would write to the same lines.
    """
    p = i64_at(arguments)
    n, first = p[IN_FEATURES], tile * MOST_ROWS
    rows, padded = _tile_rows(p[ROWS] - first), round_up(n, INPUTS_AT_ONCE)
    start, end = block * p[BLOCK], min(n, (block + 1) * p[BLOCK])
    to, unit = p[X16] + 2 * first * padded, np.float32(f64_at(arguments)[UNIT])
    scales = f32_at(p[X_SCALES] + 4 * (first * _blocks(p) + block * rows))
    for row in range(min(rows, p[ROWS] - first)):
        at = p[X] + 4 * (first + row) * n
        i32_at(scratch)[0] = _largest(i32_at(at), start, end - start)
        largest = f32_at(scratch)[0]
        scales[row] = largest * unit
        factor = np.float32(p[LARGEST]) / max(largest, np.float32(1e-30))
        _round_row(f32_at(at), start, end, factor, to + 4 * row, 4 * rows, scratch)


@compiled
def _round_row(x: Pointer, start: int, end: int, factor: Float32, to: int, stride: int, scratch: int) -> None:
    """Store x[start:end] times `factor` as integers: pairs `stride` bytes apart, the first of the row's at `to`."""
    whole = end - (end - start) % INPUTS_AT_ONCE
    for i in range(start, whole, INPUTS_AT_ONCE):
        store_rounded(x, i, factor, to + i // 2 * stride, stride)
    if whole < end:
        tail = f32_at(scratch + TAIL)
        fill(tail, 0, np.float32(0), INPUTS_AT_ONCE)
        for i in range(whole, end):
            tail[i - whole] = x[i]
        store_rounded(tail, 0, factor, to + whole // 2 * stride, stride)


@compiled
def _multiply(
    rows: int, weights: Pointer, table: int, x: int, steps: int, scales: int, x_scales: int, sums: int
) -> None:
    if rows == 16:
        tile16(weights, table, x, steps, scales, x_scales, sums)
    elif rows == 12:
        tile12(weights, table, x, steps, scales, x_scales, sums)
    elif rows == 8:
        tile8(weights, table, x, steps, scales, x_scales, sums)
    elif rows == 4:
        tile4(weights, table, x, steps, scales, x_scales, sums)
    elif rows == 2:
        tile2(weights, table, x, steps, scales, x_scales, sums)
    else:
        tile1(weights, table, x, steps, scales, x_scales, sums)


@compiled
def _panel_tile(p: Pointer, panel: int, first: int, weights: int, step_bytes: int, scratch: int, like: Float32) -> None:
    """Set the outputs of one panel for the rows of the tile that begins at row `first`."""
    n, left = p[IN_FEATURES], p[ROWS] - first
    tile, padded = _tile_rows(left), round_up(n, INPUTS_AT_ONCE)
    x, x_scales = p[X16] + 2 * first * padded, p[X_SCALES] + 4 * first * _blocks(p)
    scales, sums = p[SCALES] + panel * p[PANEL_SCALES], f32_at(scratch)
    fill(sums, 0, np.float32(0), tile * OUTPUTS)
    start = 0
    while start < padded:
        steps = min(p[BLOCK], padded - start) // STEP_INPUTS
        at = pointer_like(weights + start // STEP_INPUTS * step_bytes, like)
        _multiply(tile, at, p[TABLE], x + 2 * start * tile, steps, scales, x_scales, scratch)
        start += p[BLOCK]
        scales += p[BLOCK_SCALES]
        x_scales += 4 * tile
    column = panel * OUTPUTS
    width = min(OUTPUTS, p[OUT_FEATURES] - column)
    for row in range(min(tile, left)):
        y, at = f32_at(p[Y]), (first + row) * p[OUT_FEATURES] + column
        if width == OUTPUTS:
            store(y, at, load(sums, row * OUTPUTS))
        else:
            for i in range(width):
                y[at + i] = sums[row * OUTPUTS + i]


@compiled
def _panel(p: Pointer, panel: int, first: int, end: int, scratch: int, like: Float32) -> None:
    """Do one panel for the rows first:end; for more than one tile the weights are widened only once."""
    weights, padded = p[WEIGHTS] + panel * p[PANEL_BYTES], round_up(p[IN_FEATURES], INPUTS_AT_ONCE)
    steps = padded // STEP_INPUTS
    step_bytes = p[PANEL_BYTES] // steps
    if end - first <= MOST_ROWS:
        _panel_tile(p, panel, first, weights, step_bytes, scratch, like)
        return
    wide = STEP_INPUTS * WIDENED_BYTES
    for step in range(steps):
        widen_step(pointer_like(weights + step * step_bytes, like), p[TABLE], scratch + WIDENED + step * wide)
    for tile in range(first, end, MOST_ROWS):
        _panel_tile(p, panel, tile, scratch + WIDENED, wide, scratch, np.int16(0))


@compiled
def _run(arguments: int, like: Float32) -> None:
    """Round blocks until none is left, then take panels; the type of `like` is that of the weights."""
    p = i64_at(arguments)
    thread = atomic_add(arguments + NEXT_TICKET * BYTES, 1)
    scratch = p[SCRATCH] + p[SCRATCH_SIZE] * thread
    blocks = _blocks(p)
    to_round = (p[ROWS] + MOST_ROWS - 1) // MOST_ROWS * blocks
    unit = atomic_add(arguments + NEXT_ROUND * BYTES, 1)
    while unit < to_round:
        _round_block(arguments, unit // blocks, unit % blocks, scratch)
        atomic_add(arguments + ROUNDED * BYTES, 1)
        unit = atomic_add(arguments + NEXT_ROUND * BYTES, 1)
    while atomic_load(arguments + ROUNDED * BYTES) < to_round:
        pass
    panels, rows = (p[OUT_FEATURES] + OUTPUTS - 1) // OUTPUTS, p[TILES_PER_UNIT] * MOST_ROWS
    unit = shares.take(arguments + NEXT_UNIT * BYTES, p[UNITS], p[SHARES], thread)
    while unit >= 0:
        first = unit // panels * rows
        _panel(p, unit % panels, first, min(p[ROWS], first + rows), scratch, like)
        unit = shares.take(arguments + NEXT_UNIT * BYTES, p[UNITS], p[SHARES], thread)


def _multiply_4bit(arguments: int) -> None:
    _run(arguments, np.uint8(0))


def _multiply_int8(arguments: int) -> None:
    _run(arguments, np.int8(0))


def _multiply_int16(arguments: int) -> None:
    _run(arguments, np.int16(0))


_VARIANTS: dict[torch.dtype, Callable[[int], None]] = {
    torch.uint8: _multiply_4bit,
    torch.int8: _multiply_int8,
    torch.int16: _multiply_int16,
}


@functools.cache
def integer_kernel(weights: torch.dtype) -> Kernel:
    """Return the kernel for weights of int16, int8, or 4-bit codes in uint8.

    Compiled when a process first asks and finds nothing in Numba's cache.
    """
    return Kernel(_VARIANTS[weights], NUM_ARGUMENTS)
