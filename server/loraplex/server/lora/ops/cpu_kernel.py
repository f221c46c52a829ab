"""The compiled part of the CPU LoRA operator: reads every A and B where it lies, once, in memory order.

A unit of work is a segment or, where there are few, one slice of one. Each output belongs to one unit and is summed in
a fixed order, so the result depends neither on the number of threads nor on the other segments. A matrix row is walked
from end to end for all tokens before the next one: with several rows at a time (tried: 2 and 4) the memory prefetchers
lose the stream, and weights that are in no cache arrive up to 40 % slower. For the same reason a slice is never divided
between threads (tried: A by rows and B by columns; two threads were then no faster than one).
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from loraplex.server.native.intrinsics import (
    atomic_add,
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
CALL_FIELDS, NEXT_TICKET, NEXT_UNIT, STEP_FIELDS = 7, 8, 16, 24
COUNTER_BYTES = 8 * (STEP_FIELDS - CALL_FIELDS)
SEGMENTS, SCALES, NUM_SEGMENTS, UNITS_PER_SEGMENT, SLICES_PER_UNIT, SCRATCH, SCRATCH_SIZE = range(24, 31)
NUM_ARGUMENTS = 31

# One segment: its first token, its tokens, address of the adapter's table, slices per site in that table.
START, COUNT, TABLE, SLICES = range(4)
SEGMENT_FIELDS = 4

# One slice in PackedAdapter.table.
A, B_T, RANK, COLUMN, WIDTH, FACTORS, SCALED_BIAS = range(7)
SLICE_FIELDS = 7

# A thread's scratch holds, in float32: SUMS sums (16 KiB, half of a first-level cache), then x A^T (tokens, rank).
SUMS = 4096
MAX_TOKENS = 256  # of a segment, so that SUMS divides into whole cache lines
BYTES = 8  # of an int64


@compiled
def _shrink(p: Pointer, segment: Pointer, a: Pointer, rank: int, hidden: Pointer) -> None:
    """Set hidden[t, r] = x[t] . a[r] for all tokens of the segment."""
    n, stride, tokens = p[IN_FEATURES], p[X_STRIDE], segment[COUNT]
    x, first = f32_at(p[X]), segment[START] * p[X_STRIDE]
    for r in range(rank):
        t = 0
        while t + 4 <= tokens:
            s0, s1, s2, s3 = dot4(a, r * n, x, first + t * stride, stride, n)
            hidden[t * rank + r] = s0
            hidden[(t + 1) * rank + r] = s1
            hidden[(t + 2) * rank + r] = s2
            hidden[(t + 3) * rank + r] = s3
            t += 4
        while t < tokens:
            hidden[t * rank + r] = dot(a, r * n, x, first + t * stride, n)
            t += 1


@compiled
def _add_sums(y: Pointer, at: int, sums: Pointer, token: int, scale: Float32, n: int) -> None:
    for i in range(n):
        y[at + i] = narrow(widen(y[at + i]) + scale * sums[token + i], y[at + i])


@compiled
def _add_to_scaled(y: Pointer, at: int, sums: Pointer, token: int, scale: Float32, n: int, factors: Pointer) -> None:
    for i in range(n):
        y[at + i] = narrow(widen(y[at + i]) * factors[i] + scale * sums[token + i], y[at + i])


@compiled
def _add_bias(sums: Pointer, token: int, bias: Pointer, n: int) -> None:
    for i in range(n):
        sums[token + i] += bias[i]


@compiled
def _write(y: Pointer, at: int, sums: Pointer, token: int, scale: Float32, n: int, s: Pointer, column: int) -> None:
    """Add scale * sums[token:] to n numbers of y, the slice's from `column` on, with what else changes there."""
    if s[SCALED_BIAS]:
        _add_bias(sums, token, f32_at(s[SCALED_BIAS] + 4 * column), n)
    if s[FACTORS]:
        _add_to_scaled(y, at, sums, token, scale, n, f32_at(s[FACTORS] + 4 * column))
    else:
        _add_sums(y, at, sums, token, scale, n)


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
def _expand(p: Pointer, segment: Pointer, s: Pointer, b: Pointer, scale: Float32, scratch: int) -> None:
    """Add scale * hidden b to y for all tokens of the segment, after DoRA's factors or with a bias on B."""
    width, tokens, column = s[WIDTH], segment[COUNT], 0
    sums, hidden = f32_at(scratch), f32_at(scratch + 4 * SUMS)
    while column < width:
        n = min(width - column, SUMS // tokens)
        _expand_tile(b, column, width, hidden, s[RANK], tokens, sums, n)
        for t in range(tokens):
            at = (segment[START] + t) * p[Y_STRIDE] + s[COLUMN] + column
            if p[Y_IS_BF16]:
                _write(u16_at(p[Y]), at, sums, t * n, scale, n, s, column)
            else:
                _write(f32_at(p[Y]), at, sums, t * n, scale, n, s, column)
        column += n


@compiled
def _unit(p: Pointer, unit: int, scratch: int, weight: Float32) -> None:
    """Do one unit: units count through segments, then groups of slices."""
    index, first = unit // p[UNITS_PER_SEGMENT], unit % p[UNITS_PER_SEGMENT] * p[SLICES_PER_UNIT]
    segment = i64_at(p[SEGMENTS] + index * SEGMENT_FIELDS * BYTES)
    for position in range(first, min(first + p[SLICES_PER_UNIT], segment[SLICES])):
        s = i64_at(segment[TABLE] + (p[SITE] * segment[SLICES] + position) * SLICE_FIELDS * BYTES)
        if s[RANK] > 0:
            _shrink(p, segment, pointer_like(s[A], weight), s[RANK], f32_at(scratch + 4 * SUMS))
            _expand(p, segment, s, pointer_like(s[B_T], weight), f32_at(p[SCALES])[index], scratch)


@compiled
def _run(arguments: int, weight: Float32) -> None:
    """Take units until none is left. `weight` only carries a type: float32, or uint16 for bfloat16."""
    p = i64_at(arguments)
    scratch = p[SCRATCH] + p[SCRATCH_SIZE] * atomic_add(arguments + NEXT_TICKET * BYTES, 1)
    units = p[NUM_SEGMENTS] * p[UNITS_PER_SEGMENT]
    unit = atomic_add(arguments + NEXT_UNIT * BYTES, 1)
    while unit < units:
        _unit(p, unit, scratch, weight)
        unit = atomic_add(arguments + NEXT_UNIT * BYTES, 1)


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
    return Kernel(_VARIANTS[weights], NUM_ARGUMENTS)
