"""The compiled part of CPU attention for chunks of a prompt: tiles of queries against tiles of keys, in registers.

A unit of work is 48 queries (token after token, the query heads that share a KV head side by side), one to a lane, and
that KV head. It walks through the context in tiles of keys that begin at multiples of KEYS tokens, and keeps each
lane's largest score, sum of exponentials and weighted sum of values (FlashAttention: Dao et al., 2022), all in float32.
Nothing of a lane depends on another one, so a token's result depends neither on the batch nor on how a prompt is cut
into chunks, nor on the number of threads. Reads the paged cache through the block tables, after it has been written.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from loraplex.server.native.intrinsics import atomic_add, f32_at, f64_at, i32_at, i64_at, pointer_like
from loraplex.server.native.lane_math import keep_between, maximum, times, transpose
from loraplex.server.native.product import ROWS, WIDTH, add_product, set_product
from loraplex.server.native.simd import LANES, fma, load, splat, store
from loraplex.server.native.team import Kernel
from loraplex.server.native.vector import (
    Float32,
    Pointer,
    cap_numbers,
    compiled,
    copy_scaled,
    exp_lanes,
    fill,
    round_up,
)

# The argument block, eight bytes each: int64, but for two floats. The counters, which all threads write, lie on cache
# lines of their own.
Q, Q_STRIDE, OUT, K_CACHE, V_CACHE, HEADS, KV_HEADS, HEAD_DIM, BLOCK, WINDOW, SCALE, SOFTCAP = range(12)
CALL_INTEGERS, CALL_FLOATS = 10, 2
NEXT_TICKET, NEXT_UNIT, STEP_FIELDS = 16, 24, 32
COUNTER_BYTES = 8 * (STEP_FIELDS - CALL_INTEGERS - CALL_FLOATS)
NUM_ITEMS, ITEMS, TABLES, TABLE_STRIDE, SCRATCH, SCRATCH_SIZE = range(32, 38)
NUM_ARGUMENTS = 38

# One item is up to WIDTH queries of a chunk: the chunk's first token in the batch and its position in the context, its
# row in the block tables, the item's first query (token of the chunk * group + head of the group) and their number.
TOKEN, POSITION, ROW, FIRST, COUNT = range(5)
ITEM_FIELDS = 5

KEYS = 64  # of a tile
EMPTY = np.float32(-1e30)  # the largest of no scores
HIDDEN = np.float32(-3e38)  # a score that was not to be seen: far below EMPTY, so that its exponential is 0
EVER = np.float32(3e38)
BYTES = 8


# A thread's scratch holds, in float32: rows of queries or results (WIDTH, D); the queries by lanes (D, WIDTH); results
# by lanes (D, WIDTH); scores (KEYS, WIDTH); a tile's keys (KEYS, D) and values (KEYS, D); and by lane (WIDTH) the
# position, the largest score, the sum of exponentials. D is the head dimension, filled up to whole registers.
def scratch_floats(head_dim: int) -> int:
    """Return the size of one thread's scratch."""
    return (3 * WIDTH + 2 * KEYS) * (-(-head_dim // LANES) * LANES) + (KEYS + 3) * WIDTH


@compiled
def _query(p: Pointer, item: Pointer, h: int, lane: int) -> tuple[int, int]:
    """Return the token in the batch and the query head of a lane."""
    group = p[HEADS] // p[KV_HEADS]
    query = item[FIRST] + lane
    return item[TOKEN] + query // group, h * group + query % group


@compiled
def _read_queries(p: Pointer, item: Pointer, h: int, s: Pointer, scale: Float32, activation: Float32) -> None:
    """Bring the scaled queries and their positions into lanes; lanes that are left over repeat the last position."""
    d, wide = p[HEAD_DIM], round_up(p[HEAD_DIM], LANES)
    q, lanes, positions = pointer_like(p[Q], activation), WIDTH * wide, _positions(wide)
    fill(s, 0, np.float32(0), WIDTH * wide)
    for lane in range(WIDTH):
        token, head = _query(p, item, h, min(lane, item[COUNT] - 1))
        s[positions + lane] = np.float32(item[POSITION] + token - item[TOKEN])
        if lane < item[COUNT]:
            copy_scaled(q, token * p[Q_STRIDE] + head * d, scale, s, lane * wide, d)
    for first in range(0, WIDTH, LANES):
        for i in range(0, wide, LANES):
            transpose(s, first * wide + i, wide, s, lanes + i * WIDTH + first, WIDTH)


@compiled
def _positions(wide: int) -> int:
    return (3 * WIDTH + 2 * KEYS) * wide + KEYS * WIDTH


@compiled
def _read_rows(
    p: Pointer, item: Pointer, h: int, first: int, n: int, cache: int, s: Pointer, to: int, cached: Float32
) -> None:
    """Copy the n rows of KV head h from the token at `first` on, as float32, to rows of whole registers."""
    d, block, wide = p[HEAD_DIM], p[BLOCK], round_up(p[HEAD_DIM], LANES)
    rows = pointer_like(cache, cached)
    table = i32_at(p[TABLES] + 4 * item[ROW] * p[TABLE_STRIDE])
    position = first
    while position < first + n:
        count = min(block - position % block, first + n - position)
        at = ((np.int64(table[position // block]) * p[KV_HEADS] + h) * block + position % block) * d
        for row in range(count):
            here, there, i = at + row * d, to + (position - first + row) * wide, 0
            while i + LANES <= d:
                store(s, there + i, load(rows, here + i))
                i += LANES
            copy_scaled(rows, here + i, np.float32(1), s, there + i, d - i)
        position += count


@compiled
def _hide(p: Pointer, s: Pointer, positions: int, scores: int, first: int, n: int) -> None:
    """Take the scores of keys that a lane does not see out of the comparison."""
    for j in range(n):
        key = np.float32(first + j)
        last = key + np.float32(p[WINDOW] - 1) if p[WINDOW] > 0 else EVER
        for v in range(0, WIDTH, LANES):
            at = scores + j * WIDTH + v
            store(s, at, keep_between(load(s, at), splat(key), load(s, positions + v), splat(last), HIDDEN))


@compiled
def _weigh(s: Pointer, scores: int, n: int, largest: int, sums: int, results: int, wide: int, lane: int) -> None:
    """Turn n scores of sixteen lanes into weights; what was summed before is scaled down to the new largest score."""
    before = load(s, largest + lane)
    m = before
    for j in range(n):
        m = maximum(load(s, scores + j * WIDTH + lane), m)
    total = splat(np.float32(0))
    one = splat(np.float32(1))
    for j in range(n):
        weight = exp_lanes(load(s, scores + j * WIDTH + lane), m)
        store(s, scores + j * WIDTH + lane, weight)
        total = fma(one, weight, total)
    factor = exp_lanes(before, m)
    store(s, largest + lane, m)
    store(s, sums + lane, fma(load(s, sums + lane), factor, total))
    for i in range(wide):
        store(s, results + i * WIDTH + lane, times(load(s, results + i * WIDTH + lane), factor))


@compiled
def _attend(arguments: int, unit: int, s: Pointer, activation: Float32, cached: Float32) -> None:
    """Do one KV head of one item."""
    p = i64_at(arguments)
    item, h = i64_at(p[ITEMS] + unit // p[KV_HEADS] * ITEM_FIELDS * BYTES), unit % p[KV_HEADS]
    d, wide = p[HEAD_DIM], round_up(p[HEAD_DIM], LANES)
    queries, results, scores = WIDTH * wide, 2 * WIDTH * wide, 3 * WIDTH * wide
    keys, values, positions = scores + KEYS * WIDTH, scores + KEYS * WIDTH + KEYS * wide, _positions(wide)
    largest, sums = positions + WIDTH, positions + 2 * WIDTH
    scale, cap = np.float32(f64_at(arguments)[SCALE]), np.float32(f64_at(arguments)[SOFTCAP])
    _read_queries(p, item, h, s, scale, activation)
    fill(s, results, np.float32(0), wide * WIDTH)
    fill(s, largest, EMPTY, WIDTH)
    fill(s, sums, np.float32(0), WIDTH)
    group = p[HEADS] // p[KV_HEADS]
    oldest = item[POSITION] + item[FIRST] // group
    newest = item[POSITION] + (item[FIRST] + item[COUNT] - 1) // group
    first = max(0, oldest - p[WINDOW] + 1) // KEYS * KEYS if p[WINDOW] > 0 else 0
    while first <= newest:
        n = min(KEYS, newest + 1 - first)
        _read_rows(p, item, h, first, n, p[K_CACHE], s, keys, cached)
        _read_rows(p, item, h, first, n, p[V_CACHE], s, values, cached)
        for j in range(0, n, ROWS):
            set_product(s, keys + j * wide, wide, 1, s, queries, WIDTH, d, s, scores + j * WIDTH, WIDTH)
        if cap > 0:
            cap_numbers(s, scores, n * WIDTH, cap)
        if first + n - 1 > oldest or (p[WINDOW] > 0 and first <= newest - p[WINDOW]):
            _hide(p, s, positions, scores, first, n)
        for lane in range(0, WIDTH, LANES):
            _weigh(s, scores, n, largest, sums, results, wide, lane)
        for i in range(0, d, ROWS):
            add_product(s, values + i, 1, wide, s, scores, WIDTH, n, s, results + i * WIDTH, WIDTH)
        first += n
    _write_results(p, item, h, s, results, sums, activation)


@compiled
def _write_results(p: Pointer, item: Pointer, h: int, s: Pointer, results: int, sums: int, activation: Float32) -> None:
    """Divide by the sums and bring the results from lanes to where they belong."""
    d, wide = p[HEAD_DIM], round_up(p[HEAD_DIM], LANES)
    out = pointer_like(p[OUT], activation)
    for first in range(0, WIDTH, LANES):
        for i in range(0, wide, LANES):
            transpose(s, results + i * WIDTH + first, WIDTH, s, first * wide + i, wide)
    for lane in range(item[COUNT]):
        token, head = _query(p, item, h, lane)
        copy_scaled(s, lane * wide, np.float32(1) / s[sums + lane], out, (token * p[HEADS] + head) * d, d)


@compiled
def _run(arguments: int, activation: Float32, cached: Float32) -> None:
    """Take units until none is left; `activation` and `cached` only carry types."""
    p = i64_at(arguments)
    s = f32_at(p[SCRATCH] + p[SCRATCH_SIZE] * atomic_add(arguments + NEXT_TICKET * BYTES, 1))
    unit = atomic_add(arguments + NEXT_UNIT * BYTES, 1)
    while unit < p[NUM_ITEMS] * p[KV_HEADS]:
        _attend(arguments, unit, s, activation, cached)
        unit = atomic_add(arguments + NEXT_UNIT * BYTES, 1)


def _attend_f32_f32(arguments: int) -> None:
    _run(arguments, np.float32(0), np.float32(0))


def _attend_f32_bf16(arguments: int) -> None:
    _run(arguments, np.float32(0), np.uint16(0))


def _attend_bf16_bf16(arguments: int) -> None:
    _run(arguments, np.uint16(0), np.uint16(0))


_VARIANTS = {
    (torch.float32, torch.float32): _attend_f32_f32,
    (torch.float32, torch.bfloat16): _attend_f32_bf16,
    (torch.bfloat16, torch.bfloat16): _attend_bf16_bf16,
}


@functools.cache
def chunk_kernel(activation: torch.dtype, cached: torch.dtype) -> Kernel:
    """Return the kernel for these dtypes, which `cpu_kernel` must know; compiled as that one is."""
    return Kernel(_VARIANTS[activation, cached], NUM_ARGUMENTS)
