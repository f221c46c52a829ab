"""The families of models that the decoder can be: for each, its switches and what its weights are called.

Defaults are those of the transformers configuration classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraplex.server.errors import ModelLoadError
from loraplex.server.models.family import Family, alternating_windows, one_window, qwen_windows
from loraplex.server.models.layout import ModuleNames
from loraplex.server.models.rope_config import original_context

_LLAMA_SIZES = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
_QWEN = {
    **_LLAMA_SIZES,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA = {
    "vocab_size": 256000,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}
_LLAMA_NAMES = ModuleNames()
_CAUSAL_ONLY: Mapping[str, tuple[Any, ...]] = {"use_bidirectional_attention": (None, False)}

_ALL = (
    Family(
        "LlamaForCausalLM",
        "llama",
        _LLAMA_NAMES,
        {**_LLAMA_SIZES, "intermediate_size": 11008, "max_position_embeddings": 2048, "eos_token_id": 2},
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    Family(
        "MistralForCausalLM",
        "mistral",
        _LLAMA_NAMES,
        {
            **_LLAMA_SIZES,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "eos_token_id": 2,
        },
        windows=one_window,
    ),
    Family("Qwen2ForCausalLM", "qwen2", _LLAMA_NAMES, _QWEN, windows=qwen_windows, qkv_bias=True),
    Family(
        "Qwen3ForCausalLM",
        "qwen3",
        _LLAMA_NAMES,
        {**_QWEN, "head_dim": 128},
        windows=qwen_windows,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
    ),
    Family(
        "Phi3ForCausalLM",
        "phi3",
        ModuleNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
        {
            **_LLAMA_SIZES,
            "hidden_size": 3072,
            "vocab_size": 32064,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "eos_token_id": 32000,
        },
        windows=one_window,
        phi_rope=True,
    ),
    Family(
        "GemmaForCausalLM",
        "gemma",
        _LLAMA_NAMES,
        {
            **_GEMMA,
            "hidden_size": 3072,
            "intermediate_size": 24576,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
        },
        refused=_CAUSAL_ONLY,
        norm="rms_plus_one",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        scaled_embeddings=True,
    ),
    Family(
        "Gemma2ForCausalLM",
        "gemma2",
        ModuleNames(
            mlp_norm="pre_feedforward_layernorm",
            post_attention_norm="post_attention_layernorm",
            post_mlp_norm="post_feedforward_layernorm",
        ),
        {
            **_GEMMA,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        refused=_CAUSAL_ONLY,
        windows=alternating_windows,
        norm="rms_plus_one",
        activation_key="hidden_activation",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        post_norms=True,
        scaled_embeddings=True,
    ),
    Family(
        "GPT2LMHeadModel",
        "gpt2",
        ModuleNames(
            root="transformer",
            embedding="wte",
            positions="wpe",
            layers="h",
            final_norm="ln_f",
            input_norm="ln_1",
            mlp_norm="ln_2",
            qkv=("attn.c_attn",),
            o="attn.c_proj",
            gate_up=("mlp.c_fc",),
            down="mlp.c_proj",
            conv1d=True,
            ignored=(r"attn\.bias", r"attn\.masked_bias"),
        ),
        {
            "vocab_size": 50257,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 1024,
            "hidden_act": "gelu_new",
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "eos_token_id": 50256,
        },
        aliases={
            "hidden_size": "n_embd",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
            "intermediate_size": "n_inner",
            "hidden_act": "activation_function",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        refused={"add_cross_attention": (None, False), "head_dim": (None,), "num_key_value_heads": (None,)},
        norm="layer",
        gated_mlp=False,
        rotary=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
    ),
)
FAMILIES: Mapping[str, Family] = {family.architecture: family for family in _ALL}


def find_family(values: Mapping[str, Any]) -> Family:
    """Return the family that a `config.json` names in `architectures`, or failing that in `model_type`.

    Raises:
        ModelLoadError: listing the known architectures.
    """
    named = values.get("architectures") or []
    model_type = values.get("model_type")
    if not named:
        named = [family.architecture for family in _ALL if family.model_type == model_type] or [str(model_type)]
    for architecture in named:
        if architecture in FAMILIES:
            return FAMILIES[architecture]
    raise ModelLoadError(
        f"unknown architecture {', '.join(map(str, named))}; this server knows {', '.join(sorted(FAMILIES))}"
    )


def context_limits(family: Family, values: Mapping[str, Any]) -> tuple[int, int]:
    """Return the longest context at the model's usual frequencies, and with those for long contexts (longrope)."""
    config = family.reader(values)
    longest = config.integer("max_position_embeddings")
    rope = family.read(values).rope
    usual = min(longest, original_context(config)) if rope is not None and rope.kind == "longrope" else longest
    return usual, longest
