"""Where in a step adapters take the place of the base's embeddings and norms; most steps have no such adapter.

Knows nothing of decoders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loraplex.server.lora.segments import LoraBatch, Segment
from loraplex.server.lora.weights import PackedAdapter

Ranges = tuple[tuple[Segment, PackedAdapter], ...]


@dataclass(frozen=True)
class Overrides:
    """The segments whose adapters have embeddings or norms of their own.

    As in `LoraBatch`, `tokens` is about every token and `logits` about the rows that go on to the last norm.
    """

    tokens: Ranges
    logits: Ranges


def find_overrides(batch: LoraBatch, slots: Mapping[int, PackedAdapter]) -> Overrides | None:
    """Return the step's overrides, None if there are none.

    Raises:
        KeyError: if a segment names a slot that is not in `slots`.
    """
    tokens = _overriding(batch.segments, slots)
    return Overrides(tokens, _overriding(batch.logits_segments, slots)) if tokens else None


def _overriding(segments: Sequence[Segment], slots: Mapping[int, PackedAdapter]) -> Ranges:
    chosen = ((segment, slots[segment.slot]) for segment in segments)
    return tuple(entry for entry in chosen if entry[1].norms or entry[1].embedding is not None)
