"""What attention does, whatever it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from loraplex.server.engine.batch import Batch
from loraplex.server.engine.kv_cache import LayerKVCache


@dataclass(frozen=True)
class AttentionParams:
    """One layer's attention: scores are (q k) * scale, then capped, then masked.

    `softcap` c makes a score s into c * tanh(s / c). With `window` w a token sees itself and the w - 1 before it.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None


class Attention(Protocol):
    """Causal grouped-query attention over a paged cache.

    Writes the new keys and values to `batch.slot_mapping`; then row b's tokens, which are the last ones of its
    context, attend to all `context_lens[b]` tokens that its block table leads to. Computed in float32.
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
        """Return the attended values in q's dtype.

        Shape:
            q: (T, num_heads, head_dim). k, v: (T, num_kv_heads, head_dim). Result: as q.
        """
        ...


def make_attention(device: torch.device) -> Attention:
    """Return the fastest attention there is for `device`."""
    from loraplex.server.attention.reference import ReferenceAttention

    return ReferenceAttention()
