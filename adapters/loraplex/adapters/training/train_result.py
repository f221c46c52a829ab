"""What a training run came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loraplex.adapters.training.score import Answer, Score


@dataclass(frozen=True)
class TrainResult:
    """What was trained, and how well it does.

    Attributes:
        output_dir: the adapter's folder.
        steps: optimizer steps, all of the run's, also before it was interrupted.
        seconds: of training since it began or went on, without loading and scoring.
        tokens: of input in that time.
        base, adapter: scores on held-out rows; None if none are held out.
        answers: some held-out rows with what the base and the adapter wrote.
        peak_memory: bytes of the process (CPU) or on the GPU.
        stopped_early: whether validation made no more progress.
        serving_problem: why a server of this base cannot serve the adapter; empty if it can.
        losses: (step, loss) as logged.
    """

    output_dir: Path
    steps: int
    seconds: float
    tokens: int
    train_rows: int
    validation_rows: int
    truncated_rows: int
    skipped_rows: int
    trainable_parameters: int
    total_parameters: int
    base: Score | None
    adapter: Score | None
    answers: tuple[tuple[Answer, Answer], ...]
    peak_memory: int
    stopped_early: bool
    serving_problem: str
    losses: tuple[tuple[int, float], ...]

    @property
    def train_loss(self) -> float:
        """Mean of the losses, nats a token; 0 if none was logged."""
        return sum(loss for _, loss in self.losses) / max(1, len(self.losses))

    @property
    def tokens_per_second(self) -> float:
        """Of input, over the whole time of training, validations included."""
        return self.tokens / max(self.seconds, 1e-9)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        derived = {"train_loss": self.train_loss, "tokens_per_second": self.tokens_per_second}
        return {**asdict(self), "output_dir": str(self.output_dir), **derived}


def logged_losses(log_history: Sequence[Mapping[str, float]]) -> tuple[tuple[int, float], ...]:
    """Return (step, loss) of what a trainer has logged of training; other entries are of validations."""
    return tuple((int(each["step"]), float(each["loss"])) for each in log_history if "loss" in each)
