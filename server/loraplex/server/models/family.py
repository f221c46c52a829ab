"""What a family of models is, and how a decoder's configuration is read from a `config.json` by its rules.

Options that would change the result are read or refused. Knows no particular family: `families` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loraplex.server.errors import ModelLoadError
from loraplex.server.models.config import ActivationKind, DecoderConfig, NormKind
from loraplex.server.models.config_reader import ConfigReader
from loraplex.server.models.layout import ModuleNames
from loraplex.server.models.rope_config import read_rope

_COMMON_DEFAULTS: Mapping[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "scale_attn_weights": True,
}
# Read only for families whose defaults name them: for the others transformers ignores them.
_FAMILY_KEYS = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "scale_attn_by_inverse_layer_idx",
    "scale_attn_weights",
)

Windows = Callable[[ConfigReader], tuple[int | None, ...]]

_ACTIVATIONS: Mapping[str, ActivationKind] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def all_tokens(config: ConfigReader) -> tuple[int | None, ...]:
    """Every layer sees all tokens."""
    return (None,) * config.integer("num_hidden_layers")


def one_window(config: ConfigReader) -> tuple[int | None, ...]:
    """Every layer has the same window, if there is one."""
    window = None if config.get("sliding_window") is None else config.integer("sliding_window")
    return (window,) * config.integer("num_hidden_layers")


def qwen_windows(config: ConfigReader) -> tuple[int | None, ...]:
    """Layers from `max_window_layers` on have a window, where windows are switched on."""
    first, layers = config.get("max_window_layers"), config.integer("num_hidden_layers")
    if not isinstance(first, int) or first < 0:
        raise config.error("max_window_layers", "a number of layers")
    if not config.flag("use_sliding_window") or config.get("sliding_window") is None:
        if "sliding_attention" in (config.get("layer_types") or ()):
            raise config.error("use_sliding_window", "true, with a sliding_window, for these layer_types")
        return all_tokens(config)
    return _windows_by_type(config, ["sliding_attention" if i >= first else "full_attention" for i in range(layers)])


def alternating_windows(config: ConfigReader) -> tuple[int | None, ...]:
    """The first layer and every second one after it have a window, unless `layer_types` says otherwise."""
    layers = config.integer("num_hidden_layers")
    return _windows_by_type(config, ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)])


def _windows_by_type(config: ConfigReader, default: list[str]) -> tuple[int | None, ...]:
    kinds = config.get("layer_types") or default
    if len(kinds) != len(default) or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise config.error("layer_types", "sliding_attention or full_attention for each layer")
    if "sliding_attention" not in kinds:
        return (None,) * len(kinds)
    window = config.integer("sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


@dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    `defaults` are what its configuration class assumes; `aliases` gives its own names for common keys. A bias switch is
    fixed, or the name of the key that decides. `refused` lists options that must keep the given values.
    """

    architecture: str
    model_type: str
    names: ModuleNames
    defaults: Mapping[str, Any]
    aliases: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    windows: Windows = all_tokens
    norm: NormKind = "rms"
    activation_key: str = "hidden_act"
    gated_mlp: bool = True
    rotary: bool = True
    phi_rope: bool = False
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    post_norms: bool = False
    scaled_embeddings: bool = False

    def reader(self, values: Mapping[str, Any]) -> ConfigReader:
        """Return typed access to a `config.json`, with this family's defaults and the common names of keys."""
        defaults = {**_COMMON_DEFAULTS, **self.defaults}
        known = {key: value for key, value in values.items() if key not in _FAMILY_KEYS or key in self.defaults}
        own = {common: values[name] for common, name in self.aliases.items() if name in values}
        return ConfigReader({**known, **own}, defaults)

    def read(self, values: Mapping[str, Any], *, long_context: bool = False) -> DecoderConfig:
        """Return the decoder that a `config.json` describes; see `read_rope` for `long_context`.

        Raises:
            ModelLoadError: naming the option that is wrong or not supported.
        """
        config = self.reader(values)
        for key, allowed in self.refused.items():
            if config.get(key) not in allowed:
                raise ModelLoadError(f"config.json: {key}={config.get(key)!r} is not supported for {self.architecture}")
        heads = config.integer("num_attention_heads")
        kv_heads = config.integer_or("num_key_value_heads", heads)
        hidden_size = config.integer("hidden_size")
        head_dim = config.integer_or("head_dim", hidden_size // heads)
        if config.get("head_dim") is None and hidden_size % heads:
            raise config.error("hidden_size", f"a multiple of num_attention_heads ({heads})")
        if heads % kv_heads:
            raise config.error("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
        windows = self.windows(config)
        return DecoderConfig(
            architecture=self.architecture,
            vocab_size=config.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=config.integer_or("intermediate_size", 4 * hidden_size),
            num_layers=len(windows),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_positions=config.integer("max_position_embeddings"),
            norm=self.norm,
            norm_eps=config.number("rms_norm_eps"),
            activation=self._activation(config),
            attention_scales=_attention_scales(config, head_dim, len(windows)),
            windows=windows,
            rope=read_rope(config, head_dim, phi=self.phi_rope, long_context=long_context) if self.rotary else None,
            gated_mlp=self.gated_mlp,
            qkv_bias=_switch(config, self.qkv_bias),
            o_bias=_switch(config, self.o_bias),
            mlp_bias=_switch(config, self.mlp_bias),
            qk_norm=self.qk_norm,
            post_norms=self.post_norms,
            attention_softcap=config.optional_number("attn_logit_softcapping"),
            logit_softcap=config.optional_number("final_logit_softcapping"),
            embedding_scale=hidden_size**0.5 if self.scaled_embeddings else 1.0,
            tied_embeddings=config.flag("tie_word_embeddings"),
        )

    def _activation(self, config: ConfigReader) -> ActivationKind:
        name = config.get(self.activation_key)
        if name not in _ACTIVATIONS:
            raise config.error(self.activation_key, f"one of {', '.join(_ACTIVATIONS)}")
        # Early Gemma checkpoints say gelu and mean its tanh approximation.
        return "gelu_tanh" if self.model_type == "gemma" and name == "gelu" else _ACTIVATIONS[name]


def _switch(config: ConfigReader, value: bool | str) -> bool:
    return config.flag(value) if isinstance(value, str) else value


def _attention_scales(config: ConfigReader, head_dim: int, layers: int) -> tuple[float, ...]:
    scale = config.number_or("query_pre_attn_scalar", head_dim) ** -0.5 if config.flag("scale_attn_weights") else 1.0
    by_layer = config.flag("scale_attn_by_inverse_layer_idx")
    return tuple(scale / (index + 1) if by_layer else scale for index in range(layers))
