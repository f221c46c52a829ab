"""Loads adapters on background threads: from the disk, checked and packed, into the host's memory.

A slow source holds up nobody else: a load that takes long gives its place to the next one, up to a bound of threads.
`start`, `discard` and `collect` are for one thread, the engine's. Knows nothing about budgets.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from loraplex.server.errors import EngineError, LoraplexError
from loraplex.server.lora.weights import PackedAdapter

logger = logging.getLogger(__name__)

MAX_LOADS = 4
"""Adapters that are being loaded at one time, the stalled ones left out."""
MAX_THREADS = 32
STALLED_S = 0.5
"""Seconds after which a load counts as stalled."""

AdapterLoader = Callable[[str], PackedAdapter]
"""Reads the weights of a digest and packs them in the host's memory; runs on a background thread."""


@dataclass(frozen=True)
class Loaded:
    """A load that has ended: with the weights or with the reason why there are none; seconds from its start on."""

    digest: str
    result: PackedAdapter | LoraplexError
    seconds: float


@dataclass(frozen=True)
class _Load:
    number: int
    started_s: float


class AdapterLoads:
    """The loads that are under way, at most one a digest that counts."""

    def __init__(
        self, loader: AdapterLoader, on_done: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start with none; `on_done` is called on a background thread when a load has ended, to wake the engine."""
        self._loader = loader
        self._on_done = on_done
        self._clock = clock
        self._current: dict[str, _Load] = {}
        self._unfinished: dict[int, float] = {}  # start by number, the discarded ones included
        self._ended: queue.SimpleQueue[tuple[str, int, Future[tuple[PackedAdapter, float]]]] = queue.SimpleQueue()
        self._executor = ThreadPoolExecutor(max_workers=MAX_THREADS, thread_name_prefix="adapter-load")
        self._numbers = 0

    def __contains__(self, digest: str) -> bool:
        return digest in self._current

    def __len__(self) -> int:
        return len(self._current)

    @property
    def num_pending(self) -> int:
        """Loads under way that are not stalled."""
        late = self._clock() - STALLED_S
        return sum(started > late for started in self._unfinished.values())

    def start(self, digest: str, limit: int = MAX_LOADS) -> bool:
        """Begin to load an adapter unless it is being loaded or `limit` loads are; return whether it is now."""
        if digest in self._current:
            return True
        if len(self._unfinished) >= MAX_THREADS or self.num_pending >= limit:
            return False
        self._numbers += 1
        load = _Load(self._numbers, self._clock())
        self._current[digest] = load
        self._unfinished[load.number] = load.started_s
        future = self._executor.submit(self._run, digest)
        future.add_done_callback(lambda done: self._report(digest, load.number, done))
        return True

    def discard(self, digest: str) -> None:
        """Use nothing of what a load brings that is under way; the next `start` begins another."""
        self._current.pop(digest, None)

    def collect(self) -> list[Loaded]:
        """Return what has ended since the last call."""
        ended: list[Loaded] = []
        while True:
            try:
                digest, number, future = self._ended.get_nowait()
            except queue.Empty:
                return ended
            del self._unfinished[number]
            load = self._current.get(digest)
            if load is None or load.number != number or future.cancelled():
                continue
            del self._current[digest]
            ended.append(self._loaded(digest, load, future))

    def close(self) -> None:
        """Stop the background threads after the loads they are at."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _run(self, digest: str) -> tuple[PackedAdapter, float]:
        return self._loader(digest), self._clock()

    def _report(self, digest: str, number: int, future: Future[tuple[PackedAdapter, float]]) -> None:
        self._ended.put((digest, number, future))
        self._on_done()

    def _loaded(self, digest: str, load: _Load, future: Future[tuple[PackedAdapter, float]]) -> Loaded:
        error = future.exception()
        if error is None:
            packed, ended_s = future.result()
            return Loaded(digest, packed, ended_s - load.started_s)
        if not isinstance(error, LoraplexError):
            logger.error("loading adapter %s failed", digest, exc_info=error)
            error = EngineError(f"adapter {digest} could not be loaded: {error}")
        return Loaded(digest, error, self._clock() - load.started_s)
