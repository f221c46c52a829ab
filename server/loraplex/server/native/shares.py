"""How threads divide the units of a kernel: each has a share of its own, and takes from the others' after that.

Units of a share lie one after the other, so a thread walks through memory from end to end and the machine's prefetchers
keep up with it; a thread that comes late, or not at all, costs nothing but its help.
"""

from __future__ import annotations

from loraplex.server.native.intrinsics import CACHE_LINE, atomic_add
from loraplex.server.native.vector import compiled

MOST_SHARES = 8
WORDS = 8 * MOST_SHARES  # of int64 counters, zero at the start: each on a cache line of its own


@compiled
def take(counters: int, units: int, shares: int, own: int) -> int:
    """Return the next of `units` units, or -1 if all are taken.

    Args:
        counters: address of WORDS int64.
        units: how many there are.
        shares: into how many they are divided, at most MOST_SHARES; the same number in all calls.
        own: number of the calling thread, from 0 up.
    """
    for i in range(shares):
        share = (own + i) % shares
        start, end = units * share // shares, units * (share + 1) // shares
        unit: int = start + atomic_add(counters + CACHE_LINE * share, 1)
        if unit < end:
            return unit
    return -1
