"""The compiled part of CPU attention: reads the paged cache where it lies, through the block table.

Three phases, each after the end of the one before: write the new keys and values into the cache; for each query, KV
head and part of the context, the softmax-weighted sum of the values (the query heads that share a KV head together, so
that a key comes from memory once); put the parts of long contexts together. Parts begin at multiples of PART tokens of
the context, so a query's result depends on its own context alone, not on the batch or the number of threads. Dividing
long contexts is the idea of Flash-Decoding (Dao et al., 2023).
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from loraplex.server.native.intrinsics import (
    CACHE_LINE,
    atomic_add,
    atomic_load,
    f32_at,
    f64_at,
    i32_at,
    i64_at,
    pointer_like,
    prefetch,
)
from loraplex.server.native.team import Kernel
from loraplex.server.native.vector import (
    Float32,
    Pointer,
    axpy,
    cap_numbers,
    compiled,
    compiled_without_nan,
    copy_scaled,
    dot,
    dot4,
    exp,
    fill,
    weighted_rows,
)

# The argument block, eight bytes each: int64, but for two floats. Every call writes the first ones and zeroes the
# counters, which lie on cache lines of their own because all threads write them; the rest is written once a step.
Q, Q_STRIDE, K, K_STRIDE, V, V_STRIDE, OUT, K_CACHE, V_CACHE, HEADS, KV_HEADS, HEAD_DIM, BLOCK, WINDOW = range(14)
SCALE, SOFTCAP = 14, 15
CALL_INTEGERS, CALL_FLOATS = 14, 2
NEXT_TICKET, NEXT_UNIT, DONE, LINE_WORDS, STEP_FIELDS = 16, 24, 48, 8, 72
COUNTER_BYTES = 8 * (STEP_FIELDS - CALL_INTEGERS - CALL_FLOATS)
NUM_TOKENS, SLOTS, NUM_QUERIES, QUERIES, NUM_ITEMS, ITEMS, TABLES, TABLE_STRIDE, PARTIALS = range(72, 81)
DIVIDED, ITEM_SIZE, SCRATCH, SCRATCH_SIZE, SUMS, SCORES, BUFFER = range(81, 88)  # the last four in bytes
NUM_ARGUMENTS = 88

# A thread's scratch holds, in float32: the group's queries (group, d), at SUMS their results (group, d), at SCORES
# (group, PART), and at BUFFER a block's keys or values (block, d). An item's partials are (heads, d + 2): sums, largest
# score, total of the exponentials.
# One query: its token, its context (the tokens up to and with itself), its row in the block tables, the number of parts
# of its context and the index of its first item. An item is one part: its query and its number among that one's parts.
TOKEN, CONTEXT, ROW, PARTS, FIRST_ITEM = range(5)
QUERY_FIELDS, ITEM_FIELDS = 5, 2

PART = 256  # tokens
EMPTY = np.float32(-1e30)  # the maximum of no scores
BYTES = 8


@compiled
def _write(new: Pointer, at: int, cache: Pointer, slot: int, p: Pointer) -> None:
    """Copy one token's heads to its slot in the cache."""
    d, block = p[HEAD_DIM], p[BLOCK]
    first = (slot // block * p[KV_HEADS] * block + slot % block) * d
    for h in range(p[KV_HEADS]):
        copy_scaled(new, at + h * d, np.float32(1), cache, first + h * block * d, d)


@compiled
def _scores(q: Pointer, at: int, keys: Pointer, d: int, n: int, scores: Pointer, to: int) -> None:
    """Set scores[to:to + n] = q[at:] . key for n keys that lie one after the other."""
    j = 0
    while j + 4 <= n:
        s0, s1, s2, s3 = dot4(q, at, keys, j * d, d, d)
        scores[to + j] = s0
        scores[to + j + 1] = s1
        scores[to + j + 2] = s2
        scores[to + j + 3] = s3
        j += 4
    while j < n:
        scores[to + j] = dot(q, at, keys, j * d, d)
        j += 1


@compiled_without_nan
def _maximum(scores: Pointer, at: int, n: int) -> Float32:
    m = EMPTY
    for i in range(n):
        m = max(m, scores[at + i])
    return m


@compiled
def _exponentials(scores: Pointer, at: int, n: int, m: Float32) -> Float32:
    """Replace s by exp(s - m) and return the sum."""
    total = np.float32(0)
    for i in range(n):
        e = exp(scores[at + i] - m)
        scores[at + i] = e
        total += e
    return total


@compiled
def _rows(p: Pointer, query: Pointer, h: int, position: int, cache: int) -> int:
    """Return the address in `cache` of the rows of KV head h from the token at `position` to the end of its block."""
    block = p[BLOCK]
    number = np.int64(i32_at(p[TABLES] + 4 * query[ROW] * p[TABLE_STRIDE])[position // block])
    address: int = cache + ((number * p[KV_HEADS] + h) * block + position % block) * p[HEAD_DIM] * p[ITEM_SIZE]
    return address


@compiled
def _prefetch(p: Pointer, query: Pointer, h: int, position: int, end: int, cache: int, share: int, shares: int) -> None:
    """Ask for a share of the rows of the block that begins at `position`.

    Every block is a new place in memory, which the machine's own prefetchers cannot foresee. Asking for it in shares,
    between the work on the block before, keeps the queue of memory requests short (measured: 20 % faster than at once).
    """
    if position < end:
        address, size = _rows(p, query, h, position, cache), p[BLOCK] * p[HEAD_DIM] * p[ITEM_SIZE]
        for line in range(size * share // shares, size * (share + 1) // shares, CACHE_LINE):
            prefetch(address + line)


@compiled
def _as_f32(p: Pointer, address: int, n: int, buffer: int, cached: Float32) -> Pointer:
    """Return n rows as float32: where they are, or widened into `buffer`, once for all heads of the group."""
    if p[ITEM_SIZE] == 4:
        return f32_at(address)
    copy_scaled(pointer_like(address, cached), 0, np.float32(1), f32_at(buffer), 0, n * p[HEAD_DIM])
    return f32_at(buffer)


@compiled
def _score_blocks(p: Pointer, query: Pointer, h: int, first: int, end: int, scratch: int, cached: Float32) -> None:
    """Set the group's scores for the tokens first:end, block by block."""
    d, group, block = p[HEAD_DIM], p[HEADS] // p[KV_HEADS], p[BLOCK]
    q, scores, buffer = f32_at(scratch), f32_at(scratch + p[SCORES]), scratch + p[BUFFER]
    position = first
    while position < end:
        n = min(block - position % block, end - position)
        keys = _as_f32(p, _rows(p, query, h, position, p[K_CACHE]), n, buffer, cached)
        for g in range(group):
            _prefetch(p, query, h, position + n, end, p[K_CACHE], g, group)
            _scores(q, g * d, keys, d, n, scores, g * PART + position - first)
        position += n


@compiled
def _add_blocks(p: Pointer, query: Pointer, h: int, first: int, end: int, scratch: int, cached: Float32) -> None:
    """Set the group's sums to the values of the tokens first:end, weighted with what the scores have become."""
    d, group, block = p[HEAD_DIM], p[HEADS] // p[KV_HEADS], p[BLOCK]
    sums, scores, buffer = f32_at(scratch + p[SUMS]), f32_at(scratch + p[SCORES]), scratch + p[BUFFER]
    fill(sums, 0, np.float32(0), group * d)
    position = first
    while position < end:
        n = min(block - position % block, end - position)
        values = _as_f32(p, _rows(p, query, h, position, p[V_CACHE]), n, buffer, cached)
        for g in range(group):
            _prefetch(p, query, h, position + n, end, p[V_CACHE], g, group)
            weighted_rows(values, 0, d, scores, g * PART + position - first, n, sums, g * d, d)
        position += n


@compiled
def _attend(arguments: int, unit: int, scratch: int, activation: Float32, cached: Float32) -> None:
    """Do one KV head of one item: scores, their exponentials, and the values weighted with these."""
    p = i64_at(arguments)
    index, h, d, group = unit // p[KV_HEADS], unit % p[KV_HEADS], p[HEAD_DIM], p[HEADS] // p[KV_HEADS]
    item = i64_at(p[ITEMS] + index * ITEM_FIELDS * BYTES)
    query = i64_at(p[QUERIES] + item[0] * QUERY_FIELDS * BYTES)
    first, end = item[1] * PART, min(query[CONTEXT], (item[1] + 1) * PART)
    if p[WINDOW] > 0:
        first = min(end, max(first, query[CONTEXT] - p[WINDOW]))
    sums, scores = f32_at(scratch + p[SUMS]), f32_at(scratch + p[SCORES])
    scale, cap = np.float32(f64_at(arguments)[SCALE]), np.float32(f64_at(arguments)[SOFTCAP])
    _prefetch(p, query, h, first, end, p[K_CACHE], 0, 1)
    head = query[TOKEN] * p[Q_STRIDE] + h * group * d
    copy_scaled(pointer_like(p[Q], activation), head, scale, f32_at(scratch), 0, group * d)
    _score_blocks(p, query, h, first, end, scratch, cached)
    _prefetch(p, query, h, first, end, p[V_CACHE], 0, 1)
    partials = f32_at(p[PARTIALS] + 4 * (index * p[HEADS] + h * group) * (d + 2))
    for g in range(group):
        if cap > 0:
            cap_numbers(scores, g * PART, end - first, cap)
        m = _maximum(scores, g * PART, end - first)
        partials[g * (d + 2) + d] = m
        partials[g * (d + 2) + d + 1] = _exponentials(scores, g * PART, end - first, m)
    _add_blocks(p, query, h, first, end, scratch, cached)
    for g in range(group):
        if query[PARTS] == 1:
            total, to = partials[g * (d + 2) + d + 1], (query[TOKEN] * p[HEADS] + h * group + g) * d
            copy_scaled(sums, g * d, np.float32(1) / total, pointer_like(p[OUT], activation), to, d)
        else:
            copy_scaled(sums, g * d, np.float32(1), partials, g * (d + 2), d)


@compiled
def _combine(arguments: int, unit: int, scratch: int, activation: Float32) -> None:
    """Put the parts of one query head together."""
    p = i64_at(arguments)
    index, head, d = unit // p[HEADS], unit % p[HEADS], p[HEAD_DIM]
    query = i64_at(p[QUERIES] + index * QUERY_FIELDS * BYTES)
    if query[PARTS] == 1:
        return
    partials, sums = f32_at(p[PARTIALS]), f32_at(scratch)
    largest, total = EMPTY, np.float32(0)
    for part in range(query[PARTS]):
        largest = max(largest, partials[((query[FIRST_ITEM] + part) * p[HEADS] + head) * (d + 2) + d])
    fill(sums, 0, np.float32(0), d)
    for part in range(query[PARTS]):
        at = ((query[FIRST_ITEM] + part) * p[HEADS] + head) * (d + 2)
        weight = exp(partials[at + d] - largest)
        total += weight * partials[at + d + 1]
        axpy(partials, at, weight, sums, 0, d)
    out = pointer_like(p[OUT], activation)
    copy_scaled(sums, 0, np.float32(1) / total, out, (query[TOKEN] * p[HEADS] + head) * d, d)


@compiled
def _unit(arguments: int, phase: int, unit: int, scratch: int, activation: Float32, cached: Float32) -> None:
    p = i64_at(arguments)
    if phase == 0:
        slot = i64_at(p[SLOTS])[unit]
        _write(pointer_like(p[K], activation), unit * p[K_STRIDE], pointer_like(p[K_CACHE], cached), slot, p)
        _write(pointer_like(p[V], activation), unit * p[V_STRIDE], pointer_like(p[V_CACHE], cached), slot, p)
    elif phase == 1:
        _attend(arguments, unit, scratch, activation, cached)
    else:
        _combine(arguments, unit, scratch, activation)


@compiled
def _run(arguments: int, activation: Float32, cached: Float32) -> None:
    """Take units until none is left, phase by phase; `activation` and `cached` only carry types."""
    p = i64_at(arguments)
    scratch = p[SCRATCH] + p[SCRATCH_SIZE] * atomic_add(arguments + NEXT_TICKET * BYTES, 1)
    units = (p[NUM_TOKENS], p[NUM_ITEMS] * p[KV_HEADS], p[DIVIDED] * p[NUM_QUERIES] * p[HEADS])
    for phase in range(3):
        while phase > 0 and atomic_load(arguments + (DONE + (phase - 1) * LINE_WORDS) * BYTES) < units[phase - 1]:
            pass
        counter = arguments + (NEXT_UNIT + phase * LINE_WORDS) * BYTES
        unit = atomic_add(counter, 1)
        while unit < units[phase]:
            _unit(arguments, phase, unit, scratch, activation, cached)
            atomic_add(arguments + (DONE + phase * LINE_WORDS) * BYTES, 1)
            unit = atomic_add(counter, 1)


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
def attention_kernel(activation: torch.dtype, cached: torch.dtype) -> Kernel:
    """Return the kernel for these dtypes, compiled when a process first asks and finds none on disk.

    Raises:
        ValueError: unless both are float32, or both bfloat16, or the cache alone is bfloat16.
    """
    if (activation, cached) not in _VARIANTS:
        raise ValueError(f"no CPU attention for activations of {activation} with a cache of {cached}")
    return Kernel(_VARIANTS[activation, cached], NUM_ARGUMENTS)
