"""Copies to a device that take their time, in the background."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from loraplex.server.lora.weights import PackedAdapter


@dataclass(frozen=True)
class SlowArrival:
    packed: PackedAdapter
    event: threading.Event = field(default_factory=threading.Event)

    def done(self) -> bool:
        return self.event.is_set()


class SlowCopies:
    """Implements `DeviceCopies`; without a delay, a copy ends when `finish` is called."""

    def __init__(self, on_done: Callable[[], None] = lambda: None, delay_s: float | None = None) -> None:
        self._on_done = on_done
        self._delay_s = delay_s
        self.under_way: list[SlowArrival] = []
        self.closed = False

    def start(self, packed: PackedAdapter) -> SlowArrival:
        arrival = SlowArrival(packed)
        self.under_way.append(arrival)
        if self._delay_s is not None:
            threading.Timer(self._delay_s, self.finish).start()
        return arrival

    def finish(self) -> None:
        """End the oldest copy."""
        self.under_way.pop(0).event.set()
        self._on_done()

    def close(self) -> None:
        self.closed = True
