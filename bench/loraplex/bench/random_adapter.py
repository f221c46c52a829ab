"""Writes adapters with random weights for a model of Llama's shape, as PEFT would save them.

Speed does not depend on the weights. What is written does: a wrong adapter can be told from the right one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
STRENGTH = 0.4
"""Of every adapter whatever its rank: a third of SmolLM2's greedy tokens become others, and text remains text."""


@dataclass(frozen=True)
class ModelShape:
    """The linear layers of the model that the adapters are for; the defaults are SmolLM2-135M's."""

    layers: int = 30
    hidden: int = 576
    intermediate: int = 1536
    key_value: int = 192

    @classmethod
    def of(cls, model: Path) -> Self:
        """Read the shape from a Hugging Face folder.

        Raises:
            FileNotFoundError: if there is no config.json.
            KeyError: if it does not describe a model of Llama's shape.
        """
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        key_value = config["num_key_value_heads"] * (config.get("head_dim") or hidden // heads)
        return cls(config["num_hidden_layers"], hidden, config["intermediate_size"], key_value)

    def projections(self) -> dict[str, tuple[int, int]]:
        """Return (in_features, out_features) of one layer's projections by module name."""
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.hidden, self.key_value),
            "self_attn.v_proj": (self.hidden, self.key_value),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.hidden, self.intermediate),
            "mlp.up_proj": (self.hidden, self.intermediate),
            "mlp.down_proj": (self.intermediate, self.hidden),
        }


def write_adapter(folder: Path, rank: int, seed: int, shape: ModelShape | None = None) -> None:
    """Write a random adapter on all projections: A uniform as PEFT starts it, B normal, alpha = 2 * rank, fp16."""
    import numpy as np
    from safetensors.numpy import save_file

    draw = np.random.default_rng(seed)
    shape = shape or ModelShape()
    tensors = {}
    for layer in range(shape.layers):
        for module, (inputs, outputs) in shape.projections().items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            a = (2 * draw.random((rank, inputs), dtype=np.float32) - 1) / inputs**0.5
            b = STRENGTH / rank**0.5 * draw.standard_normal((outputs, rank), dtype=np.float32)
            tensors[f"{name}.lora_A.weight"] = a.astype(np.float16)
            tensors[f"{name}.lora_B.weight"] = b.astype(np.float16)
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(peft_config(rank, shape.projections()), encoding="utf-8")


def peft_config(rank: int, modules: Iterable[str]) -> str:
    """Return the text of adapter_config.json for LoRA on these modules, alpha twice the rank."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(module.split(".")[1] for module in modules),
    }
    return json.dumps(config, indent=2) + "\n"
