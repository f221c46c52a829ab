"""The compiled part of what a CPU does between matrix products: norms, rotation, gates.

PyTorch needs eight calls for a norm with its addition and five for a rotation, each a few microseconds whatever the
size; at 16 rows of a small model they add up to a tenth of a decode step. Here each is one pass over memory, computed
in float32 and rounded once. A token's result does not depend on the others or on the number of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch

from loraplex.server.native.intrinsics import atomic_add, f32_at, i64_at, narrow, pointer_like, widen
from loraplex.server.native.team import Kernel
from loraplex.server.native.vector import Float32, Pointer, compiled, exp

# The argument blocks, an int64 each. The counter, which all threads write, lies on a cache line of its own.
ROWS = 0
NEXT_ROWS, NUM_ARGUMENTS = 16, 24
# The norm: out = rms(x + delta) * weight, and x + delta stored in x; no delta at address 0.
X, DELTA, OUT, WEIGHT, EPS, SIZE = range(1, 7)
# The rotation, in place, of `HEADS` heads of each row; a row of angles is HALF cosines and HALF sines.
QK, ROW_STRIDE, HEADS, HEAD_DIM, HALF, ANGLES = range(1, 7)
# The gate: out = activation(x[:, :n]) * x[:, n:].
GATE_X, GATE_OUT, WIDTH, IS_GELU = range(1, 5)

ROWS_AT_ONCE = 4
BYTES = 8  # of an int64


@compiled
def _sigmoid(x: Float32) -> Float32:
    value = np.float32(1) / (np.float32(1) + exp(-x))
    return value if x > np.float32(-87) else np.float32(0)


@compiled
def _take_rows(arguments: int) -> int:
    """Return the first of the next rows to do."""
    taken: int = atomic_add(arguments + NEXT_ROWS * BYTES, 1)
    return ROWS_AT_ONCE * taken


@compiled
def _norm_row(p: Pointer, at: int, like: Float32) -> None:
    n, weight, eps = p[SIZE], f32_at(p[WEIGHT]), f32_at(p[EPS])[0]
    x, delta, out = pointer_like(p[X], like), pointer_like(p[DELTA], like), pointer_like(p[OUT], like)
    if p[DELTA] != 0:
        for i in range(n):
            x[at + i] = narrow(widen(x[at + i]) + widen(delta[at + i]), like)
    squares = np.float32(0)
    for i in range(n):
        squares += widen(x[at + i]) * widen(x[at + i])
    scale = np.float32(1) / np.sqrt(squares / np.float32(n) + eps)
    for i in range(n):
        out[at + i] = narrow(widen(x[at + i]) * scale * weight[i], like)


@compiled
def _norm(arguments: int, like: Float32) -> None:
    """Take rows until none is left; the value of `like` does not matter, its type is that of activations."""
    p = i64_at(arguments)
    first = _take_rows(arguments)
    while first < p[ROWS]:
        for row in range(first, min(first + ROWS_AT_ONCE, p[ROWS])):
            _norm_row(p, row * p[SIZE], like)
        first = _take_rows(arguments)


@compiled
def _rotate_head(qk: Pointer, a: int, angles: Pointer, cos: int, half: int, like: Float32) -> None:
    b, sin = a + half, cos + half
    for i in range(half):
        u, v = widen(qk[a + i]), widen(qk[b + i])
        qk[a + i] = narrow(u * angles[cos + i] - v * angles[sin + i], like)
        qk[b + i] = narrow(v * angles[cos + i] + u * angles[sin + i], like)


@compiled
def _rotate(arguments: int, like: Float32) -> None:
    p = i64_at(arguments)
    qk, angles, half = pointer_like(p[QK], like), f32_at(p[ANGLES]), p[HALF]
    first = _take_rows(arguments)
    while first < p[ROWS]:
        for row in range(first, min(first + ROWS_AT_ONCE, p[ROWS])):
            for head in range(p[HEADS]):
                _rotate_head(qk, row * p[ROW_STRIDE] + head * p[HEAD_DIM], angles, 2 * row * half, half, like)
        first = _take_rows(arguments)


@compiled
def _silu_row(x: Pointer, gate: int, up: int, out: Pointer, at: int, n: int, like: Float32) -> None:
    for i in range(n):
        g = widen(x[gate + i])
        out[at + i] = narrow(g * _sigmoid(g) * widen(x[up + i]), like)


@compiled
def _gelu_row(x: Pointer, gate: int, up: int, out: Pointer, at: int, n: int, like: Float32) -> None:
    """The tanh form: 0.5 (1 + tanh(z)) = sigmoid(2 z), with z = sqrt(2 / pi) (g + 0.044715 g^3)."""
    for i in range(n):
        g = widen(x[gate + i])
        z = np.float32(1.5957691216057308) * (g + np.float32(0.044715) * g * g * g)
        out[at + i] = narrow(g * _sigmoid(z) * widen(x[up + i]), like)


@compiled
def _gate(arguments: int, like: Float32) -> None:
    p = i64_at(arguments)
    x, out, n = pointer_like(p[GATE_X], like), pointer_like(p[GATE_OUT], like), p[WIDTH]
    first = _take_rows(arguments)
    while first < p[ROWS]:
        for row in range(first, min(first + ROWS_AT_ONCE, p[ROWS])):
            if p[IS_GELU]:
                _gelu_row(x, 2 * n * row, 2 * n * row + n, out, n * row, n, like)
            else:
                _silu_row(x, 2 * n * row, 2 * n * row + n, out, n * row, n, like)
        first = _take_rows(arguments)


def _norm_f32(arguments: int) -> None:
    _norm(arguments, np.float32(0))


def _norm_bf16(arguments: int) -> None:
    _norm(arguments, np.uint16(0))


def _rotate_f32(arguments: int) -> None:
    _rotate(arguments, np.float32(0))


def _rotate_bf16(arguments: int) -> None:
    _rotate(arguments, np.uint16(0))


def _gate_f32(arguments: int) -> None:
    _gate(arguments, np.float32(0))


def _gate_bf16(arguments: int) -> None:
    _gate(arguments, np.uint16(0))


_VARIANTS: dict[tuple[str, torch.dtype], Callable[[int], None]] = {
    ("norm", torch.float32): _norm_f32,
    ("norm", torch.bfloat16): _norm_bf16,
    ("rotate", torch.float32): _rotate_f32,
    ("rotate", torch.bfloat16): _rotate_bf16,
    ("gate", torch.float32): _gate_f32,
    ("gate", torch.bfloat16): _gate_bf16,
}


@functools.cache
def pointwise_kernel(name: str, dtype: torch.dtype) -> Kernel:
    """Return the kernel "norm", "rotate" or "gate" for activations of `dtype`: float32 or bfloat16.

    Compiled when a process first asks and finds nothing in Numba's cache.
    """
    return Kernel(_VARIANTS[name, dtype], NUM_ARGUMENTS)
