"""Figures of matplotlib without a display: how they look and how they are written. Needs matplotlib."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

COLOURS = ("#2f6db3", "#d9822b", "#5a9e6f", "#b03030", "#8a8a8a", "#7a5aa6")
DPI = 110


def subplots(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """Return a figure of `size` inches and its axes: one, or an array of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns)


def save_figure(figure: Any, path: Path) -> None:
    """Write `figure` as its file's ending says, without a time stamp: equal figures give equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})


def png_bytes(figure: Any) -> bytes:
    """Return `figure` as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
