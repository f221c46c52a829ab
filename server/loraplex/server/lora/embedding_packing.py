"""Packs what an adapter has for the input embedding and for learned positions."""

from __future__ import annotations

import torch

from loraplex.adapters.binding import BoundAdapter, EmbeddingWeights, TokenRows
from loraplex.server.lora.base import BaseParameters
from loraplex.server.lora.buffer import Buffer
from loraplex.server.lora.changes import EmbeddingChanges, EmbeddingLora, ReplacedRows


class EmbeddingPacker:
    """What one adapter has for the tables. `taken` is all of the adapter that has its place here."""

    def __init__(self, bound: BoundAdapter, dtype: torch.dtype, base: BaseParameters) -> None:
        """Find everything and check that it fits; `dtype` is that of A and B.

        Raises:
            ValueError: saying what does not fit.
        """
        self._bound, self._dtype, self._base = bound, dtype, base
        self._lora, self._rows = bound.embedding, bound.token_rows.get(base.embedding)
        self.taken = {("parameters", name) for name in base.tables if name in bound.parameters}
        self.taken |= {("token_rows", base.embedding)} if self._rows else set()
        self.taken |= {("embedding", "")} if self._lora else set()
        self._check()

    def pack(self, buffer: Buffer) -> EmbeddingChanges | None:
        """Put everything into `buffer`; None if there is nothing."""
        if not self.taken:
            return None
        return EmbeddingChanges(
            table=self._table(self._base.embedding, buffer),
            rows=None if self._rows is None else self._token_rows(self._rows, buffer),
            lora=None if self._lora is None else self._pack_lora(self._lora, buffer),
            positions=self._table(self._base.positions, buffer),
        )

    def _table(self, name: str | None, buffer: Buffer) -> torch.Tensor | None:
        table = None if name is None else self._bound.parameters.get(name)
        if table is None:
            return None
        others = (other for other_name, other in self._bound.parameters.items() if other_name != name)
        shared = any(other.data_ptr() == table.data_ptr() for other in others)
        # Looking up widens exactly; but lm_head may have the same matrix, which then lies here once.
        narrow = table.is_floating_point() and table.itemsize < self._base.activations.itemsize
        return buffer.put_once(table, table.dtype if narrow and not shared else self._base.activations)

    def _token_rows(self, found: TokenRows, buffer: Buffer) -> ReplacedRows:
        tokens = buffer.put((len(found.tokens),), torch.int64, lambda: found.tokens)
        return ReplacedRows(tokens, buffer.put_once(found.rows, self._base.activations))

    def _pack_lora(self, found: EmbeddingWeights, buffer: Buffer) -> EmbeddingLora:
        rank, vocab = found.a.shape
        a_t = buffer.put((vocab, rank), self._dtype, lambda: found.a.float().T)
        b_t = buffer.put((rank, len(found.b)), self._dtype, lambda: (found.b.float() * found.scaling).T)
        return EmbeddingLora(a_t, b_t)

    def _check(self) -> None:
        vocab, hidden = self._base.tables[self._base.embedding]
        for name, shape in self._base.tables.items():
            if name in self._bound.parameters:
                self._check_shape(name, self._bound.parameters[name], shape)
        if self._rows is not None:
            self._check_shape("token rows", self._rows.rows, (len(self._rows.tokens), hidden))
        if self._lora is not None:
            self._check_shape("A of the embedding", self._lora.a, (len(self._lora.a), vocab))
            self._check_shape("B of the embedding", self._lora.b, (hidden, len(self._lora.a)))

    def _check_shape(self, what: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != expected:
            raise ValueError(f"adapter {self._bound.digest}, {what}: {tuple(tensor.shape)} instead of {expected}")
