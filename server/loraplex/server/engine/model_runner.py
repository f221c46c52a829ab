"""Runs one step on the device: builds the batch, runs the decoder once, chooses the tokens.

Everything of the engine that touches a tensor happens in this class. Knows nothing about queues, text or requests'
lifetimes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
import torch

from loraplex.server.engine.batch import Batch
from loraplex.server.engine.kv_cache import KVCache
from loraplex.server.engine.request import Logprobs
from loraplex.server.engine.sampler import Sampler, SamplingRow
from loraplex.server.engine.scheduler import ScheduledSequence
from loraplex.server.engine.sequence import Sequence as EngineSequence
from loraplex.server.errors import EngineError
from loraplex.server.lora.ops.interface import LoraContext, LoraOps
from loraplex.server.lora.overrides import find_overrides
from loraplex.server.lora.segments import LoraBatch, build_segments
from loraplex.server.lora.weights import PackedAdapter

SlotOf = Callable[[str], int]


class ForwardPass(Protocol):
    """What the runner asks of a decoder."""

    def forward(self, batch: Batch, kv_cache: KVCache, lora: LoraContext | None) -> torch.Tensor:
        """Return the float32 logits (L, vocab) at `batch.logits_indices`."""


class ModelRunner:
    """Owns the decoder, the KV cache and the sampler."""

    def __init__(
        self,
        decoder: ForwardPass,
        kv_cache: KVCache,
        lora_ops: LoraOps,
        device: torch.device,
        current: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """Make batches on `device`; `current` makes the decoder's device that of the thread which runs a step."""
        self._decoder = decoder
        self._kv_cache = kv_cache
        self._lora_ops = lora_ops
        self._device = device
        self._current = current
        self._sampler = Sampler()

    @torch.inference_mode()
    def run(
        self, scheduled: Sequence[ScheduledSequence], slot_of: SlotOf, slots: Mapping[int, PackedAdapter]
    ) -> dict[ScheduledSequence, Logprobs | EngineError]:
        """Compute the scheduled tokens; return the next token of every sequence whose last token was reached.

        A row whose logits are not finite gets an EngineError; the others are not affected.
        """
        with self._current():
            return self._run(sorted(scheduled, key=lambda s: _batch_order(s, slot_of)), slot_of, slots)

    def _run(
        self, rows: Sequence[ScheduledSequence], slot_of: SlotOf, slots: Mapping[int, PackedAdapter]
    ) -> dict[ScheduledSequence, Logprobs | EngineError]:
        batch = build_batch(rows, slot_of, self._kv_cache.shape.block_size, self._device)
        logits = self._decoder.forward(batch, self._kv_cache, self._lora_context(batch, slots))
        sampling = [row for row in rows if row.samples]
        if not sampling:
            return {}
        results = self._sampler(logits, [_sampling_row(row) for row in sampling])
        return dict(zip(sampling, results, strict=True))

    def _lora_context(self, batch: Batch, slots: Mapping[int, PackedAdapter]) -> LoraContext | None:
        if batch.lora is None:
            return None
        tokens = self._lora_ops.prepare(batch.lora.segments, slots)
        same = batch.lora.logits_segments == batch.lora.segments
        return LoraContext(
            self._lora_ops,
            tokens=tokens,
            logits=tokens if same else self._lora_ops.prepare(batch.lora.logits_segments, slots),
            overrides=find_overrides(batch.lora, slots),
        )


def _batch_order(row: ScheduledSequence, slot_of: SlotOf) -> tuple[bool, int, float]:
    """Decodes first; among each kind, equal adapters side by side, so that they share a segment."""
    digest, scale = row.seq.adapter_key
    return (row.num_tokens != 1, -1 if digest is None else slot_of(digest), scale)


def _sampling_row(row: ScheduledSequence) -> SamplingRow:
    seq = row.seq
    assert seq.request.params.seed is not None, "the engine draws a seed for every request"
    return SamplingRow(
        params=seq.request.params,
        seed=seq.request.params.seed,
        choice=seq.choice,
        position=seq.num_output_tokens,
        prompt_token_ids=seq.request.prompt_token_ids,
        output_token_ids=seq.output_token_ids,
    )


def build_batch(rows: Sequence[ScheduledSequence], slot_of: SlotOf, block_size: int, device: torch.device) -> Batch:
    """Lay the rows' new tokens side by side, in the order given: rows of one token first.

    Raises:
        ValueError: if there are no rows.
    """
    if not rows:
        raise ValueError("a batch needs at least one row")
    token_ids: list[int] = []
    positions: list[np.ndarray] = []
    slot_mapping: list[np.ndarray] = []
    block_tables = np.zeros((len(rows), max(len(row.seq.block_table) for row in rows)), dtype=np.int32)
    for index, row in enumerate(rows):
        seq, start = row.seq, row.seq.num_computed_tokens
        table = np.asarray(seq.block_table, dtype=np.int64)
        block_tables[index, : len(table)] = table
        where = np.arange(start, start + row.num_tokens, dtype=np.int64)
        token_ids.extend(seq.token_ids[start : start + row.num_tokens])
        positions.append(where)
        slot_mapping.append(table[where // block_size] * block_size + where % block_size)
    query_lens = tuple(row.num_tokens for row in rows)
    context_lens = tuple(row.seq.num_computed_tokens + row.num_tokens for row in rows)
    ends = np.cumsum(query_lens)
    samples = np.array([row.samples for row in rows])

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return Batch(
        token_ids=tensor(np.asarray(token_ids, dtype=np.int64)),
        positions=tensor(np.concatenate(positions)),
        slot_mapping=tensor(np.concatenate(slot_mapping)),
        query_start=tensor(np.concatenate(([0], ends)).astype(np.int32)),
        context_lens=tensor(np.asarray(context_lens, dtype=np.int32)),
        block_tables=tensor(block_tables),
        logits_indices=tensor((ends - 1)[samples].astype(np.int64)),
        num_decodes=sum(1 for length in query_lens if length == 1),
        query_lens_cpu=query_lens,
        context_lens_cpu=context_lens,
        lora=_lora_batch(rows, slot_of),
    )


def _lora_batch(rows: Sequence[ScheduledSequence], slot_of: SlotOf) -> LoraBatch | None:
    def entries(seq: EngineSequence, first: int, length: int) -> Iterator[tuple[int, int | None, float]]:
        digest, scale = seq.adapter_key
        if digest is None:
            yield length, None, scale
            return
        before = min(max(seq.adapter_start - first, 0), length)
        yield before, None, scale
        yield length - before, slot_of(digest), scale

    spans = [(row.seq, row.seq.num_computed_tokens, row.num_tokens) for row in rows]
    lasts = [(seq, first + length - 1, 1) for row, (seq, first, length) in zip(rows, spans, strict=True) if row.samples]
    segments = build_segments(entry for span in spans for entry in entries(*span))
    if not segments:
        return None  # a batch without adapters skips all of it
    return LoraBatch(segments, build_segments(entry for last in lasts for entry in entries(*last)))
