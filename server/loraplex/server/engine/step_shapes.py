"""Which shapes of decode steps are captured, and which of them a step is run as. Pure numbers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import count

_SEGMENT_GROWTH = 4
"""Between the numbers of segments that are captured: an empty segment costs programs that end at once, no more."""


@dataclass(frozen=True, order=True)
class StepShape:
    """Up to `rows` rows of one token; up to `segments` segments of adapters, 0 for a step without LoRA.

    `group` is the group of sites at which adapters may act, the smaller the fewer sites.
    """

    rows: int
    segments: int
    group: int = 0


def step_shapes(max_rows: int, groups: int = 1) -> list[StepShape]:
    """Return the shapes to capture for up to `max_rows` rows and each group of sites, the largest first.

    The largest first, because it takes the memory that the others share, and because every step fits in it: wherever
    capturing is broken off, steps run as the next larger shape.
    """
    return sorted(
        (
            StepShape(rows, segments, group)
            for rows in _rows(max_rows)
            for segments in _segments(rows)
            for group in (range(groups) if segments else (0,))
        ),
        reverse=True,
    )


def choose_shapes(captured: Collection[StepShape], rows: int, segments: int) -> list[StepShape]:
    """Return the smallest captured shapes that hold a step, rows counted first: one for each group of sites."""
    fitting = [shape for shape in captured if shape.rows >= rows and shape.segments >= segments]
    if not fitting:
        return []
    smallest = min(fitting)
    return sorted(s for s in fitting if (s.rows, s.segments) == (smallest.rows, smallest.segments))


def _rows(most: int) -> set[int]:
    """1, 2, 4, 8, 16, then half a power of two apart: 24, 32, 48, 64, ...: a third at most are padding from 16 on."""
    powers = [1 << power for power in range(most.bit_length())]
    halves = [power + power // 2 for power in powers if power >= 16]
    return {rows for rows in (*powers, *halves) if rows < most} | {most}


def _segments(rows: int) -> set[int]:
    """0, and powers of `_SEGMENT_GROWTH` up to one segment a row."""
    found = {0, rows}
    for power in count():
        if _SEGMENT_GROWTH**power >= rows:
            return found
        found.add(_SEGMENT_GROWTH**power)
    raise AssertionError("the powers pass any number")
