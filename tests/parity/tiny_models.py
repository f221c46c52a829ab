"""Tiny random models of every family, in the settings that change the computation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 97
# All settings but the family's own: four query heads, two of keys and values.
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2_SIZES = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 40,
}


@dataclass(frozen=True)
class TinyModel:
    """A configuration; `max_model_len` is what the loader is asked for."""

    name: str
    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    max_model_len: int = 0

    def config(self) -> Any:
        """Return the transformers configuration."""
        sizes = _GPT2_SIZES if self.model_type == "gpt2" else _SIZES
        return AutoConfig.for_model(self.model_type, **{**sizes, **self.settings})

    def save(self, folder: Path, **save_options: Any) -> PreTrainedModel:
        """Write the model to `folder`, and return it as transformers has it."""
        torch.manual_seed(sum(map(ord, self.name)))
        model = AutoModelForCausalLM.from_config(self.config(), attn_implementation="eager").float().eval()
        randomize(model)
        model.save_pretrained(folder, **save_options)
        return model


def randomize(model: PreTrainedModel) -> None:
    """Draw weights that make every part of the computation count: fresh models have near-uniform attention."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)


TINY_MODELS = (
    TinyModel("llama-biases", "llama", {"attention_bias": True, "mlp_bias": True}),
    TinyModel("llama-tied-llama3", "llama", {"tie_word_embeddings": True, "head_dim": 12, "rope_parameters": _LLAMA3}),
    TinyModel("llama-linear", "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    TinyModel(
        "llama-dynamic", "llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}}
    ),
    TinyModel("llama-yarn", "llama", {"rope_parameters": _YARN, "num_key_value_heads": 4}),
    TinyModel("mistral-window", "mistral", {"sliding_window": 7}),
    TinyModel("mistral-no-window", "mistral", {"sliding_window": None, "tie_word_embeddings": True, "head_dim": 16}),
    TinyModel("qwen2-tied", "qwen2", {"tie_word_embeddings": True}),
    TinyModel(
        "qwen2-windows",
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 0.3, "beta_fast": 16, "truncate": False},
        },
    ),
    TinyModel("qwen3-tied", "qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
    TinyModel(
        "qwen3-windows",
        "qwen3",
        {
            "attention_bias": True,
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 2,
        },
    ),
    TinyModel(
        "phi3-partial-rotary",
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    TinyModel(
        "phi3-longrope-short",
        "phi3",
        {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 40, "sliding_window": 9},
    ),
    TinyModel(
        "phi3-longrope-long",
        "phi3",
        {
            "rope_parameters": {**_LONGROPE, "original_max_position_embeddings": 8},
            "original_max_position_embeddings": 8,
            "tie_word_embeddings": True,
        },
        max_model_len=64,
    ),
    TinyModel("gemma-one-kv-head", "gemma", {"num_key_value_heads": 1, "head_dim": 16}),
    TinyModel("gemma-biases", "gemma", {"attention_bias": True, "head_dim": 8, "hidden_act": "gelu"}),
    TinyModel(
        "gemma2-caps",
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": 6,
            "query_pre_attn_scalar": 5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 1.5,
        },
    ),
    TinyModel(
        "gemma2-no-caps",
        "gemma2",
        {
            "head_dim": 8,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 4,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    TinyModel("gpt2-tied", "gpt2"),
    TinyModel(
        "gpt2-untied-scales",
        "gpt2",
        {
            "n_inner": 40,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
            "scale_attn_weights": False,
            "scale_attn_by_inverse_layer_idx": True,
        },
    ),
)
