"""The inner loops of the CPU kernels: dot products and sums over rows that lie anywhere in memory.

A row is a pointer and an offset in elements. Rows called `w` or `x` may be float32 or bfloat16 (uint16 bits); `sums`
and all arithmetic are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
from numba import njit

from loraplex.server.native.intrinsics import bits_to_f32, narrow, widen
from loraplex.server.native.lane_math import exp_of_difference
from loraplex.server.native.simd import LANES, fma, load, splat, store, total, totals4

Pointer: TypeAlias = Any
Float32: TypeAlias = Any

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Compile with leave to reorder sums; NaN and infinity keep their meaning."""
    return _compile(function, {"reassoc", "contract", "nsz"})


def compiled_without_nan(function: _Function) -> _Function:
    """Compile on the promise that no argument is NaN; needed for a maximum to vectorise."""
    return _compile(function, {"reassoc", "contract", "nsz", "nnan"})


def inlined(function: _Function) -> _Function:
    """As `compiled`, and always made part of the caller: for what is called for every few numbers."""
    return _compile(function, {"reassoc", "contract", "nsz"}, forceinline=True)


def _inlined_in_order(function: _Function) -> _Function:
    """As `inlined`, without leave to reorder anything."""
    return _compile(function, {"contract"}, forceinline=True)


def _compile(function: _Function, fastmath: set[str], *, forceinline: bool = False) -> _Function:
    """Compile for use by other compiled code only: without the wrappers for Python this takes half the time."""
    jit: Any = njit
    options = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True, "forceinline": forceinline}
    return cast(_Function, jit(fastmath=fastmath, **options)(function))


_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)  # few bits, so that its product with a small integer is exact
_LN2_LOW = np.float32(-2.12194440e-4)
_EXP_MIN = np.float32(-87.0)
_EXP_MAX = np.float32(88.0)


@inlined
def dot(w: Pointer, row: int, x: Pointer, at: int, n: int) -> Float32:
    """Return w[row:] . x[at:] over n elements."""
    a = b = c = d = splat(np.float32(0))
    i = 0
    while i + 4 * LANES <= n:
        a = fma(load(w, row + i), load(x, at + i), a)
        b = fma(load(w, row + i + LANES), load(x, at + i + LANES), b)
        c = fma(load(w, row + i + 2 * LANES), load(x, at + i + 2 * LANES), c)
        d = fma(load(w, row + i + 3 * LANES), load(x, at + i + 3 * LANES), d)
        i += 4 * LANES
    while i + LANES <= n:
        a = fma(load(w, row + i), load(x, at + i), a)
        i += LANES
    one = splat(np.float32(1))
    s = total(fma(one, fma(one, a, b), fma(one, c, d)))
    while i < n:
        s += widen(w[row + i]) * widen(x[at + i])
        i += 1
    return s


@inlined
def dot4(w: Pointer, row: int, x: Pointer, at: int, stride: int, n: int) -> tuple[Float32, Float32, Float32, Float32]:
    """Return the dot products of one row of `w` with four rows of `x`; each `w` is read and widened once."""
    second, third, fourth = at + stride, at + 2 * stride, at + 3 * stride
    a = b = c = d = splat(np.float32(0))
    i = 0
    while i + LANES <= n:
        v = load(w, row + i)
        a = fma(v, load(x, at + i), a)
        b = fma(v, load(x, second + i), b)
        c = fma(v, load(x, third + i), c)
        d = fma(v, load(x, fourth + i), d)
        i += LANES
    s0, s1, s2, s3 = totals4(a, b, c, d)
    while i < n:
        u = widen(w[row + i])
        s0 += u * widen(x[at + i])
        s1 += u * widen(x[second + i])
        s2 += u * widen(x[third + i])
        s3 += u * widen(x[fourth + i])
        i += 1
    return s0, s1, s2, s3


