"""Attention on CPUs: a compiled kernel for decode rows and short chunks, and one for the other chunks of prompts."""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loraplex.server.attention import cpu_kernel as kernel
from loraplex.server.attention.chunk_kernel import chunk_kernel
from loraplex.server.attention.chunks import Chunk, Chunks, lay_out_chunks
from loraplex.server.attention.interface import AttentionParams, check_shapes
from loraplex.server.engine.batch import Batch
from loraplex.server.engine.kv_cache import LayerKVCache
from loraplex.server.native.program import StepArguments
from loraplex.server.native.workspace import empty

# Queries that share a KV head from which on the kernel for chunks is the faster one.
CHUNK_QUERIES = 16
# Work, in pairs times query heads, below which waking a second thread costs more than it saves.
SERIAL_PAIRS = 1000

Integers = npt.NDArray[np.int64]

_CALL = struct.Struct(f"{kernel.CALL_INTEGERS}q{kernel.CALL_FLOATS}d{kernel.COUNTER_BYTES}x")


@dataclass(frozen=True)
class _Plan:
    """What all layers of one step have in common. `kept` owns the memory that `arguments` points into."""

    batch: Batch
    layout: tuple[int, ...]
    arguments: npt.NDArray[np.int64]
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
        out = empty(*q.shape, dtype=q.dtype)
        kv_heads, block_size, head_dim = cache.k.shape[1:]
        plan = self._planned(batch, cache, q.shape[1])
        _CALL.pack_into(
            plan.arguments.data,
            0,
            *(q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), out.data_ptr()),
            *(cache.k.data_ptr(), cache.v.data_ptr(), q.shape[1], kv_heads, head_dim, block_size),
            *(params.window or 0, params.scale, params.softcap or 0.0),
        )
        run(plan.address, plan.threads)
        if plan.chunks is not None:
            plan.chunks.attend(q, cache, out, params)
        return out

    def step_arguments(self, batch: Batch, cache: LayerKVCache, heads: int, dtype: torch.dtype) -> StepArguments | None:
        """Return what recorded calls need to attend for `batch`; None if a kernel alone cannot do it."""
        plan = self._planned(batch, cache, heads)
        if plan.chunks is not None:
            return None
        run = kernel.attention_kernel(dtype, cache.k.dtype)
        return StepArguments(run, kernel.STEP_FIELDS, plan.arguments[kernel.STEP_FIELDS :], plan)

    def _planned(self, batch: Batch, cache: LayerKVCache, heads: int) -> _Plan:
        num_blocks, kv_heads, block_size, head_dim = cache.k.shape
        layout = (heads, kv_heads, head_dim, block_size, cache.k.itemsize)
        plan = self._plan
        if plan is None or plan.batch is not batch or plan.layout != layout:
            plan = self._plan = _make_plan(batch, layout, num_blocks)
        return plan


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
    lengths, contexts = np.array(batch.query_lens_cpu), np.array(batch.context_lens_cpu)
    starts = np.cumsum(lengths) - lengths
    group = heads // kv_heads
    is_chunk = (lengths > 1) & (lengths * group >= CHUNK_QUERIES)
    chunks = [
        Chunk(int(row), *(int(each[row]) for each in (starts, lengths, contexts))) for row in np.flatnonzero(is_chunk)
    ]
    query_table = _queries(lengths, contexts, starts, np.flatnonzero(~is_chunk))
    item_table = _items(query_table)
    queries, items, pairs = len(query_table), len(item_table), int(query_table[:, kernel.CONTEXT].sum())
    threads = 1 if pairs * heads < SERIAL_PAIRS and len(slots) < SERIAL_PAIRS else torch.get_num_threads()
    parts_of_scratch = (group * head_dim, group * head_dim, group * kernel.PART, block_size * head_dim)
    # For all threads: a recorded step runs on all.
    scratch = np.empty((torch.get_num_threads(), sum(parts_of_scratch)), dtype=np.float32)
    sums, scores, buffer, scratch_size = (4 * end for end in itertools.accumulate(parts_of_scratch))
    partials = np.empty((max(1, items), heads, head_dim + 2), dtype=np.float32)
    arguments = np.zeros(kernel.NUM_ARGUMENTS, dtype=np.int64)
    arguments[kernel.STEP_FIELDS :] = (
        *(slots.shape[0], slots.data_ptr(), queries, query_table.ctypes.data, items, item_table.ctypes.data),
        *(tables.data_ptr(), tables.stride(0), partials.ctypes.data, items > queries, item_size),
        *(scratch.ctypes.data, scratch_size, sums, scores, buffer),
    )
    kept = (slots, tables, query_table, item_table, partials, scratch)
    laid_out = lay_out_chunks(chunks, tables, group, head_dim)
    return _Plan(batch, layout, arguments, arguments.ctypes.data, kept, threads, laid_out)


def _queries(lengths: Integers, contexts: Integers, starts: Integers, rows: Integers) -> Integers:
    """Return the kernel's queries (n, QUERY_FIELDS): every new token of the batch's `rows`."""
    row = np.repeat(rows, lengths[rows])
    within = np.arange(len(row)) - np.repeat(np.cumsum(lengths[rows]) - lengths[rows], lengths[rows])
    context = contexts[row] - lengths[row] + 1 + within
    parts = -(-context // kernel.PART)
    columns = {
        kernel.TOKEN: starts[row] + within,
        kernel.CONTEXT: context,
        kernel.ROW: row,
        kernel.PARTS: parts,
        kernel.FIRST_ITEM: np.cumsum(parts) - parts,
    }
    return np.stack([columns[field] for field in range(kernel.QUERY_FIELDS)], axis=1).astype(np.int64, copy=False)


def _items(queries: Integers) -> Integers:
    """Return the kernel's items (n, ITEM_FIELDS): every part of every query's context."""
    query = np.repeat(np.arange(len(queries)), queries[:, kernel.PARTS])
    part = np.arange(len(query)) - queries[query, kernel.FIRST_ITEM]
    return np.stack((query, part), axis=1).astype(np.int64, copy=False)


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
