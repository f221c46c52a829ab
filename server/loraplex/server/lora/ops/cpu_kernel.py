"""The compiled part of the CPU LoRA operator: reads every A and B where it lies, once, in memory order.

A unit of work is one slice of one segment, or a part of it where there are few. Each output belongs to one unit and is
summed in a fixed order, so the result depends neither on the number of threads nor on the other segments. A matrix row
is walked from end to end for all tokens before the next one: with several rows at a time (tried: 2 and 4) the memory
prefetchers lose the stream, and weights that are in no cache arrive up to 40 % slower.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from loraplex.server.native.intrinsics import (
    atomic_add,
    atomic_load,
    f32_at,
    i64_at,
    narrow,
    pointer_like,
    u16_at,
    widen,
)
from loraplex.server.native.team import Kernel
from loraplex.server.native.vector import Float32, Pointer, axpy, axpy4, compiled, dot, dot4, fill

# The argument block, an int64 each. Every call writes the first CALL_FIELDS and zeroes the counters, which lie on cache
# lines of their own because all threads write them; the rest is written once a step.
Y, Y_STRIDE, Y_IS_BF16, X, X_STRIDE, IN_FEATURES, SITE = range(7)
CALL_FIELDS, NEXT_TICKET, SHRUNK, NEXT_UNIT, LINE_WORDS, STEP_FIELDS = 7, 8, 16, 24, 8, 40
SEGMENTS, SCALES, NUM_SEGMENTS, MAX_SLICES, PARTS, HIDDEN, SUMS = range(40, 47)
NUM_ARGUMENTS = 47
COUNTER_BYTES = 8 * (STEP_FIELDS - CALL_FIELDS)

# One segment: its first token, its tokens, address of the adapter's table, slices per site in that table, and where
# its part of HIDDEN begins and how much of that each slice has, in floats.
START, COUNT, TABLE, SLICES, HIDDEN_START, HIDDEN_STRIDE = range(6)
SEGMENT_FIELDS = 6

# One slice in PackedAdapter.table.
A, B_T, RANK, COLUMN, WIDTH = range(5)
SLICE_FIELDS = 5

SUMS_PER_THREAD = 4096  # float32; 16 KiB, half of a first-level cache
LINE = 16  # float32 of a cache line: where the columns of a slice are divided
BYTES = 8  # of an int64


@compiled
def _shrink(p: Pointer, segment: Pointer, a: Pointer, hidden: int, rank: int, part: int) -> None:
    """Set hidden[t, r] = x[t] . a[r] for all tokens of the segment and this part's ranks."""
    n, stride, tokens = p[IN_FEATURES], p[X_STRIDE], segment[COUNT]
    x, h, first = f32_at(p[X]), f32_at(p[HIDDEN]), segment[START] * p[X_STRIDE]
    parts = max(1, p[PARTS])
    for r in range(rank * part // parts, rank * (part + 1) // parts):
        t = 0
        while t + 4 <= tokens:
            s0, s1, s2, s3 = dot4(a, r * n, x, first + t * stride, stride, n)
            h[hidden + t * rank + r] = s0
            h[hidden + (t + 1) * rank + r] = s1
            h[hidden + (t + 2) * rank + r] = s2
            h[hidden + (t + 3) * rank + r] = s3
            t += 4
        while t < tokens:
            h[hidden + t * rank + r] = dot(a, r * n, x, first + t * stride, n)
            t += 1


@compiled
def _add_sums(y: Pointer, at: int, sums: Pointer, token: int, scale: Float32, n: int) -> None:
    for i in range(n):
        y[at + i] = narrow(widen(y[at + i]) + scale * sums[token + i], y[at + i])


@compiled
def _expand_tile(b: Pointer, b_at: int, width: int, h: Pointer, rank: int, tokens: int, sums: Pointer, n: int) -> None:
    """Set sums[t, :n] = sum over r of h[t, r] * b[r, :n]; b's rows are `width` long, those of sums `n`."""
    fill(sums, 0, np.float32(0), tokens * n)
    for r in range(rank):
        row, t = b_at + r * width, 0
        while t + 4 <= tokens:
            at = t * rank + r
            weights = (h[at], h[at + rank], h[at + 2 * rank], h[at + 3 * rank])
            axpy4(b, row, weights, sums, t * n, n, n)
            t += 4
        while t < tokens:
            axpy(b, row, h[t * rank + r], sums, t * n, n)
            t += 1


@compiled
def _expand(
    p: Pointer, segment: Pointer, s: Pointer, b: Pointer, scale: Float32, hidden: int, sums: Pointer, part: int
) -> None:
    """Add scale * hidden b to y for all tokens of the segment and this part's columns."""
    width, tokens = s[WIDTH], segment[COUNT]
    parts = max(1, p[PARTS])
    lines = -(-width // LINE)
    column, end = LINE * (lines * part // parts), min(width, LINE * (lines * (part + 1) // parts))
    h = f32_at(p[HIDDEN] + 4 * hidden)
    while column < end:
        n = min(end - column, SUMS_PER_THREAD // tokens)
        _expand_tile(b, column, width, h, s[RANK], tokens, sums, n)
        for t in range(tokens):
            at = (segment[START] + t) * p[Y_STRIDE] + s[COLUMN] + column
            if p[Y_IS_BF16]:
                _add_sums(u16_at(p[Y]), at, sums, t * n, scale, n)
            else:
                _add_sums(f32_at(p[Y]), at, sums, t * n, scale, n)
        column += n


@compiled
def _slice(
    p: Pointer, segment: Pointer, position: int, scale: Float32, part: int, sums: Pointer, phase: int, weight: Float32
) -> None:
    """Do one part of one slice: phase 0 shrinks, the last phase expands."""
    s = i64_at(segment[TABLE] + (p[SITE] * segment[SLICES] + position) * SLICE_FIELDS * BYTES)
    if s[RANK] == 0:
        return
    hidden = segment[HIDDEN_START] + position * segment[HIDDEN_STRIDE]
    if phase == 0:
        _shrink(p, segment, pointer_like(s[A], weight), hidden, s[RANK], part)
    if phase == 1 or p[PARTS] == 0:
        _expand(p, segment, s, pointer_like(s[B_T], weight), scale, hidden, sums, part)


@compiled
def _unit(p: Pointer, unit: int, sums: Pointer, phase: int, weight: Float32) -> None:
    """Do one unit: a whole segment, or where slices are divided, one part of one slice."""
    if p[PARTS] == 0:
        index, part, first, last = unit, 0, 0, p[MAX_SLICES]
    else:
        index, rest = unit // (p[MAX_SLICES] * p[PARTS]), unit % (p[MAX_SLICES] * p[PARTS])
        part, first = rest % p[PARTS], rest // p[PARTS]
        last = first + 1
    segment = i64_at(p[SEGMENTS] + index * SEGMENT_FIELDS * BYTES)
    for position in range(first, min(last, segment[SLICES])):
        _slice(p, segment, position, f32_at(p[SCALES])[index], part, sums, phase, weight)


@compiled
def _run(arguments: int, weight: Float32) -> None:
    """Take units until none is left. Divided slices need all of `hidden` first: expanding then waits for shrinking.

    `weight` only carries a type: float32, or uint16 for bfloat16.
    """
    p = i64_at(arguments)
    sums = f32_at(p[SUMS] + 4 * SUMS_PER_THREAD * atomic_add(arguments + NEXT_TICKET * BYTES, 1))
    units, phases = p[NUM_SEGMENTS], 1
    if p[PARTS] > 0:
        units, phases = p[NUM_SEGMENTS] * p[MAX_SLICES] * p[PARTS], 2
    for phase in range(phases):
        while phase > 0 and atomic_load(arguments + SHRUNK * BYTES) < units:
            pass
        counter = arguments + (NEXT_UNIT + phase * LINE_WORDS) * BYTES
        unit = atomic_add(counter, 1)
        while unit < units:
            _unit(p, unit, sums, phase, weight)
            if phase == 0:
                atomic_add(arguments + SHRUNK * BYTES, 1)
            unit = atomic_add(counter, 1)


def _lora_add_f32(arguments: int) -> None:
    _run(arguments, np.float32(0))


def _lora_add_bf16(arguments: int) -> None:
    _run(arguments, np.uint16(0))


_VARIANTS = {torch.float32: _lora_add_f32, torch.bfloat16: _lora_add_bf16}


@functools.cache
def lora_add_kernel(weights: torch.dtype) -> Kernel:
    """Return the kernel for weights of this dtype, compiled when a process first asks and finds none on disk.

    Raises:
        ValueError: if the dtype is neither float32 nor bfloat16.
    """
    if weights not in _VARIANTS:
        raise ValueError(f"LoRA weights on a CPU are float32 or bfloat16, not {weights}")
    return Kernel(_VARIANTS[weights])
