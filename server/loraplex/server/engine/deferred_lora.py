"""A LoRA operator that prepares nothing until it is known how the step is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from loraplex.server.lora.ops.interface import LoraContext, LoraOps
from loraplex.server.lora.segments import Segment
from loraplex.server.lora.weights import PackedAdapter


@dataclass(frozen=True)
class DeferredSegments:
    """What `prepare` was asked for."""

    segments: Sequence[Segment]
    slots: Mapping[int, PackedAdapter]


class DeferredLoraOps:
    """Implements `LoraOps` but for `add`: a captured step wants the segments, any other step what they prepare to."""

    def __init__(self, ops: LoraOps) -> None:
        self._ops = ops

    def prepare(self, segments: Sequence[Segment], slots: Mapping[int, PackedAdapter]) -> DeferredSegments:
        """Keep what is asked for."""
        return DeferredSegments(segments, slots)

    def add(self, y: torch.Tensor, x: torch.Tensor, site: int, prepared: Any) -> None:
        """Refuse: a step that is not captured runs with `resolved`."""
        raise AssertionError("what is deferred must be resolved before it is used")

    def resolved(self, lora: LoraContext) -> LoraContext:
        """Return the context of a step that is run with the operator itself."""
        tokens, logits = lora.tokens, lora.logits
        assert isinstance(tokens, DeferredSegments), "made by prepare"
        assert isinstance(logits, DeferredSegments), "made by prepare"
        return replace(
            lora,
            ops=self._ops,
            tokens=self._ops.prepare(tokens.segments, tokens.slots),
            logits=self._ops.prepare(logits.segments, logits.slots),
        )
