"""The compiled part of the CPU LoRA operator: reads every A and B where it lies, in memory order.

A unit of work is up to MAX_TOKENS tokens of a segment or, where there are few, one slice for them. Each output belongs
to one unit and is summed in a fixed order, so the result depends neither on the number of threads nor on other tokens.
For one token a matrix row is walked from end to end before the next one: with several rows at a time (tried: 2 and 4,
also with prefetches from 1 to 16 KiB ahead) weights that are in no cache arrive up to 40 % slower. For the same reason
a slice is never divided between threads (tried: A by rows and B by columns; two threads were then no faster than one).
Several tokens do enough with each number for rows to be taken side by side, and sums stay in registers.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from loraplex.server.native.intrinsics import (
    atomic_add,
    f32_at,
    i64_at,
    item_bytes,
    narrow,
    pointer_like,
    u16_at,
    widen,
)
from loraplex.server.native.low_rank import ROWS, STEP, TOKENS, add_four_rows, add_row, dot, dots_of_four, set_row
from loraplex.server.native.simd import LANES, join_like, load, load_two_of, split_like, store
from loraplex.server.native.team import Kernel
from loraplex.server.native.vector import Float32, Pointer, compiled, round_up

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

# A thread's scratch holds, in float32: SUMS sums (16 KiB, half of a first-level cache), then the unit's inputs (tokens,
# in_features padded to steps), then x A^T (tokens, rank).
SUMS = 4096
MAX_TOKENS = 16  # of a unit, so that its inputs stay in the second-level cache
BYTES = 8  # of an int64


@compiled
def _copy_inputs(p: Pointer, first: int, tokens: int, inputs: Pointer, like: Pointer) -> None:
    """Set `inputs` to the tokens' numbers of x, each filled up to whole steps, in the order of `like`'s matrices."""
    n = p[IN_FEATURES]
    padded, whole = round_up(n, STEP), n - n % STEP
    for t in range(tokens):
        x, at, to = f32_at(p[X]), (first + t) * p[X_STRIDE], t * padded
        for k in range(0, whole, STEP):
            even, odd = split_like(load(x, at + k), load(x, at + k + LANES), like)
            store(inputs, to + k, even)
            store(inputs, to + k + LANES, odd)
        if whole < n:
            v0, v1 = load_two_of(x, at + whole, n - whole)
            even, odd = split_like(v0, v1, like)
            store(inputs, to + whole, even)
            store(inputs, to + whole + LANES, odd)


@compiled
def _shrink(a: Pointer, rank: int, n: int, inputs: Pointer, tokens: int, hidden: Pointer, ahead: int) -> None:
    """Set hidden[t, r] = inputs[t] . a[r]; asks for memory from the address `ahead` on where it takes four tokens."""
    padded, fours = round_up(n, STEP), tokens - tokens % TOKENS
    for r in range(0, rank, 2):
        second, there = min(r + 1, rank - 1), ahead + r * n * item_bytes(a)
        for t in range(0, fours, TOKENS):
            first, last = dots_of_four(a, r * n, second * n, inputs, t * padded, padded, n, there)
            _set(hidden, t * rank + r, rank, first)
            _set(hidden, t * rank + second, rank, last)
        if fours < tokens:
            for each in range(r, second + 1):
                for t in range(fours, tokens):
                    hidden[t * rank + each] = dot(a, each * n, inputs, t * padded, n)


@compiled
def _set(hidden: Pointer, at: int, rank: int, values: tuple[Float32, Float32, Float32, Float32]) -> None:
    hidden[at] = values[0]
    hidden[at + rank] = values[1]
    hidden[at + 2 * rank] = values[2]
    hidden[at + 3 * rank] = values[3]


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
def _expand_tile(
    b: Pointer, column: int, n: int, width: int, rank: int, hidden: Pointer, tokens: int, sums: Pointer, ahead: int
) -> None:
    """Set sums[t, :n] = sum over r of hidden[t, r] * b[r, column : column + n]; rows of sums are filled up to steps."""
    stride, r = round_up(n, STEP), 1
    for t in range(tokens):
        set_row(b, column, hidden[t * rank], sums, t * stride, n)
    while tokens > 1 and r + ROWS <= rank:
        there = ahead + r * n * item_bytes(b)
        add_four_rows(b, r * width + column, width, hidden, r, rank, sums, stride, tokens, n, there)
        r += ROWS
    while r < rank:
        for t in range(tokens):
            add_row(b, r * width + column, hidden[t * rank + r], sums, t * stride, n)
        r += 1
    for i in range(0, tokens * stride, STEP):
        low, high = join_like(load(sums, i), load(sums, i + LANES), b)
        store(sums, i, low)
        store(sums, i + LANES, high)


@compiled
def _expand(
    p: Pointer, segment: Pointer, s: Pointer, b: Pointer, scale: Float32, scratch: tuple[Pointer, Pointer]
) -> None:
    """Add scale * hidden b to y for all tokens of the segment, after DoRA's factors or with a bias on B."""
    width, tokens, column = s[WIDTH], segment[COUNT], 0
    sums, hidden = scratch
    while column < width:
        n = min(width - column, SUMS // tokens // STEP * STEP)
        ahead = s[B_T] + s[RANK] * (width + column) * item_bytes(b)
        _expand_tile(b, column, n, width, s[RANK], hidden, tokens, sums, ahead)
        stride = round_up(n, STEP)
        for t in range(tokens):
            at = (segment[START] + t) * p[Y_STRIDE] + s[COLUMN] + column
            if p[Y_IS_BF16]:
                _write(u16_at(p[Y]), at, sums, t * stride, scale, n, s, column)
            else:
                _write(f32_at(p[Y]), at, sums, t * stride, scale, n, s, column)
        column += n


@compiled
def _unit(p: Pointer, unit: int, scratch: int, weight: Float32) -> None:
    """Do one unit: units count through segments, then groups of slices."""
    index, first = unit // p[UNITS_PER_SEGMENT], unit % p[UNITS_PER_SEGMENT] * p[SLICES_PER_UNIT]
    segment = i64_at(p[SEGMENTS] + index * SEGMENT_FIELDS * BYTES)
    tokens, n = segment[COUNT], p[IN_FEATURES]
    sums, inputs = f32_at(scratch), f32_at(scratch + 4 * SUMS)
    hidden = f32_at(scratch + 4 * (SUMS + tokens * round_up(n, STEP)))
    is_copied = False
    for position in range(first, min(first + p[SLICES_PER_UNIT], segment[SLICES])):
        s = i64_at(segment[TABLE] + (p[SITE] * segment[SLICES] + position) * SLICE_FIELDS * BYTES)
        if s[RANK] > 0:
            a, b = pointer_like(s[A], weight), pointer_like(s[B_T], weight)
            if not is_copied:
                _copy_inputs(p, segment[START], tokens, inputs, a)
                is_copied = True
            _shrink(a, s[RANK], n, inputs, tokens, hidden, s[B_T])
            _expand(p, segment, s, b, f32_at(p[SCALES])[index], (sums, hidden))


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
