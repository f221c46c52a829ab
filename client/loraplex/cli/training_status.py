"""One line that says where a training run among several is."""

from __future__ import annotations

from rich.status import Status

from loraplex.adapters.training.watching import Progress


class StatusObserver:
    """Tells a `Status` what a run tells; `name` is put before it."""

    def __init__(self, status: Status, name: str) -> None:
        self._status = status
        self._name = name

    def phase(self, description: str) -> None:
        """Show it."""
        self._status.update(f"{self._name}: {description}")

    def progress(self, progress: Progress) -> None:
        """Show step, loss and speed."""
        self.phase(
            f"step {progress.step} of {progress.steps}, loss {progress.loss:.3f}, "
            f"{progress.tokens_per_second:.0f} tokens/s"
        )

    def note(self, text: str) -> None:
        """Do nothing: a sweep shows its points."""
