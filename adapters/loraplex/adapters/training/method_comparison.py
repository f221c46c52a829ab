"""Full fine-tuning, LoRA and QLoRA on the same data with the same number of steps: quality, memory and time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loraplex.adapters.errors import InvalidRequestError
from loraplex.adapters.training.advisor import shape_of
from loraplex.adapters.training.architecture import ModelArchitecture
from loraplex.adapters.training.seed_figures import seed
from loraplex.adapters.training.train_config import TrainConfig
from loraplex.adapters.training.train_result import TrainResult
from loraplex.adapters.training.training_memory import Method, training_memory

LARGEST_FULL = 500_000_000
"""Parameters of a model that is fine-tuned as a whole here: with Adam in float32 they take 16 bytes each."""


@dataclass(frozen=True)
class MethodRun:
    """What training by one method came to; `memory` is the process's peak less what it held before, in bytes."""

    accuracy: float | None
    rows: int
    loss: float
    base_accuracy: float | None
    trained: int
    seconds: float
    memory: int


@dataclass(frozen=True)
class MethodPoint:
    """One method of a comparison; `planned` is the peak that the plan gives for rows of full length, in bytes."""

    method: Method
    learning_rate: float
    run: MethodRun
    planned: int


@dataclass(frozen=True)
class MethodComparison:
    """What was compared, and the points in the order of the methods."""

    model: str
    data: str
    steps: int
    points: tuple[MethodPoint, ...]

    def time_factor(self, point: MethodPoint) -> float | None:
        """Return a method's training time beside that of full fine-tuning; None where that was left out."""
        full = next((each.run.seconds for each in self.points if each.method == "full"), None)
        return point.run.seconds / full if full else None


Run = Callable[[Method, TrainConfig], MethodRun]


def compare_methods(
    config: TrainConfig, methods: Sequence[Method], steps: int, model: ModelArchitecture, run: Run
) -> MethodComparison:
    """Train `config` by each of `methods` for `steps` steps.

    Raises:
        InvalidRequestError: no method, or the model is too large to be fine-tuned as a whole.
        LoraplexError: as `run` does.
    """
    if not methods:
        raise InvalidRequestError.of("methods", "name at least one of full, lora, qlora")
    if "full" in methods and model.parameters > LARGEST_FULL:
        raise InvalidRequestError.of(
            "methods", f"full fine-tuning is for models of up to {LARGEST_FULL:,} parameters, not {model.parameters:,}"
        )
    points = []
    for method in methods:
        own = config_of(config, method, steps)
        planned = training_memory(model, method, shape_of(own)).total
        points.append(MethodPoint(method, own.learning_rate, run(method, own), planned))
    return MethodComparison(config.model, config.data, steps, tuple(points))


def config_of(config: TrainConfig, method: Method, steps: int) -> TrainConfig:
    """Return the configuration of one method.

    Full fine-tuning has the learning rate of unfrozen layers, a tenth, and float32 weights: steps that small are lost
    in the rounding of bfloat16.
    """
    own = replace(
        config,
        max_steps=steps,
        early_stopping_patience=0,
        output_dir=str(Path(config.output_dir) / method),
        quantization="nf4" if method == "qlora" else "none",
    )
    if method != "full":
        return own
    return replace(own, learning_rate=config.learning_rate * seed("unfrozen_factor"), dtype="float32")


def run_of(result: TrainResult, held_before: int) -> MethodRun:
    """Return the figures of a training run in a process that held so many bytes before.

    Raises:
        InvalidRequestError: nothing was held out to measure on.
    """
    if result.adapter is None or result.base is None:
        raise InvalidRequestError.of("validation_fraction", "hold rows out: there is no quality to compare without")
    score = result.adapter
    return MethodRun(
        score.accuracy,
        score.rows,
        score.loss,
        result.base.accuracy,
        result.trainable_parameters,
        result.seconds,
        result.peak_memory - held_before,
    )
