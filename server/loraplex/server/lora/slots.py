"""Which adapters' weights are on the device, within a budget of bytes.

An adapter is loaded and packed by a background thread and installed at a step boundary by the engine thread, so that
neither a slow disk nor a broken file holds up a step. Idle adapters leave in least-recently-used order; those that a
running row uses or that are pinned stay. All methods but the loader run on the engine thread.

Knows digests, bytes and slots; nothing about names, requests or queues.
"""

from __future__ import annotations

import logging
import queue
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from loraplex.server.engine.scheduler import Residency
from loraplex.server.engine.stats import SlotStats
from loraplex.server.errors import EngineError, LoraplexError, ResourceExhaustedError
from loraplex.server.lora.weights import PackedAdapter

logger = logging.getLogger(__name__)

MAX_LOADS_AHEAD = 4
"""Adapters that are being loaded or wait for room at one time; they are beside the budget until they are installed."""

AdapterLoader = Callable[[str], PackedAdapter]
"""Reads the weights of a digest and packs them for the device; runs on a background thread."""


@dataclass
class _Entry:
    slot: int
    packed: PackedAdapter
    rows: int = 0
    doomed: bool = False
    """No name points at it any more: it goes with its last row."""


class SlotPool:
    """The resident adapters; one slot number each, at most `capacity_bytes` together."""

    def __init__(self, loader: AdapterLoader, capacity_bytes: int, on_load: Callable[[], None] = lambda: None) -> None:
        """Start empty; `on_load` is called on the background thread when a load has ended, to wake the engine.

        Raises:
            ValueError: if `capacity_bytes` is negative.
        """
        if capacity_bytes < 0:
            raise ValueError(f"capacity_bytes must not be negative, got {capacity_bytes}")
        self._loader = loader
        self._on_load = on_load
        self._capacity = capacity_bytes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._by_slot: dict[int, PackedAdapter] = {}
        self._loading: set[str] = set()
        self._outdated: set[str] = set()  # forgotten while loading: what that load brings is not used
        self._ready: dict[str, PackedAdapter] = {}  # loaded, waiting for room
        self._failures: dict[str, LoraplexError] = {}
        self._wanted: set[str] = set()  # asked for since the last poll
        self._done: queue.SimpleQueue[tuple[str, Future[PackedAdapter]]] = queue.SimpleQueue()
        self._pins: set[str] = set()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-load")
        self._loads = 0
        self._evictions = 0
        self._next_slot = 0
        self.revision = 0
        """Changes whenever an adapter comes or goes."""

    @property
    def slots(self) -> Mapping[int, PackedAdapter]:
        """The resident weights by slot number."""
        return self._by_slot

    @property
    def resident(self) -> frozenset[str]:
        """Digests of the resident adapters."""
        return frozenset(self._entries)

    @property
    def used_bytes(self) -> int:
        """Bytes of the resident weights."""
        return sum(entry.packed.nbytes for entry in self._entries.values())

    @property
    def stats(self) -> SlotStats:
        """The pool's figures now."""
        return SlotStats(len(self._entries), self.used_bytes, self._capacity, self._loads, self._evictions)

    def slot_of(self, digest: str) -> int:
        """Return the slot number of a resident adapter.

        Raises:
            KeyError: if it is not resident, which the scheduler rules out.
        """
        return self._entries[digest].slot

    def require(self, digest: str) -> Residency:
        """Say where the adapter is; begin to load it if it is nowhere."""
        if digest in self._entries:
            self._entries.move_to_end(digest)
            self._entries[digest].doomed = False
            return Residency.RESIDENT
        if digest in self._failures:
            return Residency.FAILED
        self._wanted.add(digest)
        if digest in self._ready:
            return self._install(digest)
        if digest not in self._loading and len(self._loading) + len(self._ready) < MAX_LOADS_AHEAD:
            self._load(digest)
        return Residency.LOADING

    def failure(self, digest: str) -> LoraplexError:
        """Return and forget why loading failed, so that the next `require` tries again."""
        return self._failures.pop(digest)

    def retain(self, digest: str) -> None:
        """Keep a resident adapter while one more row uses it."""
        self._entries[digest].rows += 1

    def release(self, digest: str) -> None:
        """Undo one `retain`."""
        entry = self._entries[digest]
        assert entry.rows > 0, f"{digest} is released more often than retained"
        entry.rows -= 1
        if entry.doomed and entry.rows == 0:
            self._drop(digest)

    def pin(self, digest: str) -> None:
        """Never evict this adapter, once it is resident, until `unpin`; begin to load it."""
        self._pins.add(digest)
        if digest not in self._entries and digest not in self._ready and digest not in self._loading:
            self._load(digest)

    def unpin(self, digest: str) -> None:
        """Let the adapter go like any other."""
        self._pins.discard(digest)

    def forget(self, digest: str) -> None:
        """Drop an adapter that no name points at any more, as soon as no row uses it."""
        self._pins.discard(digest)
        self._ready.pop(digest, None)
        self._failures.pop(digest, None)
        if digest in self._loading:
            self._outdated.add(digest)
        entry = self._entries.get(digest)
        if entry is None:
            return
        entry.doomed = True
        if entry.rows == 0:
            self._drop(digest)

    def poll(self) -> bool:
        """Take over what the background thread has finished; return whether anything came.

        What nobody has asked for since the last poll is dropped: a request may have gone while its adapter loaded or
        failed to load.
        """
        came = False
        self._failures.clear()
        for digest in self._ready.keys() - self._wanted - self._pins:
            del self._ready[digest]
        self._wanted.clear()
        while True:
            try:
                digest, future = self._done.get_nowait()
            except queue.Empty:
                return came
            came = True
            self._loading.discard(digest)
            self._take(digest, future)

    def close(self) -> None:
        """Stop the background thread after the load it is at."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def check_integrity(self) -> None:
        """Check budget, slots and counts against each other.

        Raises:
            AssertionError: naming what disagrees.
        """
        assert self.used_bytes <= self._capacity, f"{self.used_bytes} bytes in a budget of {self._capacity}"
        assert {e.slot: e.packed for e in self._entries.values()} == dict(self._by_slot), "slots and entries differ"
        assert all(entry.rows >= 0 for entry in self._entries.values()), "a negative row count"
        assert not self._loading & set(self._entries), "resident and loading at once"

    def _load(self, digest: str) -> None:
        self._loading.add(digest)
        future = self._executor.submit(self._loader, digest)
        future.add_done_callback(lambda done: self._report(digest, done))

    def _report(self, digest: str, future: Future[PackedAdapter]) -> None:
        self._done.put((digest, future))
        self._on_load()

    def _take(self, digest: str, future: Future[PackedAdapter]) -> None:
        if digest in self._outdated:
            # Its file may have been deleted under the load; whoever wants it again gets a load of its own.
            self._outdated.discard(digest)
            if digest in self._pins:
                self._load(digest)
            return
        if future.cancelled():
            return
        error = future.exception()
        if error is None:
            self._ready[digest] = future.result()
            self._install(digest)
        elif isinstance(error, LoraplexError):
            self._failures[digest] = error
        else:
            logger.error("loading adapter %s failed", digest, exc_info=error)
            self._failures[digest] = EngineError(f"adapter {digest} could not be loaded: {error}")

    def _install(self, digest: str) -> Residency:
        packed = self._ready[digest]
        pinned = sum(entry.packed.nbytes for d, entry in self._entries.items() if d in self._pins)
        if packed.nbytes + pinned > self._capacity:
            del self._ready[digest]
            self._failures[digest] = ResourceExhaustedError(
                f"adapter {digest} needs {packed.nbytes} bytes of the adapter device memory, of which pinned ones "
                f"hold {pinned} of {self._capacity} bytes. Unpin one, or raise --adapter-device-memory"
            )
            if digest in self._pins:
                logger.warning("%s", self._failures[digest])
            return Residency.FAILED
        if not self._make_room(packed.nbytes):
            return Residency.NO_ROOM
        del self._ready[digest]
        self._entries[digest] = _Entry(self._next_slot, packed)
        self._by_slot[self._next_slot] = packed
        self._next_slot += 1
        self._loads += 1
        self.revision += 1
        return Residency.RESIDENT

    def _make_room(self, nbytes: int) -> bool:
        """Evict idle adapters until `nbytes` fit; evict none if that would not be enough."""
        missing = self.used_bytes + nbytes - self._capacity
        victims: list[str] = []
        for digest, entry in self._entries.items():
            if missing <= 0:
                break
            if entry.rows == 0 and digest not in self._pins:
                victims.append(digest)
                missing -= entry.packed.nbytes
        if missing > 0:
            return False
        for digest in victims:
            self._drop(digest)
            self._evictions += 1
        return True

    def _drop(self, digest: str) -> None:
        del self._by_slot[self._entries.pop(digest).slot]
        self.revision += 1
