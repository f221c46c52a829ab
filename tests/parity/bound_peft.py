"""A PEFT model's adapter as a `BoundAdapter`, taken from its modules in memory instead of from files."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

from loraplex.adapters.binding import BoundAdapter, EmbeddingWeights, ModuleWeights, TokenRows
from loraplex.adapters.traits import AdapterTraits


def randomized(base: Any, config: LoraConfig, seed: int = 1) -> PeftModel:
    """Wrap `base` and draw everything that the adapter trains."""
    model = get_peft_model(base, config)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def bound(model: PeftModel, digest: str = "sha256:peft", name: str = "default") -> BoundAdapter:
    """Return the adapter `name` of `model`; what it shares between tied matrices is named for both."""
    modules: dict[str, ModuleWeights] = {}
    parameters: dict[str, torch.Tensor] = {}
    rows: dict[str, TokenRows] = {}
    embedding = None
    inner = model.get_base_model()
    config: Any = model.peft_config[name]
    for path, module in inner.named_modules():
        if isinstance(module, Embedding) and name in module.lora_embedding_A:
            a, b = module.lora_embedding_A[name].data, module.lora_embedding_B[name].data
            embedding = EmbeddingWeights(a, b, module.scaling[name])
        elif isinstance(module, LoraLayer) and name in module.lora_A:
            layer_b: Any = module.lora_B[name]
            magnitude: Any = module.lora_magnitude_vector[name].weight.data if config.use_dora else None
            layer_a: Any = module.lora_A[name]
            modules[path] = ModuleWeights(
                layer_a.weight.data,
                layer_b.weight.data,
                module.scaling[name],
                magnitude,
                layer_b.bias.data if config.lora_bias else None,
            )
        elif isinstance(module, ModulesToSaveWrapper):
            saved: Any = module.modules_to_save[name]
            parameters |= {f"{path}.{own}": tensor.data for own, tensor in saved.named_parameters()}
        elif isinstance(module, TrainableTokensWrapper):
            adapter: Any = module.token_adapter
            tokens = torch.tensor(adapter.token_indices[name])
            matrix = f"{path}.weight".replace(".base_layer.", ".")
            rows[matrix] = TokenRows(tokens, adapter.trainable_tokens_delta[name].data)
    if config.bias != "none":
        for path, parameter in inner.named_parameters():
            if path.endswith(".bias") and parameter.requires_grad:
                parameters[path.replace(".base_layer.", ".")] = parameter.data
    kind = "alora" if config.alora_invocation_tokens else "dora" if config.use_dora else "lora"
    traits = AdapterTraits(kind, config.use_dora, tuple(config.alora_invocation_tokens or ()))
    return BoundAdapter(digest, modules, None, embedding, parameters, rows, traits)
