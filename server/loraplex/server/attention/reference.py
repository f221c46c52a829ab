"""Attention as a loop over rows in plain float32 PyTorch: the definition that the fast ones are tested against."""

from __future__ import annotations

import torch

from loraplex.server.attention.interface import AttentionParams
from loraplex.server.engine.batch import Batch
from loraplex.server.engine.kv_cache import LayerKVCache


def write_cache(k: torch.Tensor, v: torch.Tensor, cache: LayerKVCache, slot_mapping: torch.Tensor) -> None:
    """Store the new tokens' keys and values, (T, num_kv_heads, head_dim) each, in their slots."""
    block_size = cache.k.shape[2]
    block, offset = slot_mapping // block_size, slot_mapping % block_size
    cache.k[block, :, offset] = k.to(cache.k.dtype)
    cache.v[block, :, offset] = v.to(cache.v.dtype)


def gather_row(memory: torch.Tensor, block_table: torch.Tensor, length: int) -> torch.Tensor:
    """Return a row's cached keys or values in order, float32 (num_kv_heads, length, head_dim)."""
    block_size = memory.shape[2]
    blocks = memory[block_table[: -(-length // block_size)].long()]  # (blocks, heads, block_size, head_dim)
    return blocks.transpose(0, 1).flatten(1, 2)[:, :length].float()


class ReferenceAttention:
    """Implements `Attention` on any device; no speed is intended."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: LayerKVCache,
        batch: Batch,
        params: AttentionParams,
    ) -> torch.Tensor:
        """See `Attention`."""
        write_cache(k, v, cache, batch.slot_mapping)
        out = torch.empty_like(q)
        start = 0
        for row, (length, context) in enumerate(zip(batch.query_lens_cpu, batch.context_lens_cpu, strict=True)):
            keys = gather_row(cache.k, batch.block_tables[row], context)
            values = gather_row(cache.v, batch.block_tables[row], context)
            out[start : start + length] = _attend(q[start : start + length].float(), keys, values, params).to(q.dtype)
            start += length
        return out


def _attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, params: AttentionParams) -> torch.Tensor:
    length, heads, _ = q.shape
    context, group = keys.shape[1], heads // keys.shape[0]
    scores = torch.einsum("qhd,hkd->hqk", q, keys.repeat_interleave(group, 0)) * params.scale
    if params.softcap is not None:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    query = torch.arange(context - length, context, device=q.device)[:, None]
    key = torch.arange(context, device=q.device)[None, :]
    hidden = key > query
    if params.window is not None:
        hidden |= key <= query - params.window
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
    return torch.einsum("hqk,hkd->qhd", weights, values.repeat_interleave(group, 0))
