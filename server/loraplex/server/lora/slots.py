"""Which adapters' weights are on the device, within a budget of bytes.

Idle adapters leave in least-recently-used order; those that a running row uses or that are pinned stay. Only the engine
thread changes anything here, at step boundaries. Knows digests, bytes and slots; nothing about where weights come from.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from loraplex.server.engine.stats import TierStats
from loraplex.server.errors import EngineError, ResourceExhaustedError
from loraplex.server.lora.device_copies import Arrival, DeviceCopies, DirectCopies
from loraplex.server.lora.weights import PackedAdapter

logger = logging.getLogger(__name__)


@dataclass
class _Entry:
    slot: int
    arrival: Arrival
    rows: int = 0

    @property
    def packed(self) -> PackedAdapter:
        return self.arrival.packed


class SlotPool:
    """The resident adapters; one slot number each, at most `capacity_bytes` together."""

    def __init__(self, capacity_bytes: int, device: torch.device, copies: DeviceCopies | None = None) -> None:
        """Start empty; `copies` brings adapters to the device, by default at once.

        Raises:
            ValueError: if `capacity_bytes` is negative.
        """
        if capacity_bytes < 0:
            raise ValueError(f"capacity_bytes must not be negative, got {capacity_bytes}")
        self.capacity_bytes = capacity_bytes
        self.device = device
        self._copies = copies or DirectCopies(device)
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._by_slot: dict[int, PackedAdapter] = {}
        self._pins: set[str] = set()
        self._used = 0
        self._peak = 0
        self._installs = 0
        self._evictions = 0
        self._next_slot = 0

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    @property
    def slots(self) -> Mapping[int, PackedAdapter]:
        """The resident weights by slot number."""
        return self._by_slot

    @property
    def resident(self) -> frozenset[str]:
        """Digests of the resident adapters; may be read from any thread."""
        return frozenset(self._entries)

    @property
    def pins(self) -> frozenset[str]:
        """Digests of the adapters that must not leave, here or still to come."""
        return frozenset(self._pins)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the pinned adapters that are here."""
        return sum(self._entries[digest].packed.nbytes for digest in self._pins & self._entries.keys())

    @property
    def stats(self) -> TierStats:
        """The pool's figures now."""
        return TierStats(
            len(self._entries), self._used, self._peak, self.capacity_bytes, self._installs, self._evictions
        )

    def nbytes(self, digest: str) -> int:
        """Return the bytes that an adapter takes here, 0 if it is not here; may be called from any thread."""
        entry = self._entries.get(digest)
        return 0 if entry is None else entry.packed.nbytes

    def slot_of(self, digest: str) -> int:
        """Return the slot number of a resident adapter.

        Raises:
            KeyError: if it is not resident, which the scheduler rules out.
        """
        return self._entries[digest].slot

    def has_arrived(self, digest: str) -> bool:
        """Whether the weights of an adapter that was installed are there, so that rows may use it."""
        return self._entries[digest].arrival.done()

    def touch(self, digest: str) -> None:
        """Count a use of a resident adapter."""
        self._entries.move_to_end(digest)

    def install(self, packed: PackedAdapter) -> bool:
        """Bring an adapter that is not here onto the device; return False, with nothing changed, if there is no room.

        Others leave for it as far as they may and must. On a GPU the weights `has_arrived` some time later.

        Raises:
            ResourceExhaustedError: if the budget has room but the device has no memory, whatever idle ones leave.
            EngineError: if the device refuses the copy for another reason.
        """
        if not self._make_room(packed.nbytes):
            return False
        self._entries[packed.digest] = entry = _Entry(self._next_slot, self._moved(packed))
        self._by_slot[entry.slot] = entry.packed
        self._next_slot += 1
        self._installs += 1
        self._used += entry.packed.nbytes
        self._peak = max(self._peak, self._used)
        return True

    def retain(self, digest: str) -> None:
        """Keep a resident adapter, whose weights have arrived, while one more row uses it."""
        self._entries[digest].rows += 1

    def release(self, digest: str) -> None:
        """Undo one `retain`."""
        entry = self._entries[digest]
        assert entry.rows > 0, f"{digest} is released more often than retained"
        entry.rows -= 1

    def pin(self, digest: str) -> None:
        """Never evict this adapter, once it is here, until `unpin`."""
        self._pins.add(digest)

    def unpin(self, digest: str) -> None:
        """Let the adapter go like any other."""
        self._pins.discard(digest)

    def close(self) -> None:
        """End the copies' background work."""
        self._copies.close()

    def forget(self, digest: str) -> int:
        """Drop an adapter that no row uses, if it is here, and its pin; return the bytes that came free."""
        self._pins.discard(digest)
        return self._drop(digest) if digest in self._entries else 0

    def check_integrity(self) -> None:
        """Check budget, slots and counts against each other.

        Raises:
            AssertionError: naming what disagrees.
        """
        assert self._used == sum(entry.packed.nbytes for entry in self._entries.values()), "the sum is off"
        assert self._used <= self._peak <= self.capacity_bytes, f"{self._used}, at most {self._peak} bytes"
        assert {e.slot: e.packed for e in self._entries.values()} == dict(self._by_slot), "slots and entries differ"
        assert all(entry.arrival.done() for entry in self._entries.values() if entry.rows), "used before it arrived"
        assert all(entry.rows >= 0 for entry in self._entries.values()), "a negative row count"

    def _make_room(self, nbytes: int) -> bool:
        """Evict idle adapters until `nbytes` fit; evict none if that would not be enough."""
        missing = self._used + nbytes - self.capacity_bytes
        victims: list[str] = []
        for digest in self._idle():
            if missing <= 0:
                break
            victims.append(digest)
            missing -= self._entries[digest].packed.nbytes
        if missing > 0:
            return False
        for digest in victims:
            self._evict(digest)
        return True

    def _moved(self, packed: PackedAdapter) -> Arrival:
        """Begin to copy an adapter to the device; idle ones leave for it one by one while the device has no memory."""
        while True:
            try:
                return self._copies.start(packed)
            except torch.OutOfMemoryError as error:
                victim = next(self._idle(), None)
                if victim is None:
                    raise ResourceExhaustedError(
                        f"the device has no memory for the {packed.nbytes} bytes of adapter {packed.digest}; lower "
                        "--kv-cache-memory or --adapter-device-memory so that both fit"
                    ) from error
                self._evict(victim)
            except RuntimeError as error:
                logger.exception("adapter %s could not be copied to the device", packed.digest)
                raise EngineError(f"adapter {packed.digest} could not be copied to the device: {error}") from error

    def _idle(self) -> Iterator[str]:
        """Yield what may leave, the least recently used first; who asked for what is still arriving shall find it."""
        return (
            digest
            for digest, entry in self._entries.items()
            if entry.rows == 0 and digest not in self._pins and entry.arrival.done()
        )

    def _evict(self, digest: str) -> None:
        self._drop(digest)
        self._evictions += 1

    def _drop(self, digest: str) -> int:
        entry = self._entries.pop(digest)
        assert entry.rows == 0, f"{digest} is dropped while a row uses it"
        del self._by_slot[entry.slot]
        self._used -= entry.packed.nbytes
        return entry.packed.nbytes
