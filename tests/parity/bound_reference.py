"""What a bound adapter means, in float32 on the model as transformers has it: the definition, not the engine.

Weights are exchanged in a copy of the model; LoRA on linear modules is merged into the weights, except where it acts on
some tokens only (aLoRA) or has a bias, which a hook adds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loraplex.adapters.binding import BaseModel, BoundAdapter, ModuleWeights


def bound_logits(model: PreTrainedModel, base: BaseModel, adapter: BoundAdapter, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits (rows, length, vocab) of `tokens` (rows, length) with `adapter`."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        embedding, head = changed.get_input_embeddings(), changed.get_output_embeddings()
        assert isinstance(embedding, nn.Embedding)
        assert isinstance(head, nn.Linear)
        # From here on each has a matrix of its own.
        embedding.weight = nn.Parameter(embedding.weight.clone())
        head.weight = nn.Parameter(head.weight.clone())
        for name, value in adapter.parameters.items():
            changed.get_parameter(name).copy_(value)
        for name, rows in adapter.token_rows.items():
            changed.get_parameter(name)[rows.tokens] = rows.rows.float()
        if adapter.embedding is not None:
            lora = adapter.embedding
            embedding.weight.add_(lora.scaling * (lora.b.float() @ lora.a.float()).t())
        active = _active(adapter, tokens)
        for name, weights in adapter.modules.items():
            module = changed.get_submodule(name)
            if weights.magnitude is not None:
                _merge(module, weights)
            else:
                module.register_forward_hook(_hook(weights, active))
    with torch.inference_mode():
        logits: torch.Tensor = changed(input_ids=tokens).logits
    return logits


def _merge(module: nn.Module, weights: ModuleWeights) -> None:
    weight = module.get_parameter("weight")
    across = isinstance(module, Conv1D)
    merged = (weight.t() if across else weight) + weights.scaling * (weights.b.float() @ weights.a.float())
    assert weights.magnitude is not None
    merged *= (weights.magnitude / merged.norm(dim=1))[:, None]
    weight.copy_(merged.t() if across else merged)


def _hook(weights: ModuleWeights, active: torch.Tensor) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor]:
    def add(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        added = inputs[0] @ weights.a.float().t() @ weights.b.float().t()
        if weights.lora_bias is not None:
            added = added + weights.lora_bias.float()
        return output + weights.scaling * added * active

    return add


def _active(adapter: BoundAdapter, tokens: torch.Tensor) -> torch.Tensor:
    """Return 1 where the adapter acts and 0 elsewhere, (rows, length, 1)."""
    invocation = adapter.traits.invocation_tokens
    active = torch.ones(*tokens.shape, 1)
    if not invocation:
        return active
    for row, ids in enumerate(tokens.tolist()):
        starts = [i for i in range(len(ids)) if tuple(ids[i : i + len(invocation)]) == invocation]
        active[row, : starts[-1] if starts else len(ids)] = 0
    return active
