"""What the outside may tell the engine: plain picklable values, taken at step boundaries in the order they came."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex.server.engine.request import GenerationRequest


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
    """No name points at the adapter any more: drop its weights when its last row ends."""

    digest: str


@dataclass(frozen=True)
class Stop:
    """End the loop; living requests get an UnavailableError."""


Command = AddRequest | AbortRequest | PinAdapter | UnpinAdapter | ForgetAdapter | Stop
