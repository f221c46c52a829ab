"""`SiteChanges` in torch, on any device: what comes before and after the slices of A and B.

For activations in float32, in which all sums are made then; a narrower y is rounded by every change.
"""

from __future__ import annotations

import torch

from loraplex.server.lora.changes import SiteChanges
from loraplex.server.lora.segments import Segment
from loraplex.server.models.linear import product


def change_output(y: torch.Tensor, x: torch.Tensor, segment: Segment, changes: SiteChanges) -> None:
    """Replace columns of the segment's rows of `y` (T, out_features), and multiply them by the factors."""
    tokens = slice(segment.start, segment.end)
    rows = y[tokens]
    for columns in changes.columns:
        rows[:, columns.start : columns.end] = product(x[tokens].to(columns.weight.dtype), columns.weight)
    for replaced in changes.rows:
        rows[:, replaced.tokens] = product(x[tokens].to(replaced.rows.dtype), replaced.rows).to(y.dtype)
    if changes.factors is not None:
        rows.mul_(changes.factors)


def add_biases(y: torch.Tensor, segment: Segment, changes: SiteChanges) -> None:
    """Add what comes last to the segment's rows of `y` (T, out_features)."""
    rows = y[segment.start : segment.end]
    if changes.scaled_bias is not None:
        rows.add_(changes.scaled_bias, alpha=segment.scale)
    if changes.bias is not None:
        rows.add_(changes.bias)
