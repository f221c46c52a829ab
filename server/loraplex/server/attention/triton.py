"""Attention on a GPU by Triton kernels: every launch is sized by plain numbers, and computes by the batch's tensors.

So nothing is read back from the device, and the launches of a decode step can be captured: `Batch.context_lens_cpu`
then holds the longest contexts that may come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from loraplex.server.attention import triton_kernel as kernel
from loraplex.server.attention.interface import AttentionParams, check_shapes
from loraplex.server.engine.batch import Batch
from loraplex.server.engine.kv_cache import LayerKVCache

# Tokens of a decode row's context that one program takes, and how many programs share the longest contexts.
PART = 128
MAX_PARTS = 32
# Rows of a tile, tokens times query heads of a KV head: matrix products take 16 at least.
_DECODE_ROWS, _PROMPT_ROWS = 16, 64
_WARPS, _STAGES = 4, 2
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class _Call:
    """The tensors of one call, heads side by side in q, k and v."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cache: LayerKVCache
    batch: Batch
    params: AttentionParams
    out: torch.Tensor

    @property
    def kv_heads(self) -> int:
        return self.cache.k.shape[1]

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.q.shape[1] // self.kv_heads

    @property
    def window(self) -> int:
        return self.params.window or 0

    def head_sizes(self) -> dict[str, int]:
        head_dim = self.q.shape[2]
        return {"HEAD_DIM": head_dim, "BLOCK_D": max(16, _power_of_two(head_dim)), "PAGE": self.cache.k.shape[2]}

    def kinds(self) -> dict[str, bool]:
        return {"CAPPED": self.params.softcap is not None, "WINDOWED": self.params.window is not None}

    def keys_at_once(self) -> int:
        """Keys of a tile: keys and values of two tiles fit in shared memory with room for a second program."""
        return max(16, min(64, 16384 // (self.head_sizes()["BLOCK_D"] * self.cache.k.itemsize)))

    def read(self) -> tuple[Any, ...]:
        """The arguments that decode rows and prompts have in common."""
        batch = self.batch
        tables = batch.block_tables
        cache = (self.cache.k, self.cache.v)
        return (self.q, self.q.stride(0), *cache, tables, tables.stride(0), batch.context_lens)

    def scores(self) -> tuple[float, float, int]:
        return (self.params.scale, self.params.softcap or 0.0, self.window)


class TritonAttention:
    """Implements `Attention`; see there for semantics and shapes.

    Activations and cache are float32 or bfloat16; the cache is contiguous. Scores and sums are in float32;
    where activations are in bfloat16, so are the softmax weights when they meet the values, as in FlashAttention. What
    the batch's tensors hold is not checked: that would make the host wait for the device.
    """

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: LayerKVCache,
        batch: Batch,
        params: AttentionParams,
    ) -> torch.Tensor:
        """Write k and v, then attend: decode rows in parts, and prompts in tiles of queries."""
        check_shapes(q, k, v, cache, batch)
        _check(q, cache, batch)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        call = _Call(_heads_together(q), _heads_together(k), _heads_together(v), cache, batch, params, out)
        if not q.shape[0]:
            return out
        _write(call)
        if batch.num_decodes:
            _decode(call)
        if len(batch.query_lens_cpu) > batch.num_decodes:
            _prompts(call)
        return out


def _write(call: _Call) -> None:
    kernel.write_kernel[(call.k.shape[0],)](
        *(call.k, call.k.stride(0), call.v, call.v.stride(0), call.batch.slot_mapping, call.cache.k, call.cache.v),
        HEADS=call.kv_heads,
        BLOCK_H=_power_of_two(call.kv_heads),
        **call.head_sizes(),
        num_warps=_WARPS,
    )


def _decode(call: _Call) -> None:
    batch, heads, head_dim = call.batch, call.q.shape[1], call.q.shape[2]
    rows = batch.num_decodes
    longest = max(batch.context_lens_cpu[:rows])
    seen = longest if call.params.window is None else min(longest, call.params.window)
    parts = min(MAX_PARTS, -(-seen // PART))
    sums = torch.empty(rows, heads, parts, head_dim, dtype=torch.float32, device=call.q.device)
    weights = torch.empty(rows, heads, parts, 2, dtype=torch.float32, device=call.q.device)
    sizes = {"PART": PART, "MAX_PARTS": MAX_PARTS}
    kernel.decode_kernel[(rows, call.kv_heads, parts)](
        *(*call.read(), sums, weights, *call.scores()),
        GROUP=call.group,
        BLOCK_M=max(_DECODE_ROWS, _power_of_two(call.group)),
        BLOCK_N=call.keys_at_once(),
        **call.head_sizes(),
        **call.kinds(),
        **sizes,
        num_warps=_WARPS,
        num_stages=_STAGES,
    )
    head_sizes = call.head_sizes()
    kernel.reduce_kernel[(rows, heads)](
        *(call.out, batch.context_lens, sums, weights, parts, call.window),
        HEAD_DIM=head_dim,
        BLOCK_D=head_sizes["BLOCK_D"],
        WINDOWED=call.params.window is not None,
        **sizes,
        num_warps=_WARPS,
    )


def _prompts(call: _Call) -> None:
    batch = call.batch
    lengths = batch.query_lens_cpu[batch.num_decodes :]
    block_m = max(_PROMPT_ROWS, _power_of_two(call.group))
    tiles = -(-max(lengths) // (block_m // call.group))
    kernel.prompt_kernel[(tiles, call.kv_heads, len(lengths))](
        *(*call.read(), batch.query_start, call.out, batch.num_decodes, *call.scores()),
        GROUP=call.group,
        BLOCK_M=block_m,
        BLOCK_N=call.keys_at_once(),
        **call.head_sizes(),
        **call.kinds(),
        num_warps=_WARPS,
        num_stages=_STAGES,
    )


def _power_of_two(n: int) -> int:
    """Return the smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def _heads_together(x: torch.Tensor) -> torch.Tensor:
    """Return x with each token's heads contiguous; tokens may lie apart (a slice of a packed projection)."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _check(q: torch.Tensor, cache: LayerKVCache, batch: Batch) -> None:
    """Refuse what the kernels would read wrongly, as far as plain numbers tell.

    Raises:
        ValueError: saying what does not fit.
    """
    if not (cache.k.is_contiguous() and cache.v.is_contiguous()):
        raise ValueError("the kernels read a contiguous cache only, it does not fit this one")
    if q.dtype not in _DTYPES or cache.k.dtype not in _DTYPES:
        raise ValueError(f"no attention kernel fits activations in {q.dtype} and a cache in {cache.k.dtype}")
    lengths, contexts = batch.query_lens_cpu, batch.context_lens_cpu
    if sum(lengths) != q.shape[0] or any(not 0 < n <= c for n, c in zip(lengths, contexts, strict=True)):
        raise ValueError(f"query lengths {lengths} do not fit contexts {contexts} and {q.shape[0]} tokens")
    if max(contexts, default=0) > batch.block_tables.shape[1] * cache.k.shape[2]:
        raise ValueError(f"block tables of {tuple(batch.block_tables.shape)} are too small for contexts {contexts}")
