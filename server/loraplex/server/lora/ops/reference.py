"""The LoRA operator as a plain loop in float32, on any device: the oracle of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loraplex.server.lora.changes import SiteChanges
from loraplex.server.lora.ops.interface import adapters_of
from loraplex.server.lora.segments import Segment
from loraplex.server.lora.weights import PackedAdapter

_NOTHING = SiteChanges(0, 0)


@dataclass(frozen=True)
class _Prepared:
    """The segments with the adapter of each."""

    parts: tuple[tuple[Segment, PackedAdapter], ...]


class ReferenceLoraOps:
    """Implements `LoraOps`; see there for semantics and shapes."""

    def prepare(self, segments: Sequence[Segment], slots: Mapping[int, PackedAdapter]) -> _Prepared:
        """Look up each segment's adapter."""
        return _Prepared(tuple(adapters_of(segments, slots)))

    def add(self, y: torch.Tensor, x: torch.Tensor, site: int, prepared: Any) -> None:
        """Do every segment's part to `y` in place."""
        for segment, adapter in prepared.parts:
            add_segment(y, x, segment, adapter, site)


def add_segment(y: torch.Tensor, x: torch.Tensor, segment: Segment, adapter: PackedAdapter, site: int) -> None:
    """Do one segment's part to `y` in place: all in float32, one rounding to y's dtype at the end."""
    if segment.end > y.shape[0]:
        raise ValueError(f"segment {segment} lies outside the {y.shape[0]} tokens")
    inputs = x[segment.start : segment.end].float()
    outputs = y[segment.start : segment.end].to(torch.float32, copy=True)
    changes = adapter.changes.get(site, _NOTHING)
    for columns in changes.columns:
        outputs[:, columns.start : columns.end] = inputs @ columns.weight.float().T
    for rows in changes.rows:
        outputs[:, rows.tokens] = inputs @ rows.rows.float().T
    if changes.factors is not None:
        outputs *= changes.factors
    for part in adapter.sites[site]:
        outputs[:, part.start : part.end] += segment.scale * (inputs @ part.a.float().T @ part.b_t.float())
    if changes.scaled_bias is not None:
        outputs += segment.scale * changes.scaled_bias
    if changes.bias is not None:
        outputs += changes.bias
    y[segment.start : segment.end] = outputs
