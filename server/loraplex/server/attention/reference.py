"""Attention as a plain loop over rows in float32, on any device: the oracle of the others."""

from __future__ import annotations

import torch

from loraplex.server.attention.interface import AttentionParams, check_shapes
from loraplex.server.engine.batch import Batch
from loraplex.server.engine.kv_cache import LayerKVCache


class ReferenceAttention:
    """Implements `Attention`; see there for semantics and shapes."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: LayerKVCache,
        batch: Batch,
        params: AttentionParams,
    ) -> torch.Tensor:
        """Write k and v, then attend row by row."""
        check_shapes(q, k, v, cache, batch)
        write_cache(k, v, cache, batch.slot_mapping)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        start = 0
        for row, (length, context) in enumerate(zip(batch.query_lens_cpu, batch.context_lens_cpu, strict=True)):
            keys, values = gather_context(cache, batch.block_tables[row], context)
            out[start : start + length] = attend(q[start : start + length], keys, values, params).to(q.dtype)
            start += length
        return out


def write_cache(k: torch.Tensor, v: torch.Tensor, cache: LayerKVCache, slots: torch.Tensor) -> None:
    """Store k and v, each (T, Hkv, D), at `slots` (T,), rounded to the cache's dtype."""
    block_size = cache.k.shape[2]
    blocks, offsets = slots // block_size, slots % block_size
    cache.k[blocks, :, offsets] = k.to(cache.k.dtype)
    cache.v[blocks, :, offsets] = v.to(cache.v.dtype)


def gather_context(
    cache: LayerKVCache, table: torch.Tensor, context: int, first: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values of the positions first:context of one row as float32, each (Hkv, context - first, D)."""
    _, kv_heads, block_size, head_dim = cache.k.shape
    first_block = first // block_size
    blocks = table[first_block : -(-context // block_size)].long()
    keys, values = (
        part[blocks]
        .transpose(0, 1)
        .reshape(kv_heads, -1, head_dim)[:, first - first_block * block_size : context - first_block * block_size]
        for part in (cache.k, cache.v)
    )
    return keys.float(), values.float()


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, params: AttentionParams) -> torch.Tensor:
    """Return attention of the last n positions of a context, in float32.

    Shape:
        q: (n, Hq, D). keys, values: (Hkv, c, D) float32, c >= n. Result: (n, Hq, D) float32.
    """
    n, heads, head_dim = q.shape
    kv_heads, context, _ = keys.shape
    grouped = q.float().view(n, kv_heads, heads // kv_heads, head_dim)
    scores = torch.einsum("nhgd,hcd->hgnc", grouped, keys) * params.scale
    if params.softcap is not None:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    own = torch.arange(context - n, context, device=q.device)[:, None]
    seen = torch.arange(context, device=q.device)[None, :]
    hidden = seen > own
    if params.window is not None:
        hidden |= seen <= own - params.window
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return torch.einsum("hgnc,hcd->nhgd", weights, values).reshape(n, heads, head_dim)
