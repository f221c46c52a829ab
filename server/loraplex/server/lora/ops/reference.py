"""The LoRA operator as a plain loop in float32, on any device: the oracle of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loraplex.server.lora.segments import Segment
from loraplex.server.lora.weights import PackedAdapter


@dataclass(frozen=True)
class _Prepared:
    """The segments with the adapter of each."""

    parts: tuple[tuple[Segment, PackedAdapter], ...]


class ReferenceLoraOps:
    """Implements `LoraOps`; see there for semantics and shapes."""

    def prepare(self, segments: Sequence[Segment], slots: Mapping[int, PackedAdapter]) -> _Prepared:
        """Look up each segment's adapter."""
        return _Prepared(tuple((segment, slots[segment.slot]) for segment in segments))

    def add(self, y: torch.Tensor, x: torch.Tensor, site: int, prepared: Any) -> None:
        """Add every segment's part to `y` in place."""
        for segment, adapter in prepared.parts:
            add_segment(y, x, segment, adapter, site)


def add_segment(y: torch.Tensor, x: torch.Tensor, segment: Segment, adapter: PackedAdapter, site: int) -> None:
    """Add one segment's part to `y` in place: float32 products, one rounding to y's dtype at the end."""
    if segment.end > y.shape[0]:
        raise ValueError(f"segment {segment} lies outside the {y.shape[0]} tokens")
    for part in adapter.sites[site]:
        hidden = x[segment.start : segment.end].float() @ part.a.float().T  # (tokens, rank)
        delta = hidden @ part.b_t.float()  # (tokens, width)
        columns = y[segment.start : segment.end, part.start : part.end]
        columns.copy_(columns.float() + segment.scale * delta)