@inlined
def axpy(w: Pointer, row: int, h: Float32, sums: Pointer, at: int, n: int) -> None:
    """Add h * w[row:] to sums[at:] over n elements."""
    factor, i = splat(h), 0
    while i + LANES <= n:
        store(sums, at + i, fma(factor, load(w, row + i), load(sums, at + i)))
        i += LANES
    while i < n:
        sums[at + i] += h * widen(w[row + i])
        i += 1


@inlined
def weighted_rows(
    w: Pointer, row: int, stride: int, h: Pointer, h_at: int, rows: int, sums: Pointer, at: int, n: int
) -> None:
    """Add the sum of h[h_at + j] * w[row + j * stride:] over j < rows to sums[at:], n elements.

    The sums stay in registers while j runs, so the rows had better be in the first-level cache.
    """
    i = 0
    while i + 4 * LANES <= n:
        a, b = load(sums, at + i), load(sums, at + i + LANES)
        c, d = load(sums, at + i + 2 * LANES), load(sums, at + i + 3 * LANES)
        for j in range(rows):
            factor, here = splat(h[h_at + j]), row + j * stride + i
            a = fma(factor, load(w, here), a)
            b = fma(factor, load(w, here + LANES), b)
            c = fma(factor, load(w, here + 2 * LANES), c)
            d = fma(factor, load(w, here + 3 * LANES), d)
        store(sums, at + i, a)
        store(sums, at + i + LANES, b)
        store(sums, at + i + 2 * LANES, c)
        store(sums, at + i + 3 * LANES, d)
        i += 4 * LANES
    if i < n:
        for j in range(rows):
            axpy(w, row + j * stride + i, h[h_at + j], sums, at + i, n - i)


@inlined
def round_up(n: int, multiple: int) -> int:
    """Return the next multiple from n on."""
    return (n + multiple - 1) // multiple * multiple


@inlined
def fill(x: Pointer, at: int, value: Float32, n: int) -> None:
    """Set n elements."""
    for i in range(n):
        x[at + i] = value


@inlined
def copy_scaled(source: Pointer, at: int, factor: Float32, to: Pointer, to_at: int, n: int) -> None:
    """Set to[to_at:] = factor * source[at:] over n elements, each side float32 or bfloat16."""
    for i in range(n):
        to[to_at + i] = narrow(widen(source[at + i]) * factor, to[to_at + i])


@_inlined_in_order
def exp(x: Float32) -> Float32:
    """Return e**x in float32 to about two units in the last place; Cephes' polynomial, without branches or calls.

    The library's function would be called once for each element; this vectorises. x is clamped to [-87, 88].
    """
    z = min(max(x, _EXP_MIN), _EXP_MAX)
    n = np.floor(z * _LOG2_E + np.float32(0.5))
    r = (z - n * _LN2_HIGH) - n * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    return p * bits_to_f32((np.int32(n) + np.int32(127)) << np.int32(23))


@_inlined_in_order
def exp_lanes(a: Any, b: Any) -> Any:
    """Return e**(a - b) of sixteen differences that are not positive, to about two units in the last place.

    0 below e**-87. Here, because leave to reorder sums would cost it its precision.
    """
    return exp_of_difference(a, b)


@_inlined_in_order
def tanh(x: Float32) -> Float32:
    """Return the hyperbolic tangent in float32; Cephes' polynomial where 1 - 2 / (e**2x + 1) would cancel."""
    square = x * x
    p = np.float32(-5.70498872745e-3)
    p = p * square + np.float32(2.06390887954e-2)
    p = p * square - np.float32(5.37397155531e-2)
    p = p * square + np.float32(1.33314422036e-1)
    p = p * square - np.float32(3.33332819422e-1)
    near_zero = p * square * x + x
    away = np.float32(1) - np.float32(2) / (exp(np.float32(2) * x) + np.float32(1))
    return near_zero if square < np.float32(0.390625) else away


@compiled
def cap_numbers(x: Pointer, at: int, n: int, cap: Float32) -> None:
    """Replace n numbers x by cap * tanh(x / cap)."""
    for i in range(n):
        x[at + i] = cap * tanh(x[at + i] / cap)
