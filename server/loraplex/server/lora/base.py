"""What packing an adapter must know of the base model beside its sites.

Plain LoRA needs none of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from loraplex.server.lora.dora import BaseWeight, FactorCache


@dataclass(frozen=True)
class BaseParameters:
    """The base's parameters, by their Hugging Face names where they have one.

    Attributes:
        weights: the product at each site.
        biases: of linear modules, by parameter name, as they are added.
        activations: dtype of what flows between the products.
        stored_across: names of the weights that the checkpoint has as (in, out).
        factors: DoRA's, of adapters on this base.
    """

    weights: Sequence[BaseWeight]
    biases: Mapping[str, torch.Tensor]
    activations: torch.dtype
    stored_across: Collection[str] = frozenset()
    factors: FactorCache = field(default_factory=FactorCache)
