"""Does this adapter fit this base model? The binding and the report that says why not.

Knows the base model only as a list of named linear modules with their sizes; knows nothing about how the base is
quantized, packed or run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BaseModule:
    """One linear module of the base model that an adapter can target.

    `name` is the full module path in the Hugging Face model, e.g. `model.layers.3.self_attn.q_proj` or `lm_head`.
    """

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class BaseModel:
    """What an adapter needs to know of a base model.

    `modules` is keyed by the module's name. `conv1d` says that the checkpoint stores its projections as (in, out)
    (GPT-2, PEFT's `fan_in_fan_out`); A and B have the usual shapes all the same.
    """

    name: str
    architecture: str
    fingerprint: str
    modules: Mapping[str, BaseModule]
    conv1d: bool = False


@dataclass(frozen=True)
class ModuleWeights:
    """The LoRA matrices of one module as stored: source dtype, CPU, nothing folded in.

    Shapes: `a` (r, in_features), `b` (out_features, r). The module adds `scaling * B A x`.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]


@dataclass(frozen=True)
class BoundAdapter:
    """An adapter whose every tensor belongs to a module of one base model."""

    digest: str
    modules: Mapping[str, ModuleWeights]
    chat_template: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all A and B in their source dtypes."""
        return sum(w.a.nbytes + w.b.nbytes for w in self.modules.values())
