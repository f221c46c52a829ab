"""Every kind of adapter that PEFT writes and that is served, made by PEFT itself on tiny models, with random weights.

A format is a configuration; its weights are a function of its name, strong enough to change every text.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.parity.tiny_models import TINY_MODELS

TINY = {model.name: model for model in TINY_MODELS}
UNTIED, TIED, GPT2, GPT2_UNTIED, PHI3, QWEN3, GEMMA2, GEMMA2_UNTIED = (
    "llama-biases",
    "llama-tied-llama3",
    "gpt2-tied",
    "gpt2-untied-scales",
    "phi3-partial-rotary",
    "qwen3-tied",
    "gemma2-caps",
    "gemma2-no-caps",
)
INVOCATION = (11, 12)


@dataclass(frozen=True)
class PeftFormat:
    """One kind of adapter: `options` go into the `LoraConfig`, `save_options` into `save_pretrained`."""

    name: str
    options: Mapping[str, Any]
    save_options: Mapping[str, Any] = field(default_factory=dict)

    def save(self, base: PreTrainedModel, folder: Path) -> None:
        """Make the adapter on a copy of `base` and write it into `folder`."""
        options = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **copy.deepcopy(dict(self.options))}
        config = LoraConfig(**options)
        model = get_peft_model(copy.deepcopy(base), config)
        randomize(model, self.name)
        model.save_pretrained(str(folder), **self.save_options)


def randomize(model: PeftModel, name: str) -> None:
    """Give all trained weights values that count."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def noise(parameter: torch.Tensor) -> torch.Tensor:
        return torch.randn(parameter.shape, generator=generator)

    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if "lora_A" in key or "lora_embedding_A" in key:
                parameter.copy_(noise(parameter) * parameter.shape[1] ** -0.5)
            elif "lora_B" in key or "lora_embedding_B" in key:
                parameter.copy_(0.25 * noise(parameter))
            elif "lora_magnitude" in key:
                parameter.mul_(1 + 0.4 * noise(parameter))
            else:  # trained whole, rows, biases
                parameter.add_(0.5 * noise(parameter) * max(float(parameter.std()), 0.1))


def tiny_base(name: str, folder: Path) -> PreTrainedModel:
    """Write the tiny model `name` into `folder`, and return it as transformers reads it back."""
    TINY[name].save(folder)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    return model


