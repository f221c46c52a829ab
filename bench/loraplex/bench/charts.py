"""Draws measurements as PNG or SVG files. Needs matplotlib; knows documents, not servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BLUE, ORANGE, GREY, RED = "#2f6db3", "#d9822b", "#8a8a8a", "#b03030"
DPI = 110
RATE = "output tokens per second"
W16_CASES = ("base", "same", "mixed", "mixed_r8")


def draw_cpu(document: Mapping[str, Any], path: Path) -> None:
    """Draw W16's cases and the sweeps of a document of `cpu_report`."""
    figure, (bars, rows, ranks) = _subplots(1, 3, (13, 3.8))
    servers = dict(zip(document["base_tok_s"], (BLUE, ORANGE, GREY, RED), strict=False))
    width = 0.8 / len(servers)
    for number, (name, colour) in enumerate(servers.items()):
        places = [at + (number - (len(servers) - 1) / 2) * width for at in range(len(W16_CASES))]
        values = [document[f"{case}_tok_s"][name] for case in W16_CASES]
        bars.bar(places, values, width, label=name, color=colour)
        _line(rows, document["rows_tok_s"][name], name, colour)
        _line(ranks, document["ranks_tok_s"][name], name, colour)
    bars.set_xticks(range(len(W16_CASES)), W16_CASES)
    bars.set(title="16 requests at once", ylabel=RATE)
    rows.set(title="rows, no adapter", ylabel=RATE, ylim=(0, None))
    ranks.set(title="rank; 16 rows over 4 adapters", ylabel=RATE, ylim=(0, None))
    bars.legend(fontsize=8)
    _save(figure, path)


def draw_growth(document: Mapping[str, Any], path: Path) -> None:
    """Draw tokens per second and step time of a document of `growth`, a column for each sweep."""
    sweeps = document["sweeps"]
    figure, grid = _subplots(2, len(sweeps), (3.4 * len(sweeps), 6))
    for column, sweep in enumerate(sweeps.values()):
        for row, (key, label) in enumerate((("tok_s", RATE), ("step_ms", "decode step, ms"))):
            points = {str(point["x"]): point[key] for point in sweep["points"] if point[key]}
            _line(grid[row][column], points, "", BLUE)
            grid[row][column].set(xlabel=sweep["x"], ylabel=label, ylim=(0, None))
        grid[0][column].set_title(sweep["what"], fontsize=8)
    _save(figure, path)


def draw_peers(entries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw base and mixed tokens per second of every system that ran; wrong answers are hatched and say so."""
    shown = [entry for entry in reversed(entries) if entry["base_tok_s"] or entry["mixed_tok_s"]]
    figure, axes = _subplots(1, 1, (8.5, 1.1 + 0.62 * len(shown)))
    longest = 1.0
    for place, entry in enumerate(shown):
        for offset, case, colour in ((0.2, "base", GREY), (-0.2, "mixed", BLUE)):
            key = f"{case}_tok_s"
            wrong = case in entry["judged"] and not entry["judged"][case]["correct"]
            _bar(axes, place + offset, entry[key], RED if wrong else colour, wrong)
            longest = max(longest, entry[key] or 0.0)
    axes.set_yticks(range(len(shown)), [entry["system"] for entry in shown])
    axes.set(xlabel=f"{RATE}, 16 requests at once", xlim=(0, 1.3 * longest))
    for colour, label in ((GREY, "no adapter"), (BLUE, "16 adapters of ranks 8 to 64")):
        axes.barh(0, 0, color=colour, label=label)
    axes.legend(fontsize=8, loc="lower right")
    _save(figure, path)


def draw_gpu(document: Mapping[str, Any], path: Path) -> None:
    """Draw the measured steps of a document of `gpu.document`, beside what the model says of the targets' steps."""
    figure, (steps, targets) = _subplots(1, 2, (12, 3.8))
    for place, (name, ms) in enumerate(reversed(document["steps_ms"].items())):
        steps.barh(place, ms, color=BLUE)
        steps.text(ms, place, f" {name}: {ms:.2f}", va="center", fontsize=8)
    steps.set(title=f"decode steps of {document['model']}", xlabel="ms", yticks=[])
    steps.margins(x=0.6)
    for place, (name, step) in enumerate(reversed(document["modelled"]["steps"].items())):
        targets.barh(place, step["modelled_ms"], color=GREY)
        targets.barh(place, step["bound_ms"], color=ORANGE)
        targets.text(step["modelled_ms"], place, f" {name}: {step['modelled_ms']:.2f}", va="center", fontsize=8)
    targets.set(
        title=f"modelled: reading (orange) and launches, {document['modelled']['card']}", xlabel="ms", yticks=[]
    )
    targets.margins(x=0.6)
    _save(figure, path)


def _bar(axes: Any, place: float, value: float | None, colour: str, wrong: bool) -> None:
    fill = "white" if wrong else colour
    axes.barh(place, value or 0.0, 0.36, color=fill, edgecolor=colour, hatch="///" if wrong else None)
    text = f" {value:.0f}" if value else " not measured"
    axes.text(value or 0.0, place, text + (", wrong answers" if wrong else ""), va="center", fontsize=8)


def _line(axes: Any, points: Mapping[str, float], label: str, colour: str) -> None:
    """Draw points at even distances, named by their keys."""
    axes.plot(list(points), list(points.values()), marker="o", markersize=4, label=label, color=colour)
    axes.grid(alpha=0.3)


def _subplots(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """Return a figure and its axes: one, a row, or rows of columns."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=rows == 1)


def _save(figure: Any, path: Path) -> None:
    """Write `figure` as its file's ending says, without a time stamp: equal figures give equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(path, dpi=DPI, metadata=metadata)
