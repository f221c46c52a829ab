"""The inner loops of low-rank products, for one token or for several that meet the same thin matrix.

For one token each row is walked from end to end, which memory's own prefetchers follow best. For several, rows are
walked side by side so that sums stay in registers; prefetchers cannot follow that, so those loops ask for a cache line
from `ahead` on for every line that they read. A result is summed in one order, whatever the number of tokens beside it.

Tokens' numbers, float32, are in the order of `load_two` for the matrix that they meet, filled up with zeros to a
multiple of STEP; sums over columns are in that order too.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from loraplex.server.native.intrinsics import CACHE_LINE, item_bytes, prefetch
from loraplex.server.native.simd import LANES, add, fma, load, load_two, load_two_of, splat, store, total, totals4
from loraplex.server.native.vector import Float32, Pointer, inlined

STEP = 2 * LANES
TOKENS = 4  # that `dots_of_four` takes
ROWS = 4  # that `add_four_rows` takes

Lanes: TypeAlias = Any
Four: TypeAlias = tuple[Lanes, Lanes, Lanes, Lanes]


@inlined
def _load(w: Pointer, at: int, left: int) -> tuple[Lanes, Lanes]:
    two: tuple[Lanes, Lanes] = load_two(w, at) if left >= STEP else load_two_of(w, at, left)
    return two


@inlined
def _ask_for_two_rows(ahead: int, like: Pointer) -> None:
    """Prefetch as much as a step over two rows of what `like` points to reads."""
    prefetch(ahead)
    prefetch(ahead + CACHE_LINE)
    if item_bytes(like) == 4:
        prefetch(ahead + 2 * CACHE_LINE)
        prefetch(ahead + 3 * CACHE_LINE)


@inlined
def dot(w: Pointer, row: int, x: Pointer, at: int, n: int) -> Float32:
    """Return w[row:] . x[at:] over n numbers."""
    a = b = splat(np.float32(0))
    for k in range(0, n, STEP):
        v, u = _load(w, row + k, n - k)
        a = fma(v, load(x, at + k), a)
        b = fma(u, load(x, at + k + LANES), b)
    return total(add(a, b))


@inlined
def _load4(x: Pointer, at: int, stride: int) -> Four:
    return load(x, at), load(x, at + stride), load(x, at + 2 * stride), load(x, at + 3 * stride)


@inlined
def _fma4(v: Lanes, x: Four, sums: Four) -> Four:
    return fma(v, x[0], sums[0]), fma(v, x[1], sums[1]), fma(v, x[2], sums[2]), fma(v, x[3], sums[3])


@inlined
def _totals(a: Four, b: Four) -> tuple[Float32, Float32, Float32, Float32]:
    sums: tuple[Float32, Float32, Float32, Float32] = totals4(
        add(a[0], b[0]), add(a[1], b[1]), add(a[2], b[2]), add(a[3], b[3])
    )
    return sums


@inlined
def dots_of_four(
    w: Pointer, row: int, second: int, x: Pointer, at: int, stride: int, n: int, ahead: int
) -> tuple[tuple[Float32, Float32, Float32, Float32], tuple[Float32, Float32, Float32, Float32]]:
    """Return w[row:] and w[second:] times TOKENS tokens' numbers, `stride` apart, each as `dot` sums it."""
    zero = splat(np.float32(0))
    a = b = c = d = (zero, zero, zero, zero)
    for k in range(0, n, STEP):
        x0, x1 = _load4(x, at + k, stride), _load4(x, at + k + LANES, stride)
        _ask_for_two_rows(ahead + 2 * k * item_bytes(w), w)
        v, u = _load(w, row + k, n - k)
        a, b = _fma4(v, x0, a), _fma4(u, x1, b)
        v, u = _load(w, second + k, n - k)
        c, d = _fma4(v, x0, c), _fma4(u, x1, d)
    return _totals(a, b), _totals(c, d)


@inlined
def set_row(w: Pointer, row: int, h: Float32, sums: Pointer, at: int, n: int) -> None:
    """Set sums[at:] to h * w[row:] over n numbers."""
    factor, zero = splat(h), splat(np.float32(0))
    for k in range(0, n, STEP):
        v, u = _load(w, row + k, n - k)
        store(sums, at + k, fma(factor, v, zero))
        store(sums, at + k + LANES, fma(factor, u, zero))


@inlined
def add_row(w: Pointer, row: int, h: Float32, sums: Pointer, at: int, n: int) -> None:
    """Add h * w[row:] to sums[at:] over n numbers."""
    factor = splat(h)
    for k in range(0, n, STEP):
        v, u = _load(w, row + k, n - k)
        store(sums, at + k, fma(factor, v, load(sums, at + k)))
        store(sums, at + k + LANES, fma(factor, u, load(sums, at + k + LANES)))


@inlined
def add_four_rows(
    w: Pointer,
    row: int,
    width: int,
    h: Pointer,
    at: int,
    rank: int,
    sums: Pointer,
    stride: int,
    tokens: int,
    n: int,
    ahead: int,
) -> None:
    """Add four rows of w, `width` apart from w[row:] on, times h[at:] to n sums of each token, as `add_row` would.

    Tokens' factors lie `rank` apart and their sums `stride`.
    """
    for k in range(0, n, STEP):
        _ask_for_two_rows(ahead + 4 * k * item_bytes(w), w)
        _ask_for_two_rows(ahead + 4 * k * item_bytes(w) + 2 * STEP * item_bytes(w), w)
        here = row + k
        v0, u0 = _load(w, here, n - k)
        v1, u1 = _load(w, here + width, n - k)
        v2, u2 = _load(w, here + 2 * width, n - k)
        v3, u3 = _load(w, here + 3 * width, n - k)
        for token in range(tokens):
            of, to = at + token * rank, token * stride + k
            h0, h1, h2, h3 = splat(h[of]), splat(h[of + 1]), splat(h[of + 2]), splat(h[of + 3])
            a, b = load(sums, to), load(sums, to + LANES)
            store(sums, to, fma(h3, v3, fma(h2, v2, fma(h1, v1, fma(h0, v0, a)))))
            store(sums, to + LANES, fma(h3, u3, fma(h2, u2, fma(h1, u1, fma(h0, u0, b)))))
