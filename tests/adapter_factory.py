"""Small adapter folders written by hand, and the tiny base model that they fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from loraplex.adapters.binding import BaseModel, BaseModule

HIDDEN, INNER, LAYERS = 8, 16, 2


def tiny_base(fingerprint: str = "tiny") -> BaseModel:
    """Two layers with q_proj, v_proj and down_proj, and lm_head."""
    shapes: dict[str, tuple[int, int]] = {"lm_head": (HIDDEN, 32)}
    for layer in range(LAYERS):
        shapes[f"model.layers.{layer}.self_attn.q_proj"] = (HIDDEN, HIDDEN)
        shapes[f"model.layers.{layer}.self_attn.v_proj"] = (HIDDEN, 4)
        shapes[f"model.layers.{layer}.mlp.down_proj"] = (INNER, HIDDEN)
    modules = {name: BaseModule(name, *shape) for name, shape in shapes.items()}
    return BaseModel("tiny", "LlamaForCausalLM", fingerprint, modules)


def config(**changes: Any) -> dict[str, Any]:
    """A LoRA config as PEFT writes it, with `changes`."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "target_modules": ["q_proj", "v_proj"],
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    } | changes


def tensors(
    base: BaseModel, targets: tuple[str, ...] = ("q_proj", "v_proj"), rank: int = 4, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random A and B in fp32 for every module of `base` that `targets` name, under PEFT's keys."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {}
    for name, module in base.modules.items():
        if name.rpartition(".")[2] in targets:
            prefix = f"base_model.model.{name}"
            made[f"{prefix}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=generator)
            made[f"{prefix}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=generator)
    return made


def write_adapter(
    folder: Path,
    *,
    weights: Mapping[str, torch.Tensor] | None = None,
    seed: int = 0,
    template: str | None = None,
    **changes: Any,
) -> Path:
    """Write an adapter for `tiny_base()` into `folder` and return it; `changes` go into the config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config(**changes)))
    weights = tensors(tiny_base(), seed=seed) if weights is None else weights
    save_file(dict(weights), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder
