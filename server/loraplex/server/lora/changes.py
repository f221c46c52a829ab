"""What an adapter changes in a packed product beside adding its A and B.

Only some kinds of adapters have any of it: DoRA, trained biases, fully trained weights, trained token rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from loraplex.server.lora.buffer import moved


@dataclass(frozen=True)
class ReplacedColumns:
    """The site's columns start:end come from the adapter's own `weight` (end - start, in_features)."""

    weight: torch.Tensor
    start: int
    end: int

    def moved(self, memory: torch.Tensor) -> ReplacedColumns:
        """Return the same in a copy of the adapter's memory."""
        return replace(self, weight=moved(self.weight, memory))


@dataclass(frozen=True)
class ReplacedRows:
    """Rows that take the place of a matrix's at `tokens`, (n,) int64 ascending; `rows` (n, features)."""

    tokens: torch.Tensor
    rows: torch.Tensor

    def moved(self, memory: torch.Tensor) -> ReplacedRows:
        """Return the same in a copy of the adapter's memory."""
        return ReplacedRows(moved(self.tokens, memory), moved(self.rows, memory))


@dataclass(frozen=True)
class SiteChanges:
    """What an adapter does to one site's output; None and () where it leaves something as it is.

    Semantics, for the rows y of a segment, x their input and s the segment's scale:
        y[:, start:end] = x weight^T               for each of `columns`
        y[:, tokens] = x rows^T                    for each of `rows`: the outputs of lm_head are tokens
        y *= factors                               DoRA's magnitude over the norm of the merged weight; 1 elsewhere
        ... here the site's slices are added, the factors folded into B_t ...
        y += s * scaled_bias + bias                a bias on B; what a trained bias differs by from the base's

    Shape: `factors`, `scaled_bias` and `bias` are (out_features,) float32.
    """

    in_features: int
    out_features: int
    columns: tuple[ReplacedColumns, ...] = ()
    rows: tuple[ReplacedRows, ...] = ()
    factors: torch.Tensor | None = None
    scaled_bias: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def moved(self, memory: torch.Tensor) -> SiteChanges:
        """Return the same in a copy of the adapter's memory."""
        return replace(
            self,
            columns=tuple(columns.moved(memory) for columns in self.columns),
            rows=tuple(rows.moved(memory) for rows in self.rows),
            factors=None if self.factors is None else moved(self.factors, memory),
            scaled_bias=None if self.scaled_bias is None else moved(self.scaled_bias, memory),
            bias=None if self.bias is None else moved(self.bias, memory),
        )
