"""The shapes of common base models, so that advice and plans need neither their weights nor a connection.

Only what decides shapes is kept; everything else is the default of transformers' configuration class. The parameter
counts that follow from them are checked against the published ones in the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KnownModel:
    """A common model: its name on the hub, transformers' model type and class, and the config keys that shape it."""

    hub_id: str
    model_type: str
    architecture: str
    values: Mapping[str, Any]


def _llama(
    hub_id: str, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any
) -> KnownModel:
    return _decoder(hub_id, "llama", "LlamaForCausalLM", (hidden, intermediate, layers, heads, kv_heads, vocab), more)


def _qwen(
    hub_id: str, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any
) -> KnownModel:
    return _decoder(hub_id, "qwen2", "Qwen2ForCausalLM", (hidden, intermediate, layers, heads, kv_heads, vocab), more)


def _decoder(
    hub_id: str, model_type: str, architecture: str, shape: tuple[int, ...], more: Mapping[str, Any]
) -> KnownModel:
    keys = (
        *("hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "vocab_size"),
    )
    return KnownModel(hub_id, model_type, architecture, dict(zip(keys, shape, strict=True)) | dict(more))


def _gpt2(hub_id: str, hidden: int, layers: int, heads: int) -> KnownModel:
    return KnownModel(hub_id, "gpt2", "GPT2LMHeadModel", {"n_embd": hidden, "n_layer": layers, "n_head": heads})


def _bert(hub_id: str, hidden: int, intermediate: int, layers: int, heads: int) -> KnownModel:
    shape = {"hidden_size": hidden, "intermediate_size": intermediate}
    return KnownModel(
        hub_id, "bert", "BertForMaskedLM", {**shape, "num_hidden_layers": layers, "num_attention_heads": heads}
    )


_TIED = {"tie_word_embeddings": True}

KNOWN_MODELS: Mapping[str, KnownModel] = {
    "smollm2-135m": _llama(
        "HuggingFaceTB/SmolLM2-135M-Instruct", 576, 1536, 30, 9, 3, 49152, max_position_embeddings=8192, **_TIED
    ),
    "tinyllama-1.1b": _llama("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 2048, 5632, 22, 32, 4, 32000),
    "llama-2-7b": _llama("meta-llama/Llama-2-7b-hf", 4096, 11008, 32, 32, 32, 32000, max_position_embeddings=4096),
    "llama-2-13b": _llama("meta-llama/Llama-2-13b-hf", 5120, 13824, 40, 40, 40, 32000, max_position_embeddings=4096),
    "llama-2-70b": _llama("meta-llama/Llama-2-70b-hf", 8192, 28672, 80, 64, 8, 32000, max_position_embeddings=4096),
    "llama-3.1-8b": _llama("meta-llama/Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128256, max_position_embeddings=131072),
    "llama-3.1-70b": _llama("meta-llama/Llama-3.1-70B", 8192, 28672, 80, 64, 8, 128256, max_position_embeddings=131072),
    "llama-3.2-1b": _llama(
        "meta-llama/Llama-3.2-1B", 2048, 8192, 16, 32, 8, 128256, max_position_embeddings=131072, **_TIED
    ),
    "llama-3.2-3b": _llama(
        "meta-llama/Llama-3.2-3B", 3072, 8192, 28, 24, 8, 128256, max_position_embeddings=131072, **_TIED
    ),
    "mistral-7b": _decoder(
        "mistralai/Mistral-7B-v0.1", "mistral", "MistralForCausalLM", (4096, 14336, 32, 32, 8, 32000), {}
    ),
    "qwen2.5-0.5b": _qwen("Qwen/Qwen2.5-0.5B", 896, 4864, 24, 14, 2, 151936, **_TIED),
    "qwen2.5-1.5b": _qwen("Qwen/Qwen2.5-1.5B", 1536, 8960, 28, 12, 2, 151936, **_TIED),
    "qwen2.5-7b": _qwen("Qwen/Qwen2.5-7B", 3584, 18944, 28, 28, 4, 152064),
    "qwen2.5-14b": _qwen("Qwen/Qwen2.5-14B", 5120, 13824, 48, 40, 8, 152064),
    "qwen3-0.6b": _decoder(
        "Qwen/Qwen3-0.6B", "qwen3", "Qwen3ForCausalLM", (1024, 3072, 28, 16, 8, 151936), {"head_dim": 128, **_TIED}
    ),
    "qwen3-8b": _decoder(
        "Qwen/Qwen3-8B", "qwen3", "Qwen3ForCausalLM", (4096, 12288, 36, 32, 8, 151936), {"head_dim": 128}
    ),
    "gemma-2-2b": _decoder(
        "google/gemma-2-2b", "gemma2", "Gemma2ForCausalLM", (2304, 9216, 26, 8, 4, 256000), {"head_dim": 256}
    ),
    "gemma-2-9b": _decoder(
        "google/gemma-2-9b", "gemma2", "Gemma2ForCausalLM", (3584, 14336, 42, 16, 8, 256000), {"head_dim": 256}
    ),
    "phi-3-mini": _decoder(
        "microsoft/Phi-3-mini-4k-instruct", "phi3", "Phi3ForCausalLM", (3072, 8192, 32, 32, 32, 32064), {}
    ),
    "gpt2": _gpt2("openai-community/gpt2", 768, 12, 12),
    "gpt2-medium": _gpt2("openai-community/gpt2-medium", 1024, 24, 16),
    "dialogpt-medium": _gpt2("microsoft/DialoGPT-medium", 1024, 24, 16),
    "bert-base": _bert("google-bert/bert-base-uncased", 768, 3072, 12, 12),
    "bert-large": _bert("google-bert/bert-large-uncased", 1024, 4096, 24, 16),
}


def known_model(name: str) -> KnownModel | None:
    """Return the model of that short name or hub id, whatever the case; None if it is not in the table."""
    wanted = name.lower()
    for short, model in KNOWN_MODELS.items():
        if wanted in (short, model.hub_id.lower()):
            return model
    return None
