"""What every weight of a model is called, how large it is, and which packed product it is part of.

Follows from the family's names and the decoder's sizes; knows no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loraplex.adapters.binding import BaseModule
from loraplex.server.lora.weights import LinearSite
from loraplex.server.models.config import DecoderConfig

LM_HEAD = "lm_head"


@dataclass(frozen=True)
class ModuleNames:
    """Module paths: the first group below `root`, the rest below `root.layers.N`.

    `conv1d`: weights are stored (in, out). `ignored`: tensors that old checkpoints carry though nothing needs them,
    as regular expressions on the end of the name.
    """

    root: str = "model"
    embedding: str = "embed_tokens"
    positions: str | None = None
    layers: str = "layers"
    final_norm: str = "norm"
    input_norm: str = "input_layernorm"
    post_attention_norm: str | None = None
    mlp_norm: str = "post_attention_layernorm"
    post_mlp_norm: str | None = None
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    conv1d: bool = False
    ignored: tuple[str, ...] = (r"rotary_emb\.inv_freq",)


@dataclass(frozen=True)
class LinearModule:
    """One linear module of the Hugging Face model, by its full path."""

    name: str
    in_features: int
    out_features: int
    bias: bool


@dataclass(frozen=True)
class PackedLinear:
    """Modules with the same input that are multiplied as one; at `sites[index]` of the decoder."""

    name: str
    modules: tuple[LinearModule, ...]

    @property
    def site(self) -> LinearSite:
        """What the LoRA operators see of it."""
        targets: dict[str, tuple[int, int]] = {}
        end = 0
        for module in self.modules:
            targets[module.name] = (end, end + module.out_features)
            end += module.out_features
        return LinearSite(self.name, self.modules[0].in_features, end, targets)


@dataclass(frozen=True)
class LayerVectors:
    """Tensor names (without ".weight") of a layer's norms; None where the model has none."""

    input_norm: str
    mlp_norm: str
    post_attention_norm: str | None
    post_mlp_norm: str | None
    q_norm: str | None
    k_norm: str | None


class Layout:
    """All names of one model. `linears` are in the order of the decoder's sites: four a layer, then lm_head."""

    def __init__(self, config: DecoderConfig, names: ModuleNames) -> None:
        self.names = names
        self.embedding = f"{names.root}.{names.embedding}.weight"
        self.positions = f"{names.root}.{names.positions}.weight" if names.positions else None
        self.final_norm = f"{names.root}.{names.final_norm}"
        prefixes = [f"{names.root}.{names.layers}.{index}" for index in range(config.num_layers)]
        self.layers = tuple(_layer_vectors(config, names, prefix) for prefix in prefixes)
        linears = [_layer_linears(config, names, f"layers.{i}", prefix) for i, prefix in enumerate(prefixes)]
        head = LinearModule(LM_HEAD, config.hidden_size, config.vocab_size, bias=False)
        self.linears = (*(linear for layer in linears for linear in layer), PackedLinear(LM_HEAD, (head,)))
        self.module_names = frozenset(module.name for linear in self.linears for module in linear.modules)
        self._config = config

    def modules(self) -> Mapping[str, BaseModule]:
        """Return every linear module by its path."""
        found = [module for linear in self.linears for module in linear.modules]
        return {module.name: BaseModule(module.name, module.in_features, module.out_features) for module in found}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor, as the checkpoint stores it; lm_head may be absent if it is tied."""
        config = self._config
        shapes: dict[str, tuple[int, ...]] = {self.embedding: (config.vocab_size, config.hidden_size)}
        if self.positions:
            shapes[self.positions] = (config.max_positions, config.hidden_size)
        for linear in self.linears:
            for module in linear.modules:
                sizes = (module.out_features, module.in_features)
                stored_across = self.names.conv1d and module.name != LM_HEAD
                shapes[f"{module.name}.weight"] = sizes[::-1] if stored_across else sizes
                if module.bias:
                    shapes[f"{module.name}.bias"] = (module.out_features,)
        for name, size in self._norms().items():
            shapes[f"{name}.weight"] = (size,)
            if config.norm == "layer":
                shapes[f"{name}.bias"] = (size,)
        return shapes

    def parameters(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of everything that is no linear weight: embeddings, norms and biases."""
        linear = {f"{name}.weight" for name in self.module_names}
        return {name: shape for name, shape in self.shapes().items() if name not in linear}

    def _norms(self) -> dict[str, int]:
        """Return the width of every norm."""
        config = self._config
        found = {self.final_norm: config.hidden_size}
        for layer in self.layers:
            for name in (layer.input_norm, layer.mlp_norm, layer.post_attention_norm, layer.post_mlp_norm):
                if name:
                    found[name] = config.hidden_size
            for name in (layer.q_norm, layer.k_norm):
                if name:
                    found[name] = config.head_dim
        return found


def _layer_vectors(config: DecoderConfig, names: ModuleNames, prefix: str) -> LayerVectors:
    def path(name: str | None) -> str | None:
        return f"{prefix}.{name}" if name else None

    return LayerVectors(
        input_norm=f"{prefix}.{names.input_norm}",
        mlp_norm=f"{prefix}.{names.mlp_norm}",
        post_attention_norm=path(names.post_attention_norm),
        post_mlp_norm=path(names.post_mlp_norm),
        q_norm=path(names.q_norm if config.qk_norm else None),
        k_norm=path(names.k_norm if config.qk_norm else None),
    )


def _layer_linears(config: DecoderConfig, names: ModuleNames, site: str, prefix: str) -> tuple[PackedLinear, ...]:
    def packed(name: str, paths: tuple[str, ...], in_features: int, sizes: tuple[int, ...], bias: bool) -> PackedLinear:
        if len(paths) == 1:
            sizes = (sum(sizes),)
        modules = zip(paths, sizes, strict=True)
        return PackedLinear(
            f"{site}.{name}", tuple(LinearModule(f"{prefix}.{p}", in_features, size, bias) for p, size in modules)
        )

    heads = config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    inner = (config.intermediate_size,) * (2 if config.gated_mlp else 1)
    return (
        packed("qkv", names.qkv, config.hidden_size, (heads, kv, kv), config.qkv_bias),
        packed("o", (names.o,), heads, (config.hidden_size,), config.o_bias),
        packed("gate_up", names.gate_up, config.hidden_size, inner, config.mlp_bias),
        packed("down", (names.down,), config.intermediate_size, (config.hidden_size,), config.mlp_bias),
    )
