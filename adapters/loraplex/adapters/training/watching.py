"""What a training run tells while it goes on, and how it is asked to stop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Progress:
    """Where a run is: optimizer steps done and planned, the last loss in nats a token, tokens of input a second."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float


class Observer(Protocol):
    """Is told what happens; called in the thread that trains."""

    def phase(self, description: str) -> None:
        """Something new begins, such as loading the model."""

    def progress(self, progress: Progress) -> None:
        """An optimizer step is done."""

    def note(self, text: str) -> None:
        """Something a person should know: a validation's loss, skipped rows, a checkpoint."""


class Silent:
    """An observer that nobody listens to."""

    def phase(self, description: str) -> None:
        """Do nothing."""

    def progress(self, progress: Progress) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""


class StopRequest:
    """Asks a run to save a checkpoint at the end of the step and to stop; may be set from a signal handler."""

    def __init__(self) -> None:
        self._wanted = False

    def set(self) -> None:
        """Ask for it."""
        self._wanted = True

    def is_set(self) -> bool:
        """Whether it was asked for."""
        return self._wanted
