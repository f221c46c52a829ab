"""Token ranges and the adapter slot that each uses.

Knows slots and ranges, not weights and not requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Segment:
    """Tokens start:end of the batch use adapter slot `slot`, its output multiplied by `scale`."""

    start: int
    end: int
    slot: int
    scale: float = 1.0


@dataclass(frozen=True)
class LoraBatch:
    """The segments of one batch, by `start`, disjoint; tokens in no segment use the base alone.

    Two things come from one source: `segments` for every token and `logits_segments` for the rows that are left
    after the last layer, where only the `logits_indices` go on (lm_head).
    """

    segments: tuple[Segment, ...]
    logits_segments: tuple[Segment, ...]


def build_segments(rows: Iterable[tuple[int, int | None, float]]) -> tuple[Segment, ...]:
    """Turn (number of tokens, slot or None, scale) per row, in batch order, into segments.

    Neighbours with the same slot and scale become one segment: their tokens then share a matrix product.
    """
    segments: list[Segment] = []
    start = 0
    for length, slot, scale in rows:
        end = start + length
        if slot is not None and length:
            last = segments[-1] if segments else None
            if last and (last.end, last.slot, last.scale) == (start, slot, scale):
                segments[-1] = Segment(last.start, end, slot, scale)
            else:
                segments.append(Segment(start, end, slot, scale))
        start = end
    return tuple(segments)
