"""How much each name has been used: counted in memory, written out in batches by a thread of its own.

Knows nothing about where the figures are kept. A process that is killed loses those of the last seconds.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

SAVE_EVERY_S = 2.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Usage:
    """What requests have made of one name since it was registered; `last_used_at` is in UTC, None if never."""

    requests: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    last_used_at: datetime | None = None

    def plus(self, prompt_tokens: int, generation_tokens: int) -> Usage:
        """Return the usage after one more request, which ends now."""
        return Usage(
            self.requests + 1,
            self.prompt_tokens + prompt_tokens,
            self.generation_tokens + generation_tokens,
            datetime.now(UTC),
        )


NONE = Usage()


class UsageMeter:
    """The usage of all names. Thread-safe; counting waits for nothing."""

    def __init__(self, known: Mapping[str, Usage], save: Callable[[], None], every_s: float = SAVE_EVERY_S) -> None:
        """Go on from `known`; a thread calls `save` at most every `every_s` seconds when there is something to save."""
        self._usage = dict(known)
        self._save = save
        self._every_s = every_s
        self._lock = threading.Lock()
        self._unsaved: set[str] = set()
        self._changed = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)
        self._thread.start()

    def of(self, name: str) -> Usage:
        """Return the usage of `name`."""
        return self._usage.get(name, NONE)

    def count(self, name: str, prompt_tokens: int, generation_tokens: int) -> None:
        """Count one request."""
        with self._lock:
            self._usage[name] = self.of(name).plus(prompt_tokens, generation_tokens)
            self._unsaved.add(name)
        self._changed.set()

    def forget(self, name: str) -> None:
        """Drop the usage of a name that is not registered any more."""
        with self._lock:
            self._usage.pop(name, None)
            self._unsaved.discard(name)

    @contextmanager
    def unsaved(self) -> Iterator[Mapping[str, Usage]]:
        """Yield what has changed since the last time; it counts as saved unless the block raises."""
        with self._lock:
            names, self._unsaved = self._unsaved, set()
            changed = {name: self._usage[name] for name in names}
        try:
            yield changed
        except BaseException:
            with self._lock:
                self._unsaved |= names & self._usage.keys()
            raise

    def close(self) -> None:
        """Save for the last time and end the thread."""
        self._closing.set()
        self._changed.set()
        self._thread.join()

    def _run(self) -> None:
        closing = False
        while not closing:
            self._changed.wait()
            self._closing.wait(self._every_s)
            self._changed.clear()
            closing = self._closing.is_set()  # after the line above: close() sets them the other way round
            try:
                self._save()
            except Exception:
                # A full disk, say: nothing is lost but time.
                logger.warning("the usage of adapters could not be saved; trying again", exc_info=True)
                self._changed.set()
