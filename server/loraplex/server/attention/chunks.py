"""The chunks of a step's prompts, laid out for their attention kernel."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from loraplex.server.attention import chunk_kernel as kernel
from loraplex.server.attention.interface import AttentionParams
from loraplex.server.engine.kv_cache import LayerKVCache
from loraplex.server.native.product import WIDTH

# Work, in pairs of queries and keys, below which waking a second thread costs more than it saves.
SERIAL_PAIRS = 10_000

_CALL = struct.Struct(f"{kernel.CALL_INTEGERS}q{kernel.CALL_FLOATS}d{kernel.COUNTER_BYTES}x")


@dataclass(frozen=True)
class Chunk:
    """Tokens start:start + length of the batch, the last of `context`, at `row` of the block tables."""

    row: int
    start: int
    length: int
    context: int


@dataclass(frozen=True)
class Chunks:
    """All chunks of one step. `kept` owns the memory that `arguments` points into."""

    arguments: memoryview
    address: int
    kept: tuple[Any, ...]
    threads: int

    def attend(self, q: torch.Tensor, cache: LayerKVCache, out: torch.Tensor, params: AttentionParams) -> None:
        """Write the attention of the chunks' tokens to `out`, of the batch's shape; the cache has been written."""
        _, kv_heads, block_size, head_dim = cache.k.shape
        _CALL.pack_into(
            self.arguments,
            0,
            *(q.data_ptr(), q.stride(0), out.data_ptr(), cache.k.data_ptr(), cache.v.data_ptr()),
            *(q.shape[1], kv_heads, head_dim, block_size, params.window or 0, params.scale, params.softcap or 0.0),
        )
        kernel.chunk_kernel(q.dtype, cache.k.dtype)(self.address, self.threads)


def lay_out_chunks(chunks: Sequence[Chunk], tables: torch.Tensor, group: int, head_dim: int) -> Chunks | None:
    """Return the kernel's arguments, the most work first, so that no thread begins it when the others are done.

    Args:
        chunks: of one batch.
        tables: (B, max_blocks) int32 block tables, contiguous.
        group: query heads that share a KV head.
        head_dim: numbers of a head.
    """
    if not chunks:
        return None
    items = []
    for chunk in chunks:
        before, queries = chunk.context - chunk.length, chunk.length * group
        for first in range(0, queries, WIDTH):
            items.append((chunk.start, before, chunk.row, first, min(WIDTH, queries - first)))
    items.sort(key=lambda item: -(item[1] + item[3] // group))
    table = np.array(items, dtype=np.int64)
    pairs = sum(chunk.length * group * chunk.context for chunk in chunks)
    threads = 1 if pairs < SERIAL_PAIRS else torch.get_num_threads()
    scratch = np.empty((threads, -(-kernel.scratch_floats(head_dim) // 16) * 16), dtype=np.float32)
    arguments = np.zeros(kernel.NUM_ARGUMENTS, dtype=np.int64)
    arguments[kernel.STEP_FIELDS :] = (
        *(len(items), table.ctypes.data, tables.data_ptr(), tables.stride(0)),
        *(scratch.ctypes.data, scratch.strides[0]),
    )
    return Chunks(arguments.data, arguments.ctypes.data, (table, tables, scratch), threads)
