"""Trains one adapter for each of several ranks with the same budget, and names the rank that is worth it.

Same data, same order, same number of steps, same learning rate, alpha = 2 * rank: only the rank differs. What serving
costs is measured by whoever calls, and added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from loraplex.adapters.errors import InvalidRequestError
from loraplex.adapters.training.score import Score
from loraplex.adapters.training.seed_figures import seed
from loraplex.adapters.training.train_config import TrainConfig
from loraplex.adapters.training.train_result import TrainResult

Train = Callable[[TrainConfig], TrainResult]


class Record(Protocol):
    """Keeps the points of a sweep."""

    points: dict[int, RankPoint]
    base: Score | None

    def add(self, point: RankPoint, base: Score) -> None:
        """Keep a point, and the score of the base."""

    def ordered(self) -> tuple[RankPoint, ...]:
        """Return the points by rank."""
        ...


@dataclass(frozen=True)
class ServingCost:
    """Output tokens a second at 16 rows: with this adapter in all of them, with 16 different ones of its rank."""

    same: float
    distinct: float


@dataclass(frozen=True)
class RankPoint:
    """One rank of a sweep.

    Attributes:
        accuracy: share of held-out rows answered exactly, None for data without answers; `rows` are those.
        loss: on held-out rows, nats a token.
        share: trained parameters of the base's.
        seconds: of training.
        serving: None where it was not measured.
    """

    rank: int
    accuracy: float | None
    rows: int
    loss: float
    trained: int
    share: float
    seconds: float
    train_loss: float
    folder: str
    serving: ServingCost | None = None


@dataclass(frozen=True)
class RankSweep:
    """A sweep: its points by rank, the base's scores, and the budget that all had."""

    model: str
    data: str
    steps: int
    learning_rate: float
    seed: int
    base_accuracy: float | None
    base_loss: float
    points: tuple[RankPoint, ...]

    @property
    def sweet_spot(self) -> RankPoint:
        """The smallest rank whose quality is within one standard error of the best one's (Breiman's rule)."""
        return sweet_spot(self.points)

    @property
    def verdict(self) -> str:
        """The sweet spot and why, in a sentence; and what the seed text says."""
        chosen, best = self.sweet_spot, best_point(self.points)
        low, high = seed("sweet_spot")
        inside = low <= chosen.rank <= high
        said = f"the seed text's range of {low} to {high} {'holds it' if inside else 'does not hold it'}"
        if chosen.accuracy is None or best.accuracy is None:
            found = f"held-out loss {chosen.loss:.3f} beside {best.loss:.3f} at rank {best.rank}"
        else:
            best_text = f"the best {best.accuracy:.1%} at rank {best.rank}, give or take {standard_error(best):.1%}"
            found = f"{chosen.accuracy:.1%} of {chosen.rows} held-out rows, {best_text}"
        return f"sweet spot rank {chosen.rank}: {found}; {said}"


def run_sweep(config: TrainConfig, ranks: Sequence[int], steps: int, train: Train, record: Record) -> RankSweep:
    """Train `config` once for each of `ranks` for `steps` steps, but for those that `record` has already.

    The adapters go to `rank-<r>` below the configuration's output folder. Points of other ranks in the record are part
    of the sweep too.

    Raises:
        InvalidRequestError: no rank, one twice, or no held-out rows to measure on.
        LoraplexError: as `train` does.
    """
    if not ranks or len(set(ranks)) < len(ranks) or min(ranks) < 1:
        raise InvalidRequestError.of("ranks", "name at least one rank, from 1 on, and none twice")
    for rank in sorted(set(ranks) - set(record.points)):
        result = train(_at_rank(config, rank, steps))
        if result.adapter is None or result.base is None:
            raise InvalidRequestError.of("validation_fraction", "hold rows out: there is no quality to compare without")
        record.add(_point(rank, result, result.adapter), result.base)
    assert record.base is not None, "a point was added"
    return RankSweep(
        config.model,
        config.data,
        steps,
        config.learning_rate,
        config.seed,
        record.base.accuracy,
        record.base.loss,
        record.ordered(),
    )


def _point(rank: int, result: TrainResult, score: Score) -> RankPoint:
    return RankPoint(
        rank,
        score.accuracy,
        score.rows,
        score.loss,
        result.trainable_parameters,
        result.trainable_parameters / (result.total_parameters - result.trainable_parameters),
        result.seconds,
        result.train_loss,
        str(result.output_dir),
    )


def best_point(points: Sequence[RankPoint]) -> RankPoint:
    """Return the point of the highest quality, the smallest rank of equal ones."""
    return min(points, key=lambda point: (_badness(point), point.rank))


def sweet_spot(points: Sequence[RankPoint]) -> RankPoint:
    """Return the smallest rank within one standard error of the best; with losses alone, within 2 % of the best."""
    best = best_point(points)
    if best.accuracy is None:
        good = [point for point in points if point.loss <= 1.02 * best.loss]
    else:
        limit = best.accuracy - standard_error(best)
        good = [point for point in points if point.accuracy is not None and point.accuracy >= limit]
    return min(good, key=lambda point: point.rank)


def standard_error(point: RankPoint) -> float:
    """Return that of the accuracy on so many rows; two successes and two failures added, so that it is never 0.

    Raises:
        ValueError: the point has no accuracy.
    """
    if point.accuracy is None:
        raise ValueError("there is no accuracy")
    share = (point.accuracy * point.rows + 2) / (point.rows + 4)  # Agresti and Coull, 1998
    return math.sqrt(share * (1 - share) / (point.rows + 4))


def _badness(point: RankPoint) -> float:
    return point.loss if point.accuracy is None else -point.accuracy


def _at_rank(config: TrainConfig, rank: int, steps: int) -> TrainConfig:
    return replace(
        config,
        rank=rank,
        alpha=float(seed("alpha_factor") * rank),
        rank_pattern={},
        alpha_pattern={},
        max_steps=steps,
        early_stopping_patience=0,
        output_dir=str(Path(config.output_dir) / f"rank-{rank}"),
    )
