"""What a decoder is: sizes and switches, with nothing left to a default of someone else.

Knows neither weights nor where a configuration came from; `families` makes these from a model's `config.json`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

NormKind = Literal["rms", "rms_plus_one", "layer"]
ActivationKind = Literal["silu", "gelu", "gelu_tanh", "relu"]
RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding over the first `rotary_dim` numbers of every head.

    Attributes:
        kind: how the frequencies follow from `theta`; each kind reads only the fields named after it here.
        factor: linear, llama3, yarn: how far the context was stretched.
        original_max_positions: llama3, yarn: the context before that.
        low_freq_factor, high_freq_factor: llama3.
        beta_fast, beta_slow, truncate: yarn.
        factors: longrope: divisor of each frequency, `rotary_dim / 2` of them.
        attention_factor: yarn, longrope: multiplies cosines and sines.
    """

    rotary_dim: int
    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    factors: tuple[float, ...] = ()
    attention_factor: float = 1.0


@dataclass(frozen=True)
class DecoderConfig:
    """One decoder-only transformer.

    Attributes:
        architecture: the Hugging Face class, e.g. "LlamaForCausalLM".
        max_positions: longest sequence that the positions are made for.
        norm: root mean square, the same with weight 1 + w (Gemma), or LayerNorm with bias.
        activation: of the MLP; on the gate where `gated_mlp`.
        attention_scales: per layer, what the scores are multiplied by.
        windows: per layer, how many tokens back one sees, itself included; None is all.
        rope: None where positions are learned (a table of `max_positions` rows).
        qk_norm: each head of q and k has a norm of its own before the rotation.
        post_norms: attention and MLP outputs have a norm of their own before they are added.
        attention_softcap: scores become `cap * tanh(score / cap)`.
        logit_softcap: likewise for the logits.
        embedding_scale: what embeddings are multiplied by.
        tied_embeddings: lm_head is the embedding matrix, unless the checkpoint holds a different one.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm: NormKind
    norm_eps: float
    activation: ActivationKind
    attention_scales: tuple[float, ...]
    windows: tuple[int | None, ...]
    rope: RopeConfig | None = None
    gated_mlp: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    tied_embeddings: bool = False

    def canonical(self) -> str:
        """Return the text that stands for this model in its fingerprint.

        Fields at their default are left out, so that a field added later, with a default that means what was before,
        changes no fingerprint.
        """
        return json.dumps(_changed_fields(self), sort_keys=True, separators=(",", ":"))


def _changed_fields(value: DecoderConfig | RopeConfig) -> dict[str, object]:
    found: dict[str, object] = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if item != field.default:
            found[field.name] = _changed_fields(item) if isinstance(item, RopeConfig) else item
    return found
