"""What packing an adapter must know of the base model beside its sites.

Plain LoRA needs none of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from loraplex.server.lora.dora import BaseWeight, FactorCache
from loraplex.server.models.norms import Norm


@dataclass(frozen=True)
class BaseNorm:
    """One norm of the base.

    Attributes:
        parameters: what it is made of, by parameter name, as the checkpoint has it.
        prepare: such parameters (all of them, by name) to the tensors that the norm reads when it runs.
        make: those tensors to the norm, which keeps them as they are.
    """

    parameters: Mapping[str, torch.Tensor]
    prepare: Callable[[Mapping[str, torch.Tensor]], tuple[torch.Tensor, ...]]
    make: Callable[[tuple[torch.Tensor, ...]], Norm]

    def norm(self) -> Norm:
        """Return the base's own."""
        return self.make(self.prepare(self.parameters))


@dataclass(frozen=True)
class BaseParameters:
    """The base's parameters, by their Hugging Face names where they have one.

    Attributes:
        weights: the product at each site.
        biases: of linear modules, by parameter name, as they are added.
        activations: dtype of what flows between the products.
        norms: by their place in the decoder, "layers.3.mlp_norm" or "final_norm".
        tables: the shapes of the embedding and of learned positions, by parameter name.
        embedding, positions: which of them is which; `positions` None where there are none.
        stored_across: names of the weights that the checkpoint has as (in, out).
        table: the embedding itself, (vocab, hidden); None where it is not known.
        tied: whether lm_head is made of `table`.
        head_digest: otherwise `copies.matrix_digest` of what lm_head is made of, in `activations`; "" where that is not
            known (a checkpoint that holds lm_head quantized).
        factors: DoRA's, of adapters on this base.
    """

    weights: Sequence[BaseWeight]
    biases: Mapping[str, torch.Tensor]
    activations: torch.dtype
    norms: Mapping[str, BaseNorm]
    tables: Mapping[str, tuple[int, int]]
    embedding: str
    positions: str | None = None
    stored_across: Collection[str] = frozenset()
    table: torch.Tensor | None = None
    tied: bool = False
    head_digest: str = ""
    factors: FactorCache = field(default_factory=FactorCache)
