"""Copies adapters from the host's memory to the device, beside the device's other work.

Knows nothing of budgets or rows.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from loraplex.server.lora.weights import PackedAdapter


class Arrival(Protocol):
    """An adapter on its way to the device."""

    @property
    def packed(self) -> PackedAdapter:
        """The adapter in the device's memory, which does not hold it before it is `done`."""
        ...

    def done(self) -> bool:
        """Whether it is there."""
        ...


class DeviceCopies(Protocol):
    """Starts copies."""

    def start(self, packed: PackedAdapter) -> Arrival:
        """Begin to copy; memory that is taken for it is not written to before earlier work has left it.

        Raises:
            torch.OutOfMemoryError: if the device has no memory for it.
        """
        ...

    def close(self) -> None:
        """End what runs in the background."""
        ...


@dataclass(frozen=True)
class Arrived:
    """Implements `Arrival`: it is there."""

    packed: PackedAdapter

    def done(self) -> bool:
        """See `Arrival`."""
        return True


@dataclass(frozen=True)
class DirectCopies:
    """Implements `DeviceCopies` where host and device are one, or nobody waits: each copy is there at once."""

    device: torch.device

    def start(self, packed: PackedAdapter) -> Arrived:
        """See `DeviceCopies`."""
        return Arrived(packed.to(self.device))

    def close(self) -> None:
        """See `DeviceCopies`."""


@dataclass(frozen=True)
class _Event:
    """Implements `Arrival` by an event behind the copy."""

    packed: PackedAdapter
    event: torch.cuda.Event

    def done(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]


class SideStreamCopies:
    """Implements `DeviceCopies` on a stream of its own: steps run while adapters come.

    The copies' memory belongs to that stream, and each copy first waits for what the compute stream was given before it
    began: an adapter that was evicted may still be read by the step in flight, but never be overwritten under it.
    """

    def __init__(self, device: torch.device, on_done: Callable[[], None]) -> None:
        """`on_done` is called on a background thread when a copy has ended, to wake the engine."""
        self._device = device
        self._on_done = on_done
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._waiter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-copy")

    def start(self, packed: PackedAdapter) -> _Event:
        """See `DeviceCopies`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            moved = packed.to(self._device)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        self._waiter.submit(self._wait, event)
        return _Event(moved, event)

    def close(self) -> None:
        """See `DeviceCopies`."""
        self._waiter.shutdown(wait=True, cancel_futures=True)

    def _wait(self, event: torch.cuda.Event) -> None:
        event.synchronize()
        self._on_done()
