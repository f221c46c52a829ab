"""Base models of real shapes with random weights, made where they are used: nothing is read or downloaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loraplex.adapters.base_model import BaseModel
from loraplex.bench.gpu.nf4 import nf4_linear, quantize
from loraplex.bench.gpu.step_model import DecoderShape, Weights
from loraplex.server.attention.interface import Attention
from loraplex.server.models.builder import DecoderBuilder, StoredWeight
from loraplex.server.models.compute_dtype import activation_dtype
from loraplex.server.models.families import find_family
from loraplex.server.models.four_bit import join
from loraplex.server.models.layout import LM_HEAD, Layout
from loraplex.server.models.linear import Linear, dense_linear
from loraplex.server.models.loader import LoadedModel

DEVIATION = 0.02
"""Of the weights, as transformers initializes them."""


def config_values(shape: DecoderShape, max_positions: int) -> dict[str, Any]:
    """Return what a config.json of this shape holds."""
    return {
        "architectures": [shape.architecture],
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": shape.tied,
    }


def random_model(
    shape: DecoderShape,
    weights: Weights,
    attention: Attention,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_positions: int = 4096,
    state: Mapping[str, torch.Tensor] | None = None,
) -> LoadedModel:
    """Return a model whose layers are held as `weights`; `state` gives the weights by their Hugging Face names."""
    values = config_values(shape, max_positions)
    family = find_family(values)
    config = family.read(values)
    layout = Layout(config, family.names)

    def pack(site: str, parts: Sequence[StoredWeight]) -> Linear:
        matrices = [part["weight"].to(device) for part in parts]
        if weights == "bfloat16" or site == LM_HEAD:
            return dense_linear(torch.cat(matrices).to(dtype))
        (joined,) = join([quantize(matrix) for matrix in matrices])
        return nf4_linear(joined, dtype)

    names = [name for name in layout.shapes() if not (shape.tied and name == f"{LM_HEAD}.weight")]
    builder = DecoderBuilder(config, layout, names, pack, dtype, activation_dtype(dtype, device), device)
    generator = torch.Generator(device).manual_seed(0)
    for name in names:
        builder.add(name, _drawn(layout.shapes()[name], dtype, generator) if state is None else state[name])
    decoder = builder.build(attention)
    return LoadedModel(
        decoder=decoder,
        base=BaseModel(
            name=shape.name,
            architecture=shape.architecture,
            fingerprint="random",
            modules=layout.modules(),
            parameters=layout.parameters(),
            embedding=layout.embedding,
            tied=builder.tied,
        ),
        path=Path(),
        architecture=shape.architecture,
        max_model_len=max_positions,
        eos_token_ids=(),
        vocab_size=shape.vocab,
        dtype=dtype,
        quantization="nf4" if weights == "nf4" else "none",
        device=str(device),
        weight_bytes=builder.weight_bytes,
    )


def _drawn(size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    numbers = torch.empty(size, dtype=dtype, device=generator.device).normal_(0.0, DEVIATION, generator=generator)
    return 1 + numbers if len(size) == 1 else numbers
