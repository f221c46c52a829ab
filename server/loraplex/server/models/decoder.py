"""The decoder-only transformer that all families are settings of: one forward pass over a ragged batch.

Plain classes instead of torch modules: a decode step of a small model is bound by Python calls. Knows nothing of
checkpoints, requests or adapters' names; every matrix product is a numbered site that the LoRA operators can add to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from loraplex.server.attention.interface import Attention, AttentionParams
from loraplex.server.engine.batch import Batch
from loraplex.server.engine.kv_cache import KVCache, LayerKVCache
from loraplex.server.lora.base import BaseParameters
from loraplex.server.lora.ops.interface import LoraContext
from loraplex.server.lora.weights import LinearSite
from loraplex.server.models.activations import Activation
from loraplex.server.models.config import DecoderConfig
from loraplex.server.models.linear import Linear
from loraplex.server.models.norms import Norm
from loraplex.server.models.rotary import Rotary, Rotation


@dataclass(frozen=True)
class Projection:
    """A packed matrix product with its bias and its place among the decoder's sites."""

    linear: Linear
    bias: torch.Tensor | None
    site: int

    def __call__(self, x: torch.Tensor, lora: LoraContext | None) -> torch.Tensor:
        """Return `linear(x)`, plus the adapters' parts, plus the bias."""
        y = self.linear(x)
        if lora is not None:
            lora.ops.add(y, x, self.site, lora.tokens)
        return y if self.bias is None else y.add_(self.bias)


@dataclass(frozen=True)
class Step:
    """What is the same in all layers of one forward pass."""

    batch: Batch
    rotation: Rotation | None
    lora: LoraContext | None


@dataclass(frozen=True)
class DecoderLayer:
    """Attention and MLP, each between a norm before and, in some families, one after.

    The norms before belong to the residual stream: `Decoder` calls them together with the addition of the last result.
    `qk_norm` normalizes the heads of q and k, (heads + kv_heads, head_dim) weights.
    """

    input_norm: Norm
    qkv: Projection
    qk_norm: Norm | None
    o: Projection
    post_attention_norm: Norm | None
    mlp_norm: Norm
    gate_up: Projection
    activation: Activation
    down: Projection
    post_mlp_norm: Norm | None
    params: AttentionParams
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def attend(self, h: torch.Tensor, cache: LayerKVCache, step: Step, attention: Attention) -> torch.Tensor:
        """Return what attention adds to the residual stream; h is (T, hidden)."""
        heads, keys = self.num_heads, self.num_heads + self.num_kv_heads
        qkv = self.qkv(h, step.lora).view(h.shape[0], keys + self.num_kv_heads, self.head_dim)
        qk, v = qkv[:, :keys], qkv[:, keys:]
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        if step.rotation is not None:
            qk = step.rotation.apply(qk)
        mixed = attention(qk[:, :heads], qk[:, heads:], v, cache, step.batch, self.params)
        out = self.o(mixed.reshape(h.shape[0], heads * self.head_dim), step.lora)
        return out if self.post_attention_norm is None else self.post_attention_norm(out)

    def mlp(self, h: torch.Tensor, lora: LoraContext | None) -> torch.Tensor:
        """Return what the MLP adds to the residual stream; h is (T, hidden)."""
        out = self.down(self.activation(self.gate_up(h, lora)), lora)
        return out if self.post_mlp_norm is None else self.post_mlp_norm(out)


@dataclass(frozen=True)
class DecoderParts:
    """The weights, in order of use. `positions` is (max_positions, hidden) or None, `rotary` None or not likewise."""

    embedding: torch.Tensor
    positions: torch.Tensor | None
    rotary: Rotary | None
    layers: tuple[DecoderLayer, ...]
    final_norm: Norm
    lm_head: Linear


class Decoder:
    """Computes the logits of a batch. Stateless between calls but for the cache that it is given."""

    def __init__(
        self,
        config: DecoderConfig,
        parts: DecoderParts,
        sites: Sequence[LinearSite],
        base: BaseParameters,
        attention: Attention,
        dtype: torch.dtype,
    ) -> None:
        """Take `parts`, numbered as `sites` are: qkv, o, gate_up and down of each layer, then lm_head."""
        self.config = config
        self.sites = tuple(sites)
        self.base = base
        """What adapters other than plain LoRA change or are computed from."""
        projections = [p for layer in parts.layers for p in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        self.linears = (*(projection.linear for projection in projections), parts.lm_head)
        """The packed product at each site."""
        self._parts = parts
        self._attention = attention
        self._dtype = dtype
        # Rounded to the compute dtype first, as transformers does (Gemma).
        self._embedding_scale = torch.tensor(config.embedding_scale, dtype=dtype).item()

    @torch.inference_mode()
    def forward(self, batch: Batch, kv_cache: KVCache, lora: LoraContext | None) -> torch.Tensor:
        """Write the batch's keys and values to `kv_cache` and return logits.

        Shape:
            returns (L, vocab) float32, the logits after the tokens `batch.logits_indices`.
        """
        parts = self._parts
        rotation = None if parts.rotary is None else parts.rotary.rotation(batch.positions, max(batch.context_lens_cpu))
        step = Step(batch, rotation, lora)
        x = self._embed(batch)
        delta: torch.Tensor | None = None
        for layer, cache in zip(parts.layers, kv_cache.layers, strict=True):
            h = layer.input_norm(x) if delta is None else layer.input_norm.add(x, delta)
            h = layer.mlp_norm.add(x, layer.attend(h, cache, step, self._attention))
            delta = layer.mlp(h, lora)
        assert delta is not None, "a decoder has layers"
        return self._logits(parts.final_norm(x.add_(delta)[batch.logits_indices]), lora)

    def _embed(self, batch: Batch) -> torch.Tensor:
        x = F.embedding(batch.token_ids, self._parts.embedding).to(self._dtype)
        if self._embedding_scale != 1:
            x = x.mul_(self._embedding_scale)
        if self._parts.positions is not None:
            x = x.add_(F.embedding(batch.positions, self._parts.positions))
        return x

    def _logits(self, h: torch.Tensor, lora: LoraContext | None) -> torch.Tensor:
        logits = self._parts.lm_head(h)
        if lora is not None:
            lora.ops.add(logits, h, len(self.sites) - 1, lora.logits)
        logits = logits.float()
        cap = self.config.logit_softcap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
