"""A decoder of one layer in plain torch operations, and LoRA operators for it that can be captured.

Everything that a step reads, lengths included, comes from tensors, as on a GPU. Its float64 logits are the same to the
bit whatever the batch, so that captured and other steps can be compared exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loraplex.server.engine.batch import Batch
from loraplex.server.engine.kv_cache import KVCache
from loraplex.server.lora.ops.interface import LoraContext
from loraplex.server.lora.ops.reference import ReferenceLoraOps
from loraplex.server.lora.segments import Segment
from loraplex.server.lora.weights import PackedAdapter, SliceWeights

VOCAB, HIDDEN = 13, 8
MAX_RANK = 4


def adapter(seed: int, rank: int = 2) -> PackedAdapter:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, HIDDEN, generator=generator)
    b_t = torch.randn(rank, HIDDEN, generator=generator)
    return PackedAdapter(f"adapter-{seed}", ((SliceWeights(a, b_t, 0, HIDDEN),),), a.nbytes + b_t.nbytes, rank)


class TorchDecoder:
    """Implements `ForwardPass`: keys are looked up by token and position, changed by LoRA, and averaged."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._tokens = torch.randn(VOCAB, HIDDEN, generator=generator)
        self._head = torch.randn(HIDDEN, VOCAB, generator=generator)
        self.calls = 0

    def forward(self, batch: Batch, kv_cache: KVCache, lora: LoraContext | None) -> torch.Tensor:
        self.calls += 1
        x = self._tokens[batch.token_ids] + batch.positions[:, None] / 7
        y = x.clone()
        if lora is not None:
            lora.ops.add(y, x, 0, lora.tokens)
        keys = kv_cache.layers[0].k[:, 0].view(-1, HIDDEN)
        keys[batch.slot_mapping] = y
        block_size = kv_cache.shape.block_size
        places = torch.arange(batch.block_tables.shape[1] * block_size)
        slots = batch.block_tables.long()[:, places // block_size] * block_size + places % block_size
        counts = torch.diff(batch.query_start)
        row_of = torch.repeat_interleave(torch.arange(len(counts)), counts, output_size=len(batch.token_ids))
        seen = (places[None, :] <= batch.positions[:, None])[:, :, None]
        context = torch.where(seen, keys[slots[row_of]], 0.0)  # what was never written may be anything
        mixed = context.double().sum(1) / (batch.positions[:, None] + 1)
        return (mixed[batch.logits_indices] @ self._head.double()).float()


@dataclass
class _Reserved:
    """Weights of up to so many segments, and each token's segment; the last one is nobody's and adds nothing."""

    a: torch.Tensor
    b: torch.Tensor
    segment_of: torch.Tensor
    sites: frozenset[int] | None


class StaticTorchOps(ReferenceLoraOps):
    """Implements `StaticLoraOps` by copying weights into what was reserved."""

    def __init__(self) -> None:
        self.reserved: list[frozenset[int] | None] = []

    def reserve(self, tokens: int, segments: int, sites: frozenset[int] | None = None) -> _Reserved:
        self.reserved.append(sites)
        return _Reserved(
            torch.zeros(segments + 1, MAX_RANK, HIDDEN),
            torch.zeros(segments + 1, MAX_RANK, HIDDEN),
            torch.full((tokens,), segments),
            sites,
        )

    def refill(self, prepared: _Reserved, segments: Sequence[Segment], slots: Mapping[int, PackedAdapter]) -> bool:
        adapters = [slots[segment.slot] for segment in segments]
        if adapters and prepared.sites is not None and not prepared.sites:
            return False
        if len(segments) >= len(prepared.a) or any(each.rank > MAX_RANK or each.changes for each in adapters):
            return False
        for part in (prepared.a, prepared.b):
            part.zero_()
        prepared.segment_of.fill_(len(prepared.a) - 1)
        for index, (segment, each) in enumerate(zip(segments, adapters, strict=True)):
            (weights,) = each.sites[0]
            prepared.a[index, : weights.rank] = weights.a
            prepared.b[index, : weights.rank] = weights.b_t * segment.scale
            prepared.segment_of[segment.start : segment.end] = index
        return True

    def add(self, y: torch.Tensor, x: torch.Tensor, site: int, prepared: Any) -> None:
        if not isinstance(prepared, _Reserved):
            super().add(y, x, site, prepared)
            return
        a, b = prepared.a[prepared.segment_of], prepared.b[prepared.segment_of]
        y += ((x[:, None] * a).sum(-1)[..., None] * b).sum(1)
