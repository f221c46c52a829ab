"""The decoder-only transformer that all families are settings of: one forward pass over a ragged batch.

Plain classes instead of torch modules: a decode step of a small model is bound by Python calls. Knows nothing of
checkpoints, requests or adapters' names; every matrix product is a numbered site that the LoRA operators can add to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from loraplex.server.attention.interface import Attention
from loraplex.server.engine.batch import Batch
from loraplex.server.engine.kv_cache import KVCache
from loraplex.server.lora.base import BaseParameters
from loraplex.server.lora.ops.interface import LoraContext
from loraplex.server.lora.overrides import Overrides
from loraplex.server.lora.weights import LinearSite
from loraplex.server.models.config import DecoderConfig
from loraplex.server.models.layer import DecoderLayer, Step
from loraplex.server.models.linear import Linear
from loraplex.server.models.norm_places import FINAL_NORM
from loraplex.server.models.norms import Norm
from loraplex.server.models.overridden import (
    change_embeddings,
    change_positions,
    overridden_layers,
    overridden_norm,
)
from loraplex.server.models.rotary import Rotary, Rotation


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
        self.attention = attention
        self.dtype = dtype
        """That of activations."""
        # Rounded to the compute dtype first, as transformers does (Gemma).
        self._embedding_scale = torch.tensor(config.embedding_scale, dtype=dtype).item()

    @torch.inference_mode()
    def forward(self, batch: Batch, kv_cache: KVCache, lora: LoraContext | None) -> torch.Tensor:
        """Write the batch's keys and values to `kv_cache` and return logits.

        Shape:
            returns (L, vocab) float32, the logits after the tokens `batch.logits_indices`.
        """
        overrides = None if lora is None else lora.overrides
        x, rotation = self.inputs(batch, overrides)
        step = Step(batch, rotation, lora)
        layers, final_norm = self._parts.layers, self._parts.final_norm
        wanted = None if len(batch.logits_indices) == len(batch.token_ids) else batch.logits_indices
        if overrides is not None:
            layers = overridden_layers(layers, overrides, narrowed=wanted is not None)
            final_norm = overridden_norm(final_norm, FINAL_NORM, overrides.logits)
        x, delta = self._run(layers, x, step, kv_cache, wanted)
        x.add_(delta)
        return self._logits(final_norm(x[batch.logits_indices] if wanted is None else x), lora)

    def forward_all(self, x: torch.Tensor, step: Step, kv_cache: KVCache) -> torch.Tensor:
        """Return the logits after every token, without overrides, as `forward` does from its `inputs` on.

        Shape:
            x: (T, hidden), changed in place; returns (T, vocab) float32.
        """
        x, delta = self._run(self._parts.layers, x, step, kv_cache, None)
        return self._logits(self._parts.final_norm.add(x, delta), step.lora)

    def inputs(self, batch: Batch, overrides: Overrides | None) -> tuple[torch.Tensor, Rotation | None]:
        """Return what the first layer gets, (T, hidden), and the rotation of all layers."""
        rotary = self._parts.rotary
        rotation = None if rotary is None else rotary.rotation(batch.positions, max(batch.context_lens_cpu))
        return self._embed(batch, overrides), rotation

    def _run(
        self,
        layers: Sequence[DecoderLayer],
        x: torch.Tensor,
        step: Step,
        kv_cache: KVCache,
        wanted: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the layers on the residual stream `x`, in place; return it and what the last one has yet to add to it.

        With `wanted` (L,) only these tokens go on after the last layer's attention, and only they are returned: of the
        others nothing but keys and values is needed, and they are most of a prompt.
        """
        lora, delta = step.lora, None
        for layer, cache in zip(layers, kv_cache.layers, strict=True):
            h = layer.input_norm(x) if delta is None else layer.input_norm.add(x, delta)
            mixed = layer.attend(h, cache, step, self.attention)
            if wanted is not None and layer is layers[-1]:
                x, mixed = x[wanted], mixed[wanted]
                lora = None if lora is None else replace(lora, tokens=lora.logits)
            h = layer.mlp_norm.add(x, layer.project(mixed, lora))
            delta = layer.mlp(h, lora)
        assert delta is not None, "a decoder has layers"
        return x, delta

    def _embed(self, batch: Batch, overrides: Overrides | None) -> torch.Tensor:
        x = F.embedding(batch.token_ids, self._parts.embedding).to(self.dtype)
        if overrides is not None:
            change_embeddings(x, batch.token_ids, overrides.tokens)
        if self._embedding_scale != 1:
            x = x.mul_(self._embedding_scale)
        if self._parts.positions is not None:
            positions = F.embedding(batch.positions, self._parts.positions)
            if overrides is not None:
                change_positions(positions, batch.positions, overrides.tokens)
            x = x.add_(positions)
        return x

    def _logits(self, h: torch.Tensor, lora: LoraContext | None) -> torch.Tensor:
        logits = self._parts.lm_head(h)
        if lora is not None:
            lora.ops.add(logits, h, len(self.sites) - 1, lora.logits)
        if logits.dtype is not torch.float32:
            logits = logits.float()
        cap = self.config.logit_softcap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
