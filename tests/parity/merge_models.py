"""What the tests of merging share: tiny random base models and adapters on disk, and how they are merged and read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from loraplex.adapters.binding import BoundAdapter
from loraplex.adapters.merge import AdapterSource, MergeOptions, MergeResult, Progress, merge_adapters

LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2_TARGETS = ["c_attn", "c_proj", "c_fc"]
IDS = torch.arange(24).reshape(2, 12)


def make_base(folder: Path, family: str, *, tied: bool = True, dtype: torch.dtype = torch.float32, **save: Any) -> Path:
    torch.manual_seed(0)
    model: Any
    if family == "llama":
        sizes: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_key_value_heads": 2,
        }
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=96, num_hidden_layers=2, num_attention_heads=4, tie_word_embeddings=tied, **sizes)
        )
    else:
        shape: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=96, tie_word_embeddings=tied, **shape))
    # Norms and biases away from their initial ones and zeros, so that losing one is seen.
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder, **save)
    return folder


def make_adapter(base: Path, folder: Path, targets: Sequence[str], **options: Any) -> Path:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=8, lora_alpha=12, target_modules=list(targets), task_type="CAUSAL_LM", **options),
    )
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found.float()


def merge_adapter(
    model: Path,
    adapter: Path | BoundAdapter,
    output: Path,
    *,
    scale: float = 1.0,
    progress: Progress = lambda phase, done, total: None,
    **options: Any,
) -> MergeResult:
    return merge_adapters(model, [AdapterSource(adapter, scale)], output, MergeOptions(**options), progress)


def family_targets(family: str) -> list[str]:
    return LLAMA_TARGETS if family == "llama" else GPT2_TARGETS


def assert_same_weights(ours: Any, theirs: Any, tolerance: float) -> None:
    left, right = ours.state_dict(), theirs.state_dict()
    assert set(left) == set(right)
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], atol=tolerance, rtol=0)
