"""Attention on CPUs: a compiled kernel for decode rows and short chunks, and one for the other chunks of prompts."""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from loraplex.server.attention import cpu_kernel as kernel
from loraplex.server.attention.chunk_kernel import chunk_kernel
from loraplex.server.attention.chunks import Chunk, Chunks, lay_out_chunks
from loraplex.server.attention.interface import AttentionParams, check_shapes
from loraplex.server.engine.batch import Batch
from loraplex.server.engine.kv_cache import LayerKVCache

# Queries that share a KV head from which on the kernel for chunks is the faster one.
CHUNK_QUERIES = 16
# Work, in pairs times query heads, below which waking a second thread costs more than it saves.
SERIAL_PAIRS = 1000

_CALL = struct.Struct(f"{kernel.CALL_INTEGERS}q{kernel.CALL_FLOATS}d{kernel.COUNTER_BYTES}x")


@dataclass(frozen=True)
class _Plan:
    """What all layers of one step have in common. `kept` owns the memory that `arguments` points into."""

    batch: Batch
    layout: tuple[int, ...]
    arguments: memoryview
    address: int
    kept: tuple[Any, ...]
    threads: int
    chunks: Chunks | None


class CpuAttention:
    """Implements `Attention`; see there for semantics and shapes.

    Activations and cache are both float32 or both bfloat16, or the cache alone is bfloat16; the cache is contiguous.
    Keeps the last batch's plan, because all layers of a step ask with the same batch. Use from one thread at a time.
    """

    def __init__(self) -> None:
        """Start without a plan; kernels are compiled when their dtypes are first met, or by `warm_up`."""
        self._plan: _Plan | None = None

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: LayerKVCache,
        batch: Batch,
        params: AttentionParams,
    ) -> torch.Tensor:
        """Write k and v and attend, by the first kernel; then the chunks, which read the cache as it is after that."""
        check_shapes(q, k, v, cache, batch)
        if not (cache.k.is_contiguous() and cache.v.is_contiguous()):
            raise ValueError("the kernel reads a contiguous cache only, it does not fit this one")
        run = kernel.attention_kernel(q.dtype, cache.k.dtype)
        q, k, v = _heads_together(q), _heads_together(k), _heads_together(v)
        out = torch.empty(q.shape, dtype=q.dtype)
        _, kv_heads, block_size, head_dim = cache.k.shape
        layout = (q.shape[1], kv_heads, head_dim, block_size, cache.k.itemsize)
        plan = self._plan
        if plan is None or plan.batch is not batch or plan.layout != layout:
            plan = self._plan = _make_plan(batch, layout, cache.k.shape[0])
        _CALL.pack_into(
            plan.arguments,
            0,
            *(q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), out.data_ptr()),
            *(cache.k.data_ptr(), cache.v.data_ptr(), q.shape[1], kv_heads, head_dim, block_size),
            *(params.window or 0, params.scale, params.softcap or 0.0),
        )
        run(plan.address, plan.threads)
        if plan.chunks is not None:
            plan.chunks.attend(q, cache, out, params)
        return out


def warm_up(activation: torch.dtype, cached: torch.dtype) -> None:
    """Compile the kernels for these dtypes, or load them from disk; thread-safe.

    Raises:
        ValueError: if there is no kernel for them.
    """
    kernel.attention_kernel(activation, cached)
    chunk_kernel(activation, cached)


def _heads_together(x: torch.Tensor) -> torch.Tensor:
    """Return x with each token's heads contiguous; tokens may lie apart (a slice of a packed projection)."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _make_plan(batch: Batch, layout: tuple[int, ...], num_blocks: int) -> _Plan:
    """Divide the batch into the first kernel's queries and items, and chunks."""
    heads, kv_heads, head_dim, block_size, item_size = layout
    tables, slots = batch.block_tables.to(torch.int32).contiguous(), batch.slot_mapping.to(torch.int64).contiguous()
    _check_addresses(batch, tables, slots, block_size, num_blocks)
    queries: list[tuple[int, int, int, int, int]] = []
    items: list[tuple[int, int]] = []
    chunks: list[Chunk] = []
    group = heads // kv_heads
    start = pairs = 0
    for row, (length, context) in enumerate(zip(batch.query_lens_cpu, batch.context_lens_cpu, strict=True)):
        if length > 1 and length * group >= CHUNK_QUERIES:
            chunks.append(Chunk(row, start, length, context))
        else:
            for i in range(length):
                seen = context - length + 1 + i
                parts = -(-seen // kernel.PART)
                items.extend((len(queries), part) for part in range(parts))
                queries.append((start + i, seen, row, parts, len(items) - parts))
                pairs += seen
        start += length
    query_table = np.array(queries, dtype=np.int64).reshape(-1, kernel.QUERY_FIELDS)
    item_table = np.array(items, dtype=np.int64).reshape(-1, kernel.ITEM_FIELDS)
    threads = 1 if pairs * heads < SERIAL_PAIRS and start < SERIAL_PAIRS else torch.get_num_threads()
    parts_of_scratch = (group * head_dim, group * head_dim, group * kernel.PART, block_size * head_dim)
    scratch = np.empty((threads, sum(parts_of_scratch)), dtype=np.float32)
    sums, scores, buffer, scratch_size = (4 * end for end in itertools.accumulate(parts_of_scratch))
    partials = np.empty((max(1, len(items)), heads, head_dim + 2), dtype=np.float32)
    arguments = np.zeros(kernel.NUM_ARGUMENTS, dtype=np.int64)
    arguments[kernel.STEP_FIELDS :] = (
        *(slots.shape[0], slots.data_ptr(), len(queries), query_table.ctypes.data, len(items), item_table.ctypes.data),
        *(tables.data_ptr(), tables.stride(0), partials.ctypes.data, len(items) > len(queries), item_size),
        *(scratch.ctypes.data, scratch_size, sums, scores, buffer),
    )
    kept = (slots, tables, query_table, item_table, partials, scratch)
    laid_out = lay_out_chunks(chunks, tables, group, head_dim)
    return _Plan(batch, layout, arguments.data, arguments.ctypes.data, kept, threads, laid_out)


def _check_addresses(batch: Batch, tables: torch.Tensor, slots: torch.Tensor, block_size: int, num_blocks: int) -> None:
    """Refuse what would make the kernel touch memory outside the cache; once a step.

    Raises:
        ValueError: if lengths, slots or block numbers do not fit the cache.
    """
    lengths, contexts = batch.query_lens_cpu, batch.context_lens_cpu
    if sum(lengths) != slots.shape[0] or any(not 0 < n <= c for n, c in zip(lengths, contexts, strict=True)):
        raise ValueError(f"query lengths {lengths} do not fit contexts {contexts} and {slots.shape[0]} slots")
    if max(contexts, default=0) > tables.shape[1] * block_size or tables.shape[0] < len(lengths):
        raise ValueError(f"block tables of {tuple(tables.shape)} are too small for contexts {contexts}")
    for what, values, limit in (("slot", slots, num_blocks * block_size), ("block", tables, num_blocks)):
        if values.numel():
            low, high = (int(x) for x in values.aminmax())
            if low < 0 or high >= limit:
                raise ValueError(f"{what} numbers from {low} to {high} are not within the cache's {limit}")
