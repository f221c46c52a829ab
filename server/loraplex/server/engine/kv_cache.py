"""The paged key/value memory: one pair of tensors a layer, divided into blocks.

Knows nothing about who owns which block; that is the BlockManager's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from loraplex.server.native.pages import zeros_on_huge_pages


@dataclass(frozen=True)
class LayerKVCache:
    """One layer's memory; `k` and `v` are (num_blocks, num_kv_heads, block_size, head_dim)."""

    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True)
class KVCacheShape:
    """What decides the size of the cache."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        return 2 * self.num_layers * self.num_kv_heads * self.block_size * self.head_dim * self.dtype.itemsize


class KVCache:
    """All layers' key/value memory, allocated once."""

    def __init__(self, shape: KVCacheShape, num_blocks: int, device: torch.device) -> None:
        """Allocate `num_blocks` zeroed blocks in every layer.

        Raises:
            ValueError: if `num_blocks` is not positive.
        """
        if num_blocks < 1:
            raise ValueError(f"a KV cache needs at least one block, got {num_blocks}")
        self.shape = shape
        self.num_blocks = num_blocks
        size = (num_blocks, shape.num_kv_heads, shape.block_size, shape.head_dim)

        def zeros() -> torch.Tensor:
            if device.type != "cpu":
                return torch.zeros(size, dtype=shape.dtype, device=device)
            # Blocks are read in any order, each from a page of its own.
            return zeros_on_huge_pages(math.prod(size) * shape.dtype.itemsize).view(shape.dtype).view(size)

        self.layers = tuple(LayerKVCache(zeros(), zeros()) for _ in range(shape.num_layers))
