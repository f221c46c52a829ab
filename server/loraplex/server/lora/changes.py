"""What an adapter changes in the base beside adding its A and B to products.

Only some kinds of adapters have any of it: DoRA, trained biases, fully trained weights and norms, trained token rows,
LoRA on the embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from loraplex.server.lora.buffer import moved
from loraplex.server.models.norms import Norm


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

    @property
    def beyond_slices(self) -> SiteChanges | None:
        """What is left without factors and bias on B, which belong to slices of A and B; None if nothing is."""
        left = self.columns or self.rows or self.bias is not None
        return replace(self, factors=None, scaled_bias=None) if left else None

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


@dataclass(frozen=True)
class EmbeddingLora:
    """Adds `scale * a_t[token] b_t` to a token's embedding; `a_t` (vocab, r), `b_t` (r, hidden), scaling folded in."""

    a_t: torch.Tensor
    b_t: torch.Tensor

    def moved(self, memory: torch.Tensor) -> EmbeddingLora:
        """Return the same in a copy of the adapter's memory."""
        return EmbeddingLora(moved(self.a_t, memory), moved(self.b_t, memory))


@dataclass(frozen=True)
class EmbeddingChanges:
    """What an adapter does to the input embedding, before the base multiplies it by its scale; None where nothing.

    `table` (vocab, hidden) takes the base's place, `rows` that of some of its rows, `lora` is added; `positions`
    (max_positions, hidden) takes the place of learned positions.
    """

    table: torch.Tensor | None = None
    rows: ReplacedRows | None = None
    lora: EmbeddingLora | None = None
    positions: torch.Tensor | None = None

    def moved(self, memory: torch.Tensor) -> EmbeddingChanges:
        """Return the same in a copy of the adapter's memory."""
        return EmbeddingChanges(
            table=None if self.table is None else moved(self.table, memory),
            rows=None if self.rows is None else self.rows.moved(memory),
            lora=None if self.lora is None else self.lora.moved(memory),
            positions=None if self.positions is None else moved(self.positions, memory),
        )


@dataclass(frozen=True)
class ReplacedNorm:
    """A norm that takes the base's place, made by `make` of `tensors`."""

    tensors: tuple[torch.Tensor, ...]
    make: Callable[[tuple[torch.Tensor, ...]], Norm]
    norm: Norm = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Make the norm where its tensors are."""
        object.__setattr__(self, "norm", self.make(self.tensors))

    def moved(self, memory: torch.Tensor) -> ReplacedNorm:
        """Return the same in a copy of the adapter's memory."""
        return ReplacedNorm(tuple(moved(tensor, memory) for tensor in self.tensors), self.make)
