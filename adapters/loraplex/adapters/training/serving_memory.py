"""Bytes that serving takes: the base as it is stored, keys and values, adapters and the numbers of one step.

Follows how this project's server stores things; knows nothing of the server's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from loraplex.adapters.training.architecture import LinearModule, ModelArchitecture
from loraplex.adapters.training.training_memory import PLAIN_SCALE_BYTES

Quantization = Literal["none", "nf4", "int8"]
QUANTIZATIONS: tuple[Quantization, ...] = ("none", "nf4", "int8")
FLOAT32 = 4


@dataclass(frozen=True)
class ServingShape:
    """What decides how much memory serving takes.

    Attributes:
        sequences, context: how many at once, and tokens of each.
        adapters: resident at once, on `modules` (empty: every linear one) with `rank`.
        rank_pattern: ranks of single modules by full name.
        dtype: in which is computed, and of keys, values and adapters.
        step_tokens: in one forward pass, `--max-num-batched-tokens`.
        block_size: tokens of one KV block.
        on_cpu: there the output layer is a matrix of its own, in float32, or in 16 bits beside quantized layers.
    """

    sequences: int = 16
    context: int = 2048
    adapters: int = 16
    rank: int = 16
    modules: tuple[LinearModule, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    step_tokens: int = 512
    block_size: int = 16
    on_cpu: bool = False


@dataclass(frozen=True)
class ServingMemory:
    """Bytes while serving, by what they are for."""

    quantization: Quantization
    weights: int
    kv_cache: int
    adapters: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """The bytes by name."""
        return {name: getattr(self, name) for name in ("weights", "kv_cache", "adapters", "activations")}


def serving_memory(model: ModelArchitecture, quantization: Quantization, shape: ServingShape) -> ServingMemory:
    """Plan one server; adapters are kept as they were packed, each at its own rank, with no padding."""
    size = shape.dtype.itemsize
    per_adapter = sum(
        module.lora_parameters(shape.rank_pattern.get(module.name, shape.rank))
        for module in shape.modules or model.body
    )
    return ServingMemory(
        quantization=quantization,
        weights=_weights(model, quantization, shape),
        kv_cache=kv_cache_bytes(model, shape),
        adapters=shape.adapters * per_adapter * size,
        activations=_activations(model, shape),
    )


def kv_cache_bytes(model: ModelArchitecture, shape: ServingShape) -> int:
    """Return bytes of keys and values, in whole blocks."""
    blocks = -(-shape.context // shape.block_size) * shape.sequences
    return blocks * shape.block_size * 2 * model.layers * model.key_value_width * shape.dtype.itemsize


def _weights(model: ModelArchitecture, quantization: Quantization, shape: ServingShape) -> int:
    size = shape.dtype.itemsize
    linear = sum(module.weights for module in model.body)
    head = sum(module.weights for module in model.modules) - linear
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    rest = model.parameters - linear - (0 if tied else head)
    head_bytes = head * (FLOAT32 if quantization == "none" else size)
    if not shape.on_cpu:
        head_bytes = 0 if tied else head * size
    stored = {
        "none": linear * size,
        "nf4": round(linear * (0.5 + PLAIN_SCALE_BYTES)),
        "int8": linear + FLOAT32 * sum(module.out_features for module in model.body),
    }
    return rest * size + head_bytes + stored[quantization]


def _activations(model: ModelArchitecture, shape: ServingShape) -> int:
    """Return bytes of the widest moment of a step: a block's input, residual and widest results; and all logits."""
    text = model.config.get_text_config()
    widest = max(module.out_features for module in model.body)
    block = shape.step_tokens * (2 * text.hidden_size + 3 * widest) * shape.dtype.itemsize
    return int(max(block, shape.sequences * text.vocab_size * FLOAT32))
