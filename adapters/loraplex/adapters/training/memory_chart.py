"""Draws a memory plan as stacked bars. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from loraplex.adapters.training.figure import COLOURS, save_figure, subplots
from loraplex.adapters.training.memory import PARTS, MemoryPlan

GB = 1e9


def draw_memory(plan: MemoryPlan, path: Path) -> None:
    """Write the plan to `path` (PNG or SVG): a bar for each way to train and to serve, the seed's figures as marks."""
    figure, axes = subplots(1, 1, (1.6 + 1.25 * len(plan.rows), 4.2))
    places = range(len(plan.rows))
    below = [0.0] * len(plan.rows)
    for part, colour in zip(PARTS, COLOURS, strict=False):
        heights = [row.parts.get(part, 0) / GB for row in plan.rows]
        if any(heights):
            axes.bar(places, heights, 0.62, bottom=below, label=part.replace("_", " "), color=colour)
        below = [bottom + height for bottom, height in zip(below, heights, strict=True)]
    for place, (row, top) in enumerate(zip(plan.rows, below, strict=True)):
        axes.text(place, top, f"{top:.3g}", ha="center", va="bottom", fontsize=8)
        if row.seed_gb is not None:
            label = "the seed text's figure" if place == 0 else None
            axes.plot([place - 0.4, place + 0.4], [row.seed_gb] * 2, color="black", linestyle="--", label=label)
    axes.set_xticks(places, [f"{row.purpose}\n{row.method}" for row in plan.rows])
    axes.set(ylabel="GB (10^9 bytes) at the peak", title=f"{plan.model}: {plan.parameters / 1e9:.3g} B parameters")
    axes.margins(y=0.1)
    axes.legend(fontsize=8)
    save_figure(figure, path)
