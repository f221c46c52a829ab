"""The compiled part of what a CPU does between matrix products: norms, rotation, gates.

PyTorch needs eight calls for a norm with its addition and five for a rotation, each a few microseconds whatever the
size; at 16 rows of a small model they add up to a tenth of a decode step. Here each is one pass over memory, computed
in float32 and rounded once. A token's result does not depend on the others or on the number of threads.
"""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import numpy as np
from numba import njit

from loraplex.server.native.intrinsics import (
    FAST_SUMS,
    atomic_add,
    bits_to_f32,
    f32_at,
    i64_at,
    narrow,
    u16_at,
    widen,
)
from loraplex.server.native.team import Kernel

# The argument blocks, an int64 each. All begin with these; the counter lies on a cache line of its own.
ROWS, IS_BF16 = range(2)
NEXT_ROWS, NUM_ARGUMENTS = 16, 24
# The norm: out = rms(x + delta) * weight, and x + delta stored in x; no delta at address 0.
X, DELTA, OUT, WEIGHT, EPS, SIZE = range(2, 8)
# The rotation, in place, of `HEADS` heads of each row.
QK, ROW_STRIDE, HEADS, HEAD_DIM, HALF, COS, SIN = range(2, 9)
# The gate: out = activation(x[:, :n]) * x[:, n:].
GATE_X, GATE_OUT, WIDTH, IS_GELU = range(2, 6)

ROWS_AT_ONCE = 4
BYTES = 8  # of an int64

Pointer: TypeAlias = Any

_compiled = njit(error_model="numpy", fastmath=FAST_SUMS)


@_compiled
def _exp(x: Any) -> Any:
    """Return e^x for x in -87..88, within 2 units in the last place.

    x = n ln 2 + r with |r| <= ln 2 / 2; a polynomial for e^r (Cephes expf), n goes into the exponent's bits.
    """
    n = np.float32(np.int32(x * np.float32(1.44269504) + (np.float32(0.5) if x >= 0 else np.float32(-0.5))))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    e = p * r * r + r + np.float32(1)
    return e * bits_to_f32((np.int32(n) + np.int32(127)) << np.int32(23))


@_compiled
def _sigmoid(x: Any) -> Any:
    value = np.float32(1) / (np.float32(1) + _exp(min(max(-x, np.float32(-87)), np.float32(88))))
    return value if x > np.float32(-88) else np.float32(0)


@_compiled
def _norm_rows(x: Pointer, delta: Pointer, out: Pointer, p: Pointer, first: int, end: int) -> None:
    n, weight, eps, adds = p[SIZE], f32_at(p[WEIGHT]), f32_at(p[EPS])[0], p[DELTA] != 0
    for row in range(first, end):
        at = row * n
        if adds:
            for i in range(n):
                x[at + i] = narrow(widen(x[at + i]) + widen(delta[at + i]), x[at + i])
        squares = np.float32(0)
        for i in range(n):
            squares += widen(x[at + i]) * widen(x[at + i])
        scale = np.float32(1) / np.sqrt(squares / np.float32(n) + eps)
        for i in range(n):
            out[at + i] = narrow(widen(x[at + i]) * scale * weight[i], out[at + i])


@_compiled
def _rotate_rows(qk: Pointer, p: Pointer, first: int, end: int) -> None:
    half, cos, sin = p[HALF], f32_at(p[COS]), f32_at(p[SIN])
    for row in range(first, end):
        for head in range(p[HEADS]):
            a = row * p[ROW_STRIDE] + head * p[HEAD_DIM]
            b, angle = a + half, row * half
            for i in range(half):
                u, v = widen(qk[a + i]), widen(qk[b + i])
                qk[a + i] = narrow(u * cos[angle + i] - v * sin[angle + i], qk[a + i])
                qk[b + i] = narrow(v * cos[angle + i] + u * sin[angle + i], qk[b + i])


@_compiled
def _gate_rows(x: Pointer, out: Pointer, p: Pointer, first: int, end: int) -> None:
    n = p[WIDTH]
    for row in range(first, end):
        gate, up, at = 2 * n * row, 2 * n * row + n, n * row
        if p[IS_GELU]:
            for i in range(n):
                g = widen(x[gate + i])
                # tanh(z) = 2 sigmoid(2 z) - 1, so 0.5 (1 + tanh(z)) = sigmoid(2 z)
                z = np.float32(1.5957691216057308) * (g + np.float32(0.044715) * g * g * g)
                out[at + i] = narrow(g * _sigmoid(z) * widen(x[up + i]), out[at + i])
        else:
            for i in range(n):
                g = widen(x[gate + i])
                out[at + i] = narrow(g * _sigmoid(g) * widen(x[up + i]), out[at + i])


@_compiled
def _take_rows(arguments: int) -> int:
    """Return the first of the next rows to do."""
    return ROWS_AT_ONCE * atomic_add(arguments + NEXT_ROWS * BYTES, 1)


def _norm(arguments: int) -> None:
    p = i64_at(arguments)
    first = _take_rows(arguments)
    while first < p[ROWS]:
        end = min(first + ROWS_AT_ONCE, p[ROWS])
        if p[IS_BF16]:
            _norm_rows(u16_at(p[X]), u16_at(p[DELTA]), u16_at(p[OUT]), p, first, end)
        else:
            _norm_rows(f32_at(p[X]), f32_at(p[DELTA]), f32_at(p[OUT]), p, first, end)
        first = _take_rows(arguments)


def _rotate(arguments: int) -> None:
    p = i64_at(arguments)
    first = _take_rows(arguments)
    while first < p[ROWS]:
        end = min(first + ROWS_AT_ONCE, p[ROWS])
        if p[IS_BF16]:
            _rotate_rows(u16_at(p[QK]), p, first, end)
        else:
            _rotate_rows(f32_at(p[QK]), p, first, end)
        first = _take_rows(arguments)


def _gate(arguments: int) -> None:
    p = i64_at(arguments)
    first = _take_rows(arguments)
    while first < p[ROWS]:
        end = min(first + ROWS_AT_ONCE, p[ROWS])
        if p[IS_BF16]:
            _gate_rows(u16_at(p[GATE_X]), u16_at(p[GATE_OUT]), p, first, end)
        else:
            _gate_rows(f32_at(p[GATE_X]), f32_at(p[GATE_OUT]), p, first, end)
        first = _take_rows(arguments)


@functools.cache
def norm_kernel() -> Kernel:
    """Return the kernel, compiled on the first call in a process that finds nothing in Numba's cache."""
    return Kernel(_norm)


@functools.cache
def rotate_kernel() -> Kernel:
    """Return the kernel; see `norm_kernel`."""
    return Kernel(_rotate)


@functools.cache
def gate_kernel() -> Kernel:
    """Return the kernel; see `norm_kernel`."""
    return Kernel(_gate)
