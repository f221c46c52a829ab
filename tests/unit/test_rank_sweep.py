from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.adapters.errors import AlreadyExistsError, InvalidRequestError
from loraplex.adapters.training.figure import png_bytes
from loraplex.adapters.training.rank_sweep import (
    RankPoint,
    RankSweep,
    ServingCost,
    best_point,
    run_sweep,
    standard_error,
    sweet_spot,
)
from loraplex.adapters.training.rank_sweep_chart import draw_sweep
from loraplex.adapters.training.score import Score
from loraplex.adapters.training.sweep_record import SweepRecord
from loraplex.adapters.training.train_config import TrainConfig
from loraplex.adapters.training.train_result import TrainResult


def result_of(config: TrainConfig, accuracy: float | None, loss: float = 1.0, scored: bool = True) -> TrainResult:
    return TrainResult(
        output_dir=Path(config.output_dir),
        steps=config.max_steps,
        seconds=10.0 + config.rank,
        tokens=1000,
        train_rows=100,
        validation_rows=100,
        truncated_rows=0,
        skipped_rows=0,
        trainable_parameters=1000 * config.rank,
        total_parameters=1_000_000 + 1000 * config.rank,
        base=Score(2.0, 100, None if accuracy is None else 0.2, 0.3) if scored else None,
        adapter=Score(loss, 100, accuracy, accuracy) if scored else None,
        answers=(),
        peak_memory=1,
        stopped_early=False,
        serving_problem="",
        losses=((1, 0.5),),
    )


def config(**changes: object) -> TrainConfig:
    values = {"model": "demo", "data": "data.jsonl", "output_dir": "out", "rank_pattern": {"q_proj": 8}, "rank": 4}
    return TrainConfig.from_values({**values, "alpha_pattern": {"q_proj": 16}, **changes})


def test_only_the_rank_differs(tmp_path: Path) -> None:
    seen: list[TrainConfig] = []

    def train(own: TrainConfig) -> TrainResult:
        seen.append(own)
        return result_of(own, 0.5)

    sweep = run_sweep(config(), [8, 1, 4], 50, train, SweepRecord(tmp_path / "sweep.json", config(), 50))
    assert [point.rank for point in sweep.points] == [1, 4, 8]
    assert [(own.rank, own.alpha) for own in seen] == [(1, 2), (4, 8), (8, 16)]
    assert {(own.max_steps, own.learning_rate, own.seed, own.data) for own in seen} == {(50, 2e-4, 0, "data.jsonl")}
    assert all(own.rank_pattern == {} and own.alpha_pattern == {} for own in seen)
    assert [own.output_dir for own in seen] == ["out/rank-1", "out/rank-4", "out/rank-8"]
    assert [point.share for point in sweep.points] == [0.001, 0.004, 0.008]
    assert (sweep.base_accuracy, sweep.base_loss) == (0.2, 2.0)


def test_a_sweep_needs_ranks_and_held_out_rows(tmp_path: Path) -> None:
    record = SweepRecord(tmp_path / "sweep.json", config(), 5)
    with pytest.raises(InvalidRequestError, match="ranks"):
        run_sweep(config(), [4, 4], 5, lambda own: result_of(own, 0.5), record)
    with pytest.raises(InvalidRequestError, match="validation_fraction"):
        run_sweep(config(), [4], 5, lambda own: result_of(own, 0.5, scored=False), record)


def test_an_interrupted_sweep_goes_on_and_a_finished_one_takes_more_ranks(tmp_path: Path) -> None:
    path = tmp_path / "out" / "sweep.json"
    trained: list[int] = []

    def train(own: TrainConfig) -> TrainResult:
        if own.rank == 4 and 4 not in trained and len(trained) == 1:
            trained.append(0)
            raise KeyboardInterrupt
        trained.append(own.rank)
        return result_of(own, own.rank / 64)

    with pytest.raises(KeyboardInterrupt):
        run_sweep(config(), [1, 4], 5, train, SweepRecord(path, config(), 5))
    first = run_sweep(config(), [1, 4], 5, train, SweepRecord(path, config(), 5))
    more = run_sweep(config(rank=99), [16], 5, train, SweepRecord(path, config(rank=99), 5))
    assert trained == [1, 0, 4, 16]
    assert [point.rank for point in more.points] == [1, 4, 16]
    assert more.points[:2] == first.points
    assert more.base_accuracy == first.base_accuracy == 0.2


