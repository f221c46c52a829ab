"""What the outside may tell the engine, and one answer: plain picklable values.

They are taken at step boundaries, in the order in which they came.
"""

from __future__ import annotations

from dataclasses import dataclass

from loraplex.server.engine.request import GenerationRequest
from loraplex.server.engine.stats import FreedMemory


@dataclass(frozen=True)
class AddRequest:
    """Answer this request; its outputs carry its request id, which no living request may share."""

    request: GenerationRequest


@dataclass(frozen=True)
class AbortRequest:
    """Forget the request; what it holds is free at the next step. Unknown ids are ignored: it may just have ended."""

    request_id: str


@dataclass(frozen=True)
class PinAdapter:
    """Load the adapter and keep it on the device."""

    digest: str


@dataclass(frozen=True)
class UnpinAdapter:
    """Let the adapter be evicted again."""

    digest: str


@dataclass(frozen=True)
class ForgetAdapter:
    """No name points at the adapter any more: drop its weights when its last request ends.

    The answer is an `AdapterForgotten` with the same ticket.
    """

    digest: str
    ticket: int = 0


@dataclass(frozen=True)
class Stop:
    """End the loop; living requests get an UnavailableError."""


@dataclass(frozen=True)
class AdapterForgotten:
    """The answer to a `ForgetAdapter`: these bytes are free. Zeros if another has had them told, or a pin came."""

    ticket: int
    freed: FreedMemory


Command = AddRequest | AbortRequest | PinAdapter | UnpinAdapter | ForgetAdapter | Stop
