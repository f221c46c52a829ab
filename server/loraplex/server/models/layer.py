"""One layer of the decoder: attention and MLP around packed products that the LoRA operators can add to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loraplex.server.attention.interface import Attention, AttentionParams
from loraplex.server.engine.batch import Batch
from loraplex.server.engine.kv_cache import LayerKVCache
from loraplex.server.lora.ops.interface import LoraContext
from loraplex.server.models.activations import Activation
from loraplex.server.models.linear import Linear
from loraplex.server.models.norms import Norm
from loraplex.server.models.rotary import Rotation


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
        """Return attention's result before its last product, (T, heads * head_dim); h is (T, hidden)."""
        heads, keys = self.num_heads, self.num_heads + self.num_kv_heads
        qkv = self.qkv(h, step.lora).view(h.shape[0], keys + self.num_kv_heads, self.head_dim)
        qk, v = qkv[:, :keys], qkv[:, keys:]
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        if step.rotation is not None:
            qk = step.rotation.apply(qk)
        mixed = attention(qk[:, :heads], qk[:, heads:], v, cache, step.batch, self.params)
        return mixed.view(h.shape[0], heads * self.head_dim)

    def project(self, mixed: torch.Tensor, lora: LoraContext | None) -> torch.Tensor:
        """Return what attention adds to the residual stream, for tokens of what `attend` returned."""
        out = self.o(mixed, lora)
        return out if self.post_attention_norm is None else self.post_attention_norm(out)

    def mlp(self, h: torch.Tensor, lora: LoraContext | None) -> torch.Tensor:
        """Return what the MLP adds to the residual stream; h is (T, hidden)."""
        out = self.down(self.activation(self.gate_up(h, lora)), lora)
        return out if self.post_mlp_norm is None else self.post_mlp_norm(out)
