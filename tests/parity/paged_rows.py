"""Drives a decoder as the engine does: rows with block tables, chunks of prompts and decodes in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from loraplex.server.engine.batch import Batch
from loraplex.server.engine.kv_cache import KVCache, KVCacheShape
from loraplex.server.engine.model_runner import ForwardPass
from loraplex.server.lora.ops.interface import LoraContext
from loraplex.server.models.decoder import Decoder

BLOCK_SIZE = 4

# From (row, tokens computed before, tokens computed now) for each row of a pass, in the batch's order.
ContextOf = Callable[[Sequence[tuple[int, int, int]]], LoraContext | None]


class PagedRows:
    """Some token sequences over one cache; `advance` computes the next tokens of several of them in one pass."""

    def __init__(
        self,
        decoder: Decoder,
        sequences: Sequence[Sequence[int]],
        dtype: torch.dtype,
        *,
        last_only: bool = False,
        run_by: ForwardPass | None = None,
    ) -> None:
        """Let `run_by` compute, by default the decoder itself."""
        config = decoder.config
        blocks = [-(-len(tokens) // BLOCK_SIZE) for tokens in sequences]
        shape = KVCacheShape(config.num_layers, config.num_kv_heads, config.head_dim, BLOCK_SIZE, dtype)
        self._forward = (run_by or decoder).forward
        self._cache = KVCache(shape, sum(blocks) + 1, torch.device("cpu"))
        order = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(0)) + 1
        self._tables = [table.to(torch.int32) for table in order.split(blocks)]
        self._sequences = [torch.tensor(tokens) for tokens in sequences]
        self._computed = [0] * len(sequences)
        self._last_only = last_only
        # Filled as it is computed, one (vocab,) a token; with `last_only` one a pass.
        self.logits: list[list[torch.Tensor]] = [[] for _ in sequences]

    def advance(self, counts: dict[int, int], lora: LoraContext | ContextOf | None = None) -> None:
        """Compute the next `counts[row]` tokens of each row, and keep the logits."""
        rows = sorted(counts, key=lambda row: counts[row] != 1)
        batch = self._batch(rows, [counts[row] for row in rows])
        context = lora([(row, self._computed[row], counts[row]) for row in rows]) if callable(lora) else lora
        logits = self._forward(batch, self._cache, context).clone()  # the next pass may change it
        assert logits.dtype == torch.float32
        kept = [1 if self._last_only else counts[row] for row in rows]
        for row, part in zip(rows, logits.split(kept), strict=True):
            self.logits[row].extend(part)
            self._computed[row] += counts[row]

    def advance_mixed(self, lora: LoraContext | ContextOf | None = None) -> None:
        """Compute everything: prompts in chunks beside other rows' decodes, at the end decodes alone."""
        left = {row: len(tokens) for row, tokens in enumerate(self._sequences)}
        step = 0
        while any(left.values()):
            wanted = {row: 1 if (row + step) % 3 and left[row] < 12 else 7 for row, n in left.items() if n}
            counts = {row: min(n, left[row]) for row, n in wanted.items()}
            self.advance(counts, lora)
            left = {row: n - counts.get(row, 0) for row, n in left.items()}
            step += 1

    def _batch(self, rows: Sequence[int], counts: Sequence[int]) -> Batch:
        positions = [torch.arange(self._computed[r], self._computed[r] + n) for r, n in zip(rows, counts, strict=True)]
        slots = [
            self._tables[r][where // BLOCK_SIZE].long() * BLOCK_SIZE + where % BLOCK_SIZE
            for r, where in zip(rows, positions, strict=True)
        ]
        contexts = [self._computed[r] + n for r, n in zip(rows, counts, strict=True)]
        return Batch(
            token_ids=torch.cat([self._sequences[r][where] for r, where in zip(rows, positions, strict=True)]),
            positions=torch.cat(positions),
            slot_mapping=torch.cat(slots),
            query_start=torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            block_tables=torch.nn.utils.rnn.pad_sequence([self._tables[r] for r in rows], batch_first=True),
            logits_indices=torch.tensor(counts).cumsum(0) - 1 if self._last_only else torch.arange(sum(counts)),
            num_decodes=sum(n == 1 for n in counts),
            query_lens_cpu=tuple(counts),
            context_lens_cpu=tuple(contexts),
            lora=None,
        )
