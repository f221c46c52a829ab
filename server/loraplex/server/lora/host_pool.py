"""Which adapters' weights are in the host's memory, within a budget of bytes.

The tier between disk and device: what left the device is here for the next request, and what a request will soon need
can be read ahead. Full, it lets go of what was used least recently, except of what is held because it waits for room
on the device. Thread-safe. Knows digests and bytes; nothing about slots, rows or files.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict

from loraplex.server.engine.stats import TierStats
from loraplex.server.lora.weights import PackedAdapter


def pinned_nbytes(nbytes: int) -> int:
    """Return what a block of `nbytes` of pinned memory takes: PyTorch's allocator rounds it up to a power of two.

    Source: `CachingHostAllocator` in PyTorch, which keeps such blocks so that any of them serves many sizes.
    """
    return 1 << (nbytes - 1).bit_length() if nbytes else 0


class HostPool:
    """The adapters in host memory, at most `capacity_bytes` together."""

    def __init__(self, capacity_bytes: int, *, pinned: bool = False) -> None:
        """Start empty; `pinned` says that the adapters' memory is, as it is for a GPU.

        Raises:
            ValueError: if `capacity_bytes` is negative.
        """
        if capacity_bytes < 0:
            raise ValueError(f"capacity_bytes must not be negative, got {capacity_bytes}")
        self.capacity_bytes = capacity_bytes
        self._pinned = pinned
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, PackedAdapter] = OrderedDict()  # least recently used first
        self._holds: Counter[str] = Counter()
        self._used = 0
        self._peak = 0
        self._loads = 0
        self._evictions = 0

    @property
    def digests(self) -> frozenset[str]:
        """Digests of the adapters that are here."""
        with self._lock:
            return frozenset(self._entries)

    @property
    def held_bytes(self) -> int:
        """Bytes that no eviction can bring."""
        with self._lock:
            return self._held_bytes()

    @property
    def stats(self) -> TierStats:
        """The pool's figures now."""
        with self._lock:
            return TierStats(
                len(self._entries), self._used, self._peak, self.capacity_bytes, self._loads, self._evictions
            )

    def size_of(self, nbytes: int) -> int:
        """Return the bytes that an adapter of `nbytes` takes, or would take, here."""
        return pinned_nbytes(nbytes) if self._pinned else nbytes

    def nbytes(self, digest: str) -> int:
        """Return the bytes that an adapter takes here; 0 if it is not here."""
        with self._lock:
            packed = self._entries.get(digest)
            return 0 if packed is None else self.size_of(packed.nbytes)

    def get(self, digest: str) -> PackedAdapter | None:
        """Return an adapter's weights if they are here, and count that as a use."""
        with self._lock:
            packed = self._entries.get(digest)
            if packed is not None:
                self._entries.move_to_end(digest)
            return packed

    def put(self, packed: PackedAdapter) -> bool:
        """Keep weights that came from the disk, if they fit beside what is held; return whether they do.

        What has to leave for them does; if that would not be enough, nothing does.
        """
        with self._lock:
            self._loads += 1
            self._remove(packed.digest)
            size = self.size_of(packed.nbytes)
            if size + self._held_bytes() > self.capacity_bytes:
                return False
            self._evict(self._used + size - self.capacity_bytes)
            self._entries[packed.digest] = packed
            self._used += size
            self._peak = max(self._peak, self._used)
            return True

    def hold(self, digest: str) -> None:
        """Keep an adapter, if it is here, until as many calls of `let_go`."""
        with self._lock:
            if digest in self._entries:
                self._holds[digest] += 1

    def let_go(self, digest: str) -> None:
        """Undo one `hold`; nothing happens for an adapter that is not held."""
        with self._lock:
            if self._holds[digest] <= 1:
                del self._holds[digest]
            else:
                self._holds[digest] -= 1

    def forget(self, digest: str) -> int:
        """Drop an adapter, held or not; return the bytes that came free."""
        with self._lock:
            return self._remove(digest)

    def check_integrity(self) -> None:
        """Check budget, sum and holds against the entries.

        Raises:
            AssertionError: naming what disagrees.
        """
        with self._lock:
            assert self._used == sum(self.size_of(packed.nbytes) for packed in self._entries.values()), "the sum is off"
            assert self._used <= self._peak <= self.capacity_bytes, f"{self._used}, at most {self._peak} bytes"
            assert self._holds.keys() <= self._entries.keys(), "something is held that is not here"
            assert all(count > 0 for count in self._holds.values()), "a hold without a holder"

    def _held_bytes(self) -> int:
        return sum(self.size_of(self._entries[digest].nbytes) for digest in self._holds)

    def _evict(self, missing: int) -> None:
        if missing <= 0:
            return
        for digest in [digest for digest in self._entries if digest not in self._holds]:
            missing -= self._remove(digest)
            self._evictions += 1
            if missing <= 0:
                return

    def _remove(self, digest: str) -> int:
        packed = self._entries.pop(digest, None)
        if packed is None:
            return 0
        del self._holds[digest]
        size = self.size_of(packed.nbytes)
        self._used -= size
        return size
