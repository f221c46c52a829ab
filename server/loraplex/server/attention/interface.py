"""What attention does, whatever it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from loraplex.server.engine.batch import Batch
from loraplex.server.engine.kv_cache import LayerKVCache


@dataclass(frozen=True)
class AttentionParams:
    """One layer's constants.

    `scale` multiplies q . k; `softcap` replaces a score s by softcap * tanh(s / softcap); with `window`, a token sees
    itself and the window - 1 tokens before it.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None


class Attention(Protocol):
    """Causal attention of a ragged batch over the paged cache.

    Semantics:
        first k[t] and v[t] are written to the cache at batch.slot_mapping[t], for all tokens t;
        then token i of row b, at position p = context_lens[b] - query_lens[b] + i, gets the softmax-weighted sum of
        the values at the positions 0..p of the row's block table (max(0, p - window + 1)..p with a window).
    Computed in float32 whatever the dtypes. Query head h reads KV head h // (Hq / Hkv). What is written in this pass
    can be read in this pass by any row. A token's result does not depend on the other rows.
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
        """Return the attention output, in q's dtype; changes `cache`.

        Shape:
            q: (T, Hq, D). k, v: (T, Hkv, D). Result: (T, Hq, D), contiguous. q, k and v are of one dtype.

        Raises:
            ValueError: if shapes or dtypes are not as above or do not fit cache and batch.
        """
        ...


def make_attention(device: torch.device) -> Attention:
    """Return the fastest attention there is for `device`; it belongs to one engine, and to one thread at a time."""
    if device.type == "cpu":
        from loraplex.server.attention.cpu import CpuAttention

        return CpuAttention()
    if device.type == "cuda":
        from loraplex.server.attention.triton import TritonAttention

        return TritonAttention()
    from loraplex.server.attention.reference import ReferenceAttention

    return ReferenceAttention()


def check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: LayerKVCache, batch: Batch) -> None:
    """Refuse what does not fit together; cheap enough for every layer of every step.

    Raises:
        ValueError: saying what does not fit.
    """
    tokens, heads, head_dim = q.shape
    kv_heads = cache.k.shape[1]
    if (
        k.shape != (tokens, kv_heads, head_dim)
        or v.shape != k.shape
        or cache.k.shape[3] != head_dim
        or heads % kv_heads
    ):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit a cache of {tuple(cache.k.shape)}"
        )
    if cache.v.shape != cache.k.shape or cache.v.dtype != cache.k.dtype or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"keys and values differ in the cache ({tuple(cache.k.shape)} {cache.k.dtype} and {tuple(cache.v.shape)} "
            f"{cache.v.dtype}), or q, k, v in dtype: {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if batch.slot_mapping.shape[0] != tokens:
        raise ValueError(f"{tokens} tokens but {batch.slot_mapping.shape[0]} slots")