def test_points_of_another_budget_are_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    run_sweep(config(), [1], 5, lambda own: result_of(own, 0.5), SweepRecord(path, config(), 5))
    with pytest.raises(AlreadyExistsError, match="max_steps"):
        SweepRecord(path, config(), 6)
    with pytest.raises(AlreadyExistsError, match="learning_rate"):
        SweepRecord(path, config(learning_rate=1e-3), 5)


def points(accuracies: dict[int, float]) -> tuple[RankPoint, ...]:
    return tuple(RankPoint(rank, acc, 100, 1.0, 1, 0.1, 1.0, 1.0, "") for rank, acc in accuracies.items())


@pytest.mark.parametrize(
    ("accuracies", "spot"),
    [
        ({1: 0.5, 4: 0.9, 16: 0.91, 64: 0.92}, 4),  # within one standard error of 2.8 points
        ({1: 0.5, 4: 0.8, 16: 0.91, 64: 0.92}, 16),
        ({1: 1.0, 4: 1.0}, 1),
        ({1: 0.9, 4: 0.7, 16: 0.5}, 1),
        ({1: 0.1, 64: 0.9}, 64),
    ],
)
def test_the_sweet_spot_is_the_smallest_rank_that_is_as_good(accuracies: dict[int, float], spot: int) -> None:
    assert sweet_spot(points(accuracies)).rank == spot


def test_losses_stand_in_where_nothing_is_answered() -> None:
    losses = {1: 2.0, 4: 1.015, 16: 1.0}
    made = tuple(RankPoint(rank, None, 0, loss, 1, 0.1, 1.0, 1.0, "") for rank, loss in losses.items())
    assert sweet_spot(made).rank == 4
    assert best_point(made).rank == 16


@given(st.dictionaries(st.integers(1, 128), st.floats(0, 1), min_size=1))
def test_the_sweet_spot_is_never_above_the_best_and_nothing_below_it_is_as_good(accuracies: dict[int, float]) -> None:
    made = points(accuracies)
    best, spot = best_point(made), sweet_spot(made)
    assert best.accuracy is not None
    limit = best.accuracy - standard_error(best)
    assert spot.rank <= best.rank
    assert spot.accuracy is not None
    assert spot.accuracy >= limit
    assert all(point.accuracy < limit for point in made if point.rank < spot.rank and point.accuracy is not None)


def test_the_verdict_says_what_the_seed_text_says() -> None:
    sweep = RankSweep("demo", "d", 50, 2e-4, 0, 0.2, 2.0, points({4: 0.5, 16: 0.9, 64: 0.91}))
    assert "sweet spot rank 16: 90.0% of 100 held-out rows, the best 91.0% at rank 64" in sweep.verdict
    assert "8 to 32 holds it" in sweep.verdict


@pytest.mark.parametrize("accuracy", [0.5, None])
@pytest.mark.parametrize("serving", [ServingCost(300.0, 200.0), None])
def test_a_chart_is_drawn_of_whatever_was_measured(accuracy: float | None, serving: ServingCost | None) -> None:
    made = tuple(RankPoint(r, accuracy, 100, 1.0, 10 * r, r / 1000, 5.0, 1.0, "", serving) for r in (1, 8, 64))
    figure = draw_sweep(RankSweep("demo", "d", 50, 2e-4, 0, None if accuracy is None else 0.2, 2.0, made))
    assert png_bytes(figure).startswith(b"\x89PNG")
    quality, parameters, _, served = figure.axes
    assert all(axes.get_xscale() == "log" for axes in figure.axes)
    assert list(parameters.lines[0].get_ydata()) == [0.1, 0.8, 6.4]
    assert len(quality.lines) >= 2
    assert len(served.lines) == (3 if serving else 1)  # with the sweet spot's mark
