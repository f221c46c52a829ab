"""Leaves out of an adapter what is the base's own.

PEFT saves the base's embedding and lm_head beside every LoRA on them. Kept as weights of the adapter's own they would
take more memory than everything else it has, and a matrix product of their own in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from loraplex.adapters.base_model import HEAD, HEAD_WEIGHT
from loraplex.adapters.binding import BoundAdapter
from loraplex.server.lora.base import BaseParameters
from loraplex.server.lora.weights import LinearSite


def without_copies(bound: BoundAdapter, sites: Sequence[LinearSite], base: BaseParameters) -> BoundAdapter:
    """Return `bound` without those of its embedding and lm_head whose values in the base's dtype are the base's."""
    copies = {
        name
        for name in (base.embedding, HEAD_WEIGHT)
        if name in bound.parameters and _is_copy(bound.parameters[name], _own(name, sites, base), base.activations)
    }
    kept = {name: value for name, value in bound.parameters.items() if name not in copies}
    return replace(bound, parameters=kept) if copies else bound


def _own(name: str, sites: Sequence[LinearSite], base: BaseParameters) -> torch.Tensor | None:
    if name == base.embedding:
        return base.table
    index = next((index for index, site in enumerate(sites) if HEAD in site.targets), None)
    return None if index is None or index >= len(base.weights) else base.weights[index].dequantize()


def _is_copy(value: torch.Tensor, own: torch.Tensor | None, dtype: torch.dtype) -> bool:
    if own is None or own.shape != value.shape:
        return False
    return torch.equal(value.to(own.device, dtype), own.to(dtype))
