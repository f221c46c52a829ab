"""Brings adapters where they are needed: disk -> host pool -> device slots.

Background threads load from the disk into the host pool; the engine thread installs from there on the device, at a step
boundary, so that neither a slow disk nor a broken file holds up a step. Where the device is the CPU, both tiers hold
the same memory. All methods are for the engine thread unless they say otherwise.

Knows digests and bytes; nothing about names, requests or queues.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Set

import torch

from loraplex.server.engine.scheduler import Residency
from loraplex.server.engine.stats import AdapterMemory, FreedMemory, LoadStats, MemoryStats
from loraplex.server.errors import LoraplexError, ResourceExhaustedError
from loraplex.server.lora.device_copies import DeviceCopies
from loraplex.server.lora.host_pool import HostPool
from loraplex.server.lora.loads import MAX_LOADS, AdapterLoader, AdapterLoads, Loaded
from loraplex.server.lora.slots import SlotPool
from loraplex.server.lora.weights import PackedAdapter

logger = logging.getLogger(__name__)

MAX_PREFETCHES = max(1, MAX_LOADS - 1)
"""Of the loads at one time; what could be used at once always finds one left."""
PREFETCH_SHARE = 0.5
"""Of the host pool, for adapters that no request can use yet."""


class AdapterTiers:
    """Both tiers of the adapter memory and the loads into them; what the scheduler sees as `AdapterSlots`."""

    def __init__(
        self,
        loader: AdapterLoader,
        device_bytes: int,
        host_bytes: int = 0,
        *,
        device: torch.device | None = None,
        copies: DeviceCopies | None = None,
        on_load: Callable[[], None] = lambda: None,
    ) -> None:
        """Start empty, for the CPU unless told otherwise; `copies` brings adapters to the device, by default at once.

        `on_load` is called on a background thread when a load has ended, to wake the engine.

        Raises:
            ValueError: if a budget is negative.
        """
        self._device = SlotPool(device_bytes, device or torch.device("cpu"), copies)
        self._host = HostPool(host_bytes, pinned=self._device.device.type != "cpu")
        self._loads = AdapterLoads(loader, on_load)
        self._ready: dict[str, PackedAdapter] = {}  # loaded and asked for, waiting for room; held in the host pool
        self._failures: dict[str, LoraplexError] = {}
        self._wanted: set[str] = set()  # asked for since the last poll
        self._prefetches: set[str] = set()  # loads under way for what could not be used at once
        self._pinning: set[str] = set()  # pinned and still to be brought onto the device
        self._load_stats: list[LoadStats] = []
        self._sizes: dict[str, int] = {}  # in bytes, of every adapter that was loaded once
        self._latest_size = 0
        self.revision = 0
        """Changes whenever an adapter comes or goes, in either tier."""

    @property
    def slots(self) -> Mapping[int, PackedAdapter]:
        """The resident weights by slot number."""
        return self._device.slots

    @property
    def resident(self) -> frozenset[str]:
        """Digests of the adapters on the device; may be read from any thread."""
        return self._device.resident

    @property
    def held(self) -> frozenset[str]:
        """Digests of the adapters in either tier; may be read from any thread."""
        return self._device.resident | self._host.digests

    @property
    def stats(self) -> MemoryStats:
        """Both tiers' figures now."""
        shared = sum(map(self._host.nbytes, self._device.resident)) if self._device.device.type == "cpu" else 0
        return MemoryStats(self._device.stats, self._host.stats, shared)

    def memory(self, digest: str) -> AdapterMemory:
        """Return what an adapter takes of the two budgets now; may be called from any thread."""
        return AdapterMemory(self._device.nbytes(digest), self._host.nbytes(digest))

    def slot_of(self, digest: str) -> int:
        """Return the slot number of a resident adapter.

        Raises:
            KeyError: if it is not resident, which the scheduler rules out.
        """
        return self._device.slot_of(digest)

    def require(self, digest: str) -> Residency:
        """Say where an adapter is; bring it onto the device if it is in the host's memory, else begin to load it."""
        if digest in self._device:
            self._device.touch(digest)
            self._host.get(digest)
            return self._residency(digest)
        if digest in self._failures:
            return Residency.FAILED
        self._wanted.add(digest)
        self._prefetches.discard(digest)
        packed = self._find(digest)
        if packed is not None:
            return self._install(packed)
        if len(self._ready) < MAX_LOADS:
            self._loads.start(digest)
        return Residency.LOADING

    def prefetch(self, digest: str) -> Residency:
        """Say where an adapter is that cannot be used yet, and begin to load it into the host's memory.

        What is asked for again and again in this way, up to `PREFETCH_SHARE`, does not leave before it is used.
        """
        if digest in self._device:
            self._device.touch(digest)
            return self._residency(digest)
        if digest in self._failures:
            return Residency.FAILED
        self._wanted.add(digest)
        if self._find(digest) is not None:
            return Residency.NO_ROOM
        if digest not in self._loads and self._may_prefetch() and self._loads.start(digest, MAX_PREFETCHES):
            self._prefetches.add(digest)
        return Residency.LOADING

    def failure(self, digest: str) -> LoraplexError:
        """Return and forget why loading failed, so that the next `require` tries again."""
        return self._failures.pop(digest)

    def retain(self, digest: str) -> None:
        """Keep a resident adapter while one more row uses it."""
        self._device.retain(digest)

    def release(self, digest: str) -> None:
        """Undo one `retain`."""
        self._device.release(digest)

    def pin(self, digest: str) -> None:
        """Bring an adapter onto the device and do not evict it until `unpin`."""
        self._device.pin(digest)
        self._pinning.add(digest)
        self._bring_pinned()

    def unpin(self, digest: str) -> None:
        """Let the adapter go like any other."""
        self._device.unpin(digest)
        self._pinning.discard(digest)

    def forget(self, digest: str) -> FreedMemory:
        """Drop an adapter that no row uses from both tiers; return the bytes that came free of each budget."""
        self.unpin(digest)
        self._failures.pop(digest, None)
        self._loads.discard(digest)
        self._prefetches.discard(digest)
        self._sizes.pop(digest, None)
        self._drop_ready(digest)
        self.revision += 1
        return FreedMemory(self._device.forget(digest), self._host.forget(digest))

    def poll(self) -> bool:
        """Take over what the background threads have finished; return whether anything came.

        What nobody has asked for since the last poll goes: a request may have left while its adapter was loaded, could
        not be loaded, or waited for room.
        """
        wanted, self._wanted = self._wanted | self._device.pins, set()
        self._failures.clear()
        for digest in self._ready.keys() - wanted:
            self._drop_ready(digest)
        loaded = self._loads.collect()
        for each in loaded:
            self._take(each, wanted)
        self._bring_pinned()
        return bool(loaded)

    def take_load_stats(self) -> list[LoadStats]:
        """Return how long each load since the last call took."""
        taken, self._load_stats = self._load_stats, []
        return taken

    def close(self) -> None:
        """Stop the background threads after the loads they are at."""
        self._loads.close()
        self._device.close()

    def check_integrity(self) -> None:
        """Check both tiers, and what is between them.

        Raises:
            AssertionError: naming what disagrees.
        """
        self._device.check_integrity()
        self._host.check_integrity()
        resident = self._device.resident
        assert not any(digest in self._loads for digest in resident), "resident and loading at once"
        assert not self._ready.keys() & resident, "resident and waiting for room at once"
        waiting = sum(self._host.size_of(packed.nbytes) for packed in self._ready.values())
        assert self._host.held_bytes <= waiting, "held for nobody"

    def _residency(self, digest: str) -> Residency:
        """Say whether what is on the device is all there."""
        return Residency.RESIDENT if self._device.has_arrived(digest) else Residency.LOADING

    def _find(self, digest: str) -> PackedAdapter | None:
        return self._ready.get(digest) or self._host.get(digest)

    def _may_prefetch(self) -> bool:
        """Whether all that is wanted now fits; what was never loaded counts as much as the largest of the others."""
        room = PREFETCH_SHARE * self._host.capacity_bytes - self._host.held_bytes
        sizes = (self._sizes.get(digest) for digest in self._wanted)
        known = [self._host.size_of(size) for size in sizes if size is not None]
        guess = max(known, default=self._host.size_of(self._latest_size))
        return sum(known) + guess * (len(self._wanted) - len(known)) <= room

    def _bring_pinned(self) -> None:
        """Install what is pinned and not resident as far as there is room, and load it if it is nowhere.

        What has no room beside the other pins waits until one of them goes, and is not loaded again meanwhile.
        """
        for digest in tuple(self._pinning):
            if digest in self._device:
                self._pinning.discard(digest)
            elif not self._fits_beside_pins(self._sizes.get(digest, 0)):
                continue
            elif (packed := self._find(digest)) is None:
                self._loads.start(digest)
            elif self._install(packed) is not Residency.NO_ROOM:
                self._pinning.discard(digest)

    def _fits_beside_pins(self, nbytes: int) -> bool:
        return nbytes + self._device.pinned_bytes <= self._device.capacity_bytes

    def _take(self, loaded: Loaded, wanted: Set[str]) -> None:
        digest, packed = loaded.digest, loaded.result
        usable = digest in wanted and digest not in self._prefetches
        self._prefetches.discard(digest)
        if isinstance(packed, LoraplexError):
            self._failures[digest] = packed
            if digest in self._pinning:
                self._pinning.discard(digest)
                logger.warning("the pinned adapter %s cannot be loaded: %s", digest, packed)
            return
        self._load_stats.append(LoadStats("host", loaded.seconds))
        self._sizes[digest] = self._latest_size = packed.nbytes
        self._host.put(packed)
        self.revision += 1
        if usable:
            self._host.hold(digest)
            self._ready[digest] = packed
            if self._install(packed) is Residency.FAILED and digest in self._pinning:
                logger.warning("the pinned adapter %s is not on the device: %s", digest, self._failures[digest])
                if self._fits_beside_pins(packed.nbytes):  # the device refused it
                    self._pinning.discard(digest)

    def _install(self, packed: PackedAdapter) -> Residency:
        digest = packed.digest
        if not self._fits_beside_pins(packed.nbytes):
            pinned = self._device.pinned_bytes
            self._drop_ready(digest)
            self._failures[digest] = ResourceExhaustedError(
                f"adapter {digest} needs {packed.nbytes} bytes of the adapter device memory, of which pinned ones "
                f"hold {pinned} of {self._device.capacity_bytes} bytes. Unpin one, or raise --adapter-device-memory"
            )
            return Residency.FAILED
        start = time.monotonic()
        try:
            if not self._device.install(packed):
                return Residency.NO_ROOM
        except LoraplexError as error:
            self._drop_ready(digest)
            self._failures[digest] = error
            self.revision += 1  # others may have left in vain
            return Residency.FAILED
        self._load_stats.append(LoadStats("device", time.monotonic() - start))
        self._drop_ready(digest)
        self.revision += 1
        return self._residency(digest)

    def _drop_ready(self, digest: str) -> None:
        if self._ready.pop(digest, None) is not None:
            self._host.let_go(digest)