def peft_logits(base: PreTrainedModel, folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Return what PEFT computes for the saved adapter on a fresh copy of `base`: (rows, length, vocab) float32."""
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=tokens).logits
    return logits


_QV = ["q_proj", "v_proj"]
_PATTERNS = {
    "rank_pattern": {r"layers\.0\..*q_proj": 2, "v_proj": 6},
    "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
}
# For models with the modules and the biases of Llama.
_LLAMA: Sequence[PeftFormat] = (
    PeftFormat("plain", {"target_modules": _QV}),
    PeftFormat("rslora", {"target_modules": _QV, "use_rslora": True, **_PATTERNS}),
    PeftFormat(
        "patterns", {"target_modules": [*_QV, "down_proj"], "exclude_modules": ["1.mlp.down_proj"], **_PATTERNS}
    ),
    PeftFormat(
        "expression", {"target_modules": r".*layers\.[02]\..*(o|up)_proj", "exclude_modules": r".*\.2\..*up_proj"}
    ),
    PeftFormat("layers", {"target_modules": _QV, "layers_to_transform": [0, 2], "layers_pattern": "layers"}),
    PeftFormat("layer", {"target_modules": ["self_attn.q_proj"], "layers_to_transform": 1}),
    PeftFormat("all-linear", {"target_modules": "all-linear"}),
    PeftFormat("orthogonal", {"target_modules": _QV, "init_lora_weights": "orthogonal"}),
    PeftFormat("mica", {"target_modules": _QV, "init_lora_weights": "mica"}),
    PeftFormat("lora-bias", {"target_modules": _QV, "lora_bias": True}),
    PeftFormat("bias-all", {"target_modules": _QV, "bias": "all"}),
    PeftFormat("bias-lora-only", {"target_modules": _QV, "bias": "lora_only", "lora_bias": True}),
    PeftFormat("dora", {"target_modules": [*_QV, "down_proj"], "use_dora": True}),
    PeftFormat(
        "dora-everything", {"target_modules": "all-linear", "use_dora": True, "use_rslora": True, "bias": "all"}
    ),
    PeftFormat(
        "dora-and-more",
        {
            "target_modules": _QV,
            "use_dora": True,
            **_PATTERNS,
            "modules_to_save": ["norm"],
            "trainable_token_indices": [9],
        },
    ),
    PeftFormat("dora-head", {"target_modules": ["q_proj", "lm_head"], "use_dora": True}),
    PeftFormat("alora", {"target_modules": _QV, "alora_invocation_tokens": list(INVOCATION)}),
    PeftFormat(
        "alora-head",
        {"target_modules": ["v_proj", "lm_head"], "alora_invocation_tokens": list(INVOCATION)},
        {"save_embedding_layers": False},
    ),
    PeftFormat("alora-bias", {"target_modules": _QV, "alora_invocation_tokens": list(INVOCATION), "lora_bias": True}),
    PeftFormat("head", {"target_modules": ["q_proj", "lm_head"]}),
    PeftFormat("head-alone", {"target_modules": ["lm_head"]}, {"save_embedding_layers": False}),
    PeftFormat("embedding", {"target_modules": ["q_proj", "embed_tokens"]}),
    PeftFormat("embedding-rslora", {"target_modules": ["embed_tokens"], "use_rslora": True}),
    PeftFormat("embedding-and-head", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    PeftFormat("embedding-tied", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    PeftFormat("head-tied", {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}),
    PeftFormat("copies", {"target_modules": _QV}, {"save_embedding_layers": True}),
    PeftFormat("saved-embedding", {"target_modules": _QV, "modules_to_save": ["embed_tokens"]}),
    PeftFormat("saved-embedding-head", {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}),
    PeftFormat("saved-head", {"target_modules": _QV, "modules_to_save": ["lm_head"]}),
    PeftFormat("saved-both", {"target_modules": _QV, "modules_to_save": ["lm_head", "model.embed_tokens"]}),
    PeftFormat(
        "saved-not-targeted",
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    PeftFormat("saved-norms", {"target_modules": _QV, "modules_to_save": ["norm"]}),
    PeftFormat("saved-mlp", {"target_modules": _QV, "modules_to_save": ["mlp"]}),
    PeftFormat("saved-key", {"target_modules": _QV, "modules_to_save": ["k_proj"], "bias": "all"}),
    PeftFormat("saved-final-norm", {"target_modules": "all-linear", "modules_to_save": ["model.norm"]}),
    PeftFormat("saved-tied", {"target_modules": _QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    PeftFormat("saved-head-tied", {"target_modules": _QV, "modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    PeftFormat(
        "saved-twice",
        {"target_modules": _QV, "modules_to_save": ["embed_tokens", "lm_head"]},
        {"save_embedding_layers": True},
    ),
    PeftFormat("tokens", {"target_modules": _QV, "trainable_token_indices": [9, 3, 14]}),
    PeftFormat(
        "tokens-of-both",
        {"target_modules": _QV, "trainable_token_indices": {"embed_tokens": [9, 3], "lm_head": [9, 3]}},
    ),
    PeftFormat(
        "tokens-of-each", {"target_modules": _QV, "trainable_token_indices": {"embed_tokens": [9, 3], "lm_head": [14]}}
    ),
    PeftFormat("tokens-of-head", {"target_modules": _QV, "trainable_token_indices": {"lm_head": [14, 5]}}),
    PeftFormat("tokens-and-head", {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [9, 3]}),
    PeftFormat(
        "tokens-and-norms", {"target_modules": _QV, "trainable_token_indices": [9], "modules_to_save": ["norm"]}
    ),
)
_GPT2: Sequence[PeftFormat] = (
    PeftFormat("conv1d", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    PeftFormat("conv1d-unsaid", {"target_modules": "all-linear", "fan_in_fan_out": False, "use_rslora": True}),
    PeftFormat("conv1d-dora", {"target_modules": ["c_attn", "mlp.c_proj"], "use_dora": True, "bias": "lora_only"}),
    PeftFormat("conv1d-biases", {"target_modules": ["c_attn"], "bias": "all", "lora_bias": True}),
    PeftFormat("wte", {"target_modules": ["c_attn", "wte", "lm_head"], "bias": "all"}),
    PeftFormat("saved-wte", {"target_modules": ["c_attn"], "modules_to_save": ["wte", "wpe", "ln_f"], "bias": "all"}),
    PeftFormat("saved-conv1d", {"target_modules": ["c_attn"], "modules_to_save": ["mlp", "attn.c_proj"]}),
    PeftFormat("wte-tokens", {"target_modules": ["c_attn"], "trainable_token_indices": [4, 6]}),
)
_PHI3: Sequence[PeftFormat] = (
    PeftFormat("fused", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    PeftFormat("fused-dora", {"target_modules": "all-linear", "use_dora": True, "modules_to_save": ["norm"]}),
)
# Gemma's large embeddings outweigh what weaker adapters add.
_STRONG = {"lora_alpha": 64}
_VD = ["v_proj", "o_proj", "up_proj", "down_proj"]
_GEMMA: Sequence[PeftFormat] = (
    PeftFormat("scaled-embedding", {**_STRONG, "target_modules": [*_VD, "embed_tokens"]}),
    PeftFormat("scaled-tokens", {**_STRONG, "target_modules": _VD, "trainable_token_indices": [7, 3]}),
    PeftFormat("scaled-saved", {**_STRONG, "target_modules": _VD, "modules_to_save": ["embed_tokens", "norm"]}),
    PeftFormat("scaled-tied", {**_STRONG, "target_modules": [*_VD, "lm_head"], "ensure_weight_tying": True}),
)
_QWEN: Sequence[PeftFormat] = (PeftFormat("qk-norms", {"target_modules": _QV, "modules_to_save": ["norm"]}),)
FORMATS: Mapping[str, Sequence[PeftFormat]] = {
    UNTIED: _LLAMA,
    TIED: _LLAMA,
    GPT2: _GPT2,
    GPT2_UNTIED: _GPT2,
    PHI3: _PHI3,
    QWEN3: _QWEN,
    GEMMA2: _GEMMA,
    GEMMA2_UNTIED: _GEMMA,
}
