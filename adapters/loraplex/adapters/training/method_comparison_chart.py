"""Draws a comparison of methods: quality, memory and time side by side."""

from __future__ import annotations

from typing import Any

from loraplex.adapters.training.figure import COLOURS, subplots
from loraplex.adapters.training.method_comparison import MethodComparison

_GB = 1e9


def draw_comparison(comparison: MethodComparison) -> Any:
    """Return the figure, three panels; what the plan says of memory stands beside what was measured."""
    figure, (quality, memory, time) = subplots(1, 3, (11, 3.6))
    points = comparison.points
    names = [point.method for point in points]
    places = range(len(points))
    if all(point.run.accuracy is not None for point in points):
        quality.bar(places, [point.run.accuracy for point in points], 0.6, color=COLOURS[0])
        base = points[0].run.base_accuracy
        if base is not None:
            quality.axhline(base, color=COLOURS[4], linestyle="--", label="the base")
            quality.legend(fontsize=8)
        quality.set(title=f"accuracy on {points[0].run.rows} held-out rows", ylim=(0, 1.05))
    else:
        quality.bar(places, [point.run.loss for point in points], 0.6, color=COLOURS[0])
        quality.set(title="held-out loss, nats a token")
    for offset, label, colour, values in (
        (-0.2, "measured", COLOURS[1], [point.run.memory / _GB for point in points]),
        (0.2, "planned", COLOURS[4], [point.planned / _GB for point in points]),
    ):
        memory.bar([place + offset for place in places], values, 0.38, color=colour, label=label)
    memory.set(title="memory at the peak, GB")
    memory.legend(fontsize=8)
    time.bar(places, [point.run.seconds for point in points], 0.6, color=COLOURS[2])
    time.set(title=f"seconds for {comparison.steps} steps")
    for axes in (quality, memory, time):
        axes.set_xticks(places, names)
    return figure
