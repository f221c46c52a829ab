"""The norms of a model by their place in the decoder: "final_norm", and "layers.3.mlp_norm" for a field of a layer.

What the decoder is built with and what adapters replace come from here alike.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from loraplex.server.lora.base import BaseNorm
from loraplex.server.models.config import DecoderConfig
from loraplex.server.models.layout import LayerVectors, Layout
from loraplex.server.models.norms import Norm, RmsNorm, make_norm, norm_tensors

LAYER_NORMS = ("input_norm", "post_attention_norm", "mlp_norm", "post_mlp_norm")
QK_NORM = "qk_norm"
FINAL_NORM = "final_norm"

Tensors = Mapping[str, torch.Tensor]


def layer_place(index: int, field: str) -> str:
    """Return the place of a norm in layer `index`; `field` is one of `LAYER_NORMS` or `QK_NORM`."""
    return f"layers.{index}.{field}"


def base_norms(layout: Layout, config: DecoderConfig, vectors: Tensors, dtype: torch.dtype) -> dict[str, BaseNorm]:
    """Return every norm of the model, made of `vectors` (by parameter name) for activations in `dtype`."""
    norms = {FINAL_NORM: _norm(layout.final_norm, config, vectors, dtype)}
    for index, names in enumerate(layout.layers):
        for field in LAYER_NORMS:
            name = getattr(names, field)
            if name is not None:
                norms[layer_place(index, field)] = _norm(name, config, vectors, dtype)
        if names.q_norm is not None and names.k_norm is not None:
            norms[layer_place(index, QK_NORM)] = _qk_norm(names, config, vectors, dtype)
    return norms


def _norm(name: str, config: DecoderConfig, vectors: Tensors, dtype: torch.dtype) -> BaseNorm:
    weight, bias = f"{name}.weight", f"{name}.bias"

    def prepare(parameters: Tensors) -> tuple[torch.Tensor, ...]:
        return norm_tensors(config.norm, parameters[weight], parameters.get(bias), dtype)

    def make(tensors: tuple[torch.Tensor, ...]) -> Norm:
        return make_norm(config.norm, config.norm_eps, tensors, dtype)

    return BaseNorm({key: vectors[key] for key in (weight, bias) if key in vectors}, prepare, make)


def _qk_norm(names: LayerVectors, config: DecoderConfig, vectors: Tensors, dtype: torch.dtype) -> BaseNorm:
    """One norm for the heads of q and k together: a row of weights per head."""
    q_name, k_name = f"{names.q_norm}.weight", f"{names.k_norm}.weight"

    def prepare(parameters: Tensors) -> tuple[torch.Tensor, ...]:
        rows = [parameters[q_name]] * config.num_heads + [parameters[k_name]] * config.num_kv_heads
        return (torch.stack([row.to(dtype) for row in rows]),)

    def make(tensors: tuple[torch.Tensor, ...]) -> Norm:
        return RmsNorm(tensors[0], config.norm_eps)

    return BaseNorm({name: vectors[name] for name in (q_name, k_name)}, prepare, make)
