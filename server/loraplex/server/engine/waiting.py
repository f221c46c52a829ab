"""The sequences that wait for their first row: one queue per adapter, and whose turn it is.

First come heads whose adapter was passed over for longer than `max_wait_s`, then the adapter with the fewest rows, then
who waits longest. Knows arrival times and row counts; nothing about blocks, slots or tokens. Imports no torch.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import chain, islice

from loraplex.server.engine.sequence import Sequence

AdapterKey = str | None
"""The digest that a queue is for; None is the base. Scales share it, or a client could open queues at will."""

_Rank = tuple[bool, int, float, float]


class WaitingQueues:
    """Owns the queues."""

    def __init__(self, max_wait_s: float) -> None:
        self._max_wait_s = max_wait_s
        self._queues: dict[AdapterKey, deque[Sequence]] = {}
        self._last_admission_s: dict[AdapterKey, float] = {}
        self._count = 0

    def __len__(self) -> int:
        """Return how many sequences wait."""
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        return chain.from_iterable(self._queues.values())

    def adapter_names(self, limit: int) -> frozenset[str]:
        """Return the names of up to `limit` adapters that requests wait for."""
        heads = (queue[0] for key, queue in self._queues.items() if key is not None)
        return frozenset(head.request.adapter_name for head in islice(heads, limit))

    def add(self, seq: Sequence) -> None:
        """Put a sequence at the end of its adapter's queue."""
        self._queues.setdefault(seq.request.acting_digest, deque()).append(seq)
        self._count += 1

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out of its queue.

        Raises:
            KeyError: if its adapter has no queue.
            ValueError: if it is not in it.
        """
        key = seq.request.acting_digest
        queue = self._queues[key]
        queue.remove(seq)
        self._count -= 1
        if not queue:
            del self._queues[key]
            # An idle adapter starts afresh; keeping its time would grow the table with every adapter ever seen.
            self._last_admission_s.pop(key, None)

    def note_admission(self, key: AdapterKey, now: float) -> None:
        """Let those who wait for `key` count their wait from `now`: one of them got a row."""
        if key in self._queues:
            self._last_admission_s[key] = now

    def is_overdue(self, head: Sequence, now: float) -> bool:
        """Say whether the adapter of `head` has been passed over for too long."""
        return now - self._waiting_since(head) > self._max_wait_s

    def heads(self, rows: Mapping[AdapterKey, int], now: float) -> Iterator[Sequence]:
        """Yield the best head again and again, the next of its queue among the others once it was removed.

        A head that is still there when the next one is asked for closes its queue for this pass. `rows` says how many
        rows each adapter has; only those of the adapter whose head was yielded last may have changed since.
        """
        heap = [(self._rank(queue[0], rows, now), turn, key) for turn, (key, queue) in enumerate(self._queues.items())]
        heapq.heapify(heap)
        while heap:
            _, turn, key = heap[0]
            head = self._queues[key][0]
            yield head
            queue = self._queues.get(key)
            if queue and queue[0] is not head:
                heapq.heapreplace(heap, (self._rank(queue[0], rows, now), turn, key))
            else:
                heapq.heappop(heap)

    def _rank(self, head: Sequence, rows: Mapping[AdapterKey, int], now: float) -> _Rank:
        since = self._waiting_since(head)
        if now - since > self._max_wait_s:
            return (False, 0, since, head.arrival_s)
        return (True, rows.get(head.request.acting_digest, 0), since, head.arrival_s)

    def _waiting_since(self, head: Sequence) -> float:
        """Since when its adapter has been passed over: it came, or the one before it was admitted."""
        return max(head.arrival_s, self._last_admission_s.get(head.request.acting_digest, head.arrival_s))
