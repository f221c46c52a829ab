"""Parts of a decoder for one step in which some tokens have adapters with embeddings or norms of their own.

The base's result is computed for all tokens and then again for those tokens: such adapters are rare, and steps without
one do not come here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from loraplex.server.lora.changes import EmbeddingChanges
from loraplex.server.lora.overrides import Overrides, Ranges
from loraplex.server.lora.segments import Segment
from loraplex.server.models.layer import DecoderLayer
from loraplex.server.models.norm_places import QK_NORM, layer_place
from loraplex.server.models.norms import Norm


@dataclass(frozen=True)
class OverriddenNorm:
    """Implements `Norm`: the base's, but for the tokens of `ranges` (start, end) the norm given with them."""

    base: Norm
    ranges: Sequence[tuple[int, int, Norm]]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalized `x`; (T, features) or (T, heads, features)."""
        return self._again(self.base(x), x)

    def add(self, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """Add `delta` to `x` in place and return the normalized sum."""
        return self._again(self.base.add(x, delta), x)

    def _again(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        for start, end, norm in self.ranges:
            out[start:end] = norm(x[start:end])
        return out


def overridden_norm(base: Norm, place: str, ranges: Ranges) -> Norm:
    """Return `base`, or what stands for it where an adapter in `ranges` has a norm at `place`."""
    own = [(s.start, s.end, adapter.norms[place].norm) for s, adapter in ranges if place in adapter.norms]
    return OverriddenNorm(base, own) if own else base


def overridden_layers(
    layers: Sequence[DecoderLayer], overrides: Overrides, *, narrowed: bool
) -> tuple[DecoderLayer, ...]:
    """Return the layers with the norms that adapters have.

    Args:
        layers: all of the decoder's.
        overrides: where adapters have norms.
        narrowed: whether only the rows that go on to the last norm are left after the last layer's attention.
    """
    last = len(layers) - 1
    return tuple(
        _overridden(
            layer, index, overrides.tokens, overrides.logits if narrowed and index == last else overrides.tokens
        )
        for index, layer in enumerate(layers)
    )


def _overridden(layer: DecoderLayer, index: int, before: Ranges, after: Ranges) -> DecoderLayer:
    """Return the layer with the norms of `before` up to its attention, and those of `after` from then on."""

    def own(field: str, norm: Norm, ranges: Ranges) -> Norm:
        return overridden_norm(norm, layer_place(index, field), ranges)

    def own_if_any(field: str, norm: Norm | None, ranges: Ranges) -> Norm | None:
        return None if norm is None else own(field, norm, ranges)

    return replace(
        layer,
        input_norm=own("input_norm", layer.input_norm, before),
        qk_norm=own_if_any(QK_NORM, layer.qk_norm, before),
        post_attention_norm=own_if_any("post_attention_norm", layer.post_attention_norm, after),
        mlp_norm=own("mlp_norm", layer.mlp_norm, after),
        post_mlp_norm=own_if_any("post_mlp_norm", layer.post_mlp_norm, after),
    )


def change_embeddings(x: torch.Tensor, token_ids: torch.Tensor, ranges: Ranges) -> None:
    """Put the adapters' embeddings into `x` (T, hidden) in place; `token_ids` (T,) int64. Before any scaling."""
    for segment, adapter in ranges:
        if adapter.embedding is not None:
            tokens = slice(segment.start, segment.end)
            _change(x[tokens], token_ids[tokens], segment, adapter.embedding)


def _change(x: torch.Tensor, token_ids: torch.Tensor, segment: Segment, changes: EmbeddingChanges) -> None:
    if changes.table is not None:
        x.copy_(F.embedding(token_ids, changes.table))
    if changes.rows is not None:
        tokens = changes.rows.tokens
        nearest = torch.searchsorted(tokens, token_ids).clamp_(max=len(tokens) - 1)
        found = tokens[nearest] == token_ids
        x[found] = changes.rows.rows[nearest[found]].to(x.dtype)
    if changes.lora is not None:
        hidden = F.embedding(token_ids, changes.lora.a_t).float()
        delta = hidden @ changes.lora.b_t.float()
        x.copy_(x.float().add_(delta, alpha=segment.scale))


def change_positions(x: torch.Tensor, positions: torch.Tensor, ranges: Ranges) -> None:
    """Put the adapters' learned positions into `x` (T, hidden) in place; `positions` (T,) int64."""
    for segment, adapter in ranges:
        if adapter.embedding is not None and adapter.embedding.positions is not None:
            tokens = slice(segment.start, segment.end)
            x[tokens] = F.embedding(positions[tokens], adapter.embedding.positions).to(x.dtype)
