"""The typed errors of the serving process, on top of those that adapters share.

Knows nothing about gRPC: `rpc.status` maps each class to a status code and details.
"""

from __future__ import annotations

from loraplex.adapters.errors import (
    AlreadyExistsError,
    FieldViolation,
    InvalidRequestError,
    LoraplexError,
    NotFoundError,
    PreconditionError,
    ResourceExhaustedError,
)

__all__ = [
    "AlreadyExistsError",
    "CancelledError",
    "DeadlineError",
    "EngineError",
    "FieldViolation",
    "InvalidRequestError",
    "LoraplexError",
    "ModelLoadError",
    "NotFoundError",
    "PreconditionError",
    "ResourceExhaustedError",
    "UnavailableError",
]


class UnavailableError(LoraplexError):
    """The server is starting or draining."""


class DeadlineError(LoraplexError):
    """The caller's deadline passed before the answer was complete."""


class CancelledError(LoraplexError):
    """The caller went away."""


class ModelLoadError(LoraplexError):
    """The base model cannot be served: unknown architecture, missing file, a shape that contradicts the config."""


class EngineError(LoraplexError):
    """A step of the engine failed for a reason that is ours; the requests in that step are lost, the server goes on."""
