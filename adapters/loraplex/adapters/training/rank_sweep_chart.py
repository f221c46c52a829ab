"""Draws a rank sweep: quality, parameters, training time and serving cost against the rank, on a logarithmic axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loraplex.adapters.training.figure import COLOURS, subplots
from loraplex.adapters.training.rank_sweep import RankPoint, RankSweep, standard_error
from loraplex.adapters.training.seed_figures import seed

_BLUE, _ORANGE, _GREEN, _RED, _GREY = COLOURS[:5]


def draw_sweep(sweep: RankSweep) -> Any:
    """Return the figure, four panels, the sweet spot marked in each; the seed's figures are dashed."""
    figure, grid = subplots(2, 2, (11, 7.4))
    quality, parameters, time, serving = grid.flatten()
    _draw_quality(quality, sweep)
    _line(parameters, sweep, lambda point: 100 * point.share, "exact", _BLUE)
    ranks = [point.rank for point in sweep.points]
    said = {rank: share for rank, share in seed("rank_share_percent").items() if min(ranks) <= rank <= max(ranks)}
    parameters.plot(list(said), list(said.values()), "--", color=_GREY, label="the seed text's")
    parameters.set(title="trained parameters", ylabel="% of the base's", yscale="log")
    _line(time, sweep, lambda point: point.seconds, "", _ORANGE)
    time.set(title=f"training, {sweep.steps} steps", ylabel="seconds", ylim=(0, None))
    if all(point.serving for point in sweep.points):
        _line(serving, sweep, lambda point: point.serving.same if point.serving else 0.0, "one adapter", _GREEN)
        _line(serving, sweep, lambda point: point.serving.distinct if point.serving else 0.0, "16 different", _RED)
    serving.set(title="serving, 16 rows", ylabel="output tokens per second", ylim=(0, None))
    for axes in grid.flatten():
        axes.axvline(sweep.sweet_spot.rank, color="black", linestyle=":", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.set_xlabel("rank")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    return figure


def _draw_quality(axes: Any, sweep: RankSweep) -> None:
    if any(point.accuracy is None for point in sweep.points):
        _line(axes, sweep, lambda point: point.loss, "held-out loss", _BLUE)
        axes.axhline(sweep.base_loss, color=_GREY, label="the base's")
        axes.set(title="quality", ylabel="nats a token")
        return
    ranks = [point.rank for point in sweep.points]
    values = [point.accuracy for point in sweep.points]
    errors = [standard_error(point) for point in sweep.points]
    axes.errorbar(ranks, values, yerr=errors, marker="o", markersize=4, capsize=3, color=_BLUE, label="exact answers")
    said = {rank: value for rank, value in seed("rank_accuracy").items() if min(ranks) <= rank <= max(ranks)}
    axes.plot(list(said), list(said.values()), "--", color=_GREY, label="the seed text's")
    if sweep.base_accuracy is not None:
        axes.axhline(sweep.base_accuracy, color=_ORANGE, label="the base's")
    axes.set(title="quality", ylabel=f"accuracy on {sweep.points[0].rows} held-out rows", ylim=(0, 1.05))


def _line(axes: Any, sweep: RankSweep, value: Callable[[RankPoint], float], label: str, colour: str) -> None:
    ranks = [point.rank for point in sweep.points]
    axes.plot(ranks, [value(point) for point in sweep.points], marker="o", markersize=4, color=colour, label=label)
