"""What an adapter needs to know of a base model: names and shapes.

Knows nothing about how the base is quantized, packed or run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

HEAD = "lm_head"
HEAD_WEIGHT = "lm_head.weight"


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
    (GPT-2, PEFT's `fan_in_fan_out`); A and B have the usual shapes all the same. `parameters` are the shapes of what is
    no linear weight, by Hugging Face parameter name: embeddings, norms, biases. `embedding` is the input embedding's
    parameter name; `tied` says that lm_head has the same matrix.
    """

    name: str
    architecture: str
    fingerprint: str
    modules: Mapping[str, BaseModule]
    conv1d: bool = False
    parameters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    embedding: str = ""
    tied: bool = False

    def shape_of(self, parameter: str) -> tuple[int, ...] | None:
        """Return the shape that the checkpoint has for `parameter`, a linear weight or one of `parameters`, or None."""
        module = self.modules.get(parameter.removesuffix(".weight"))
        if module is None:
            return self.parameters.get(parameter)
        sizes = (module.out_features, module.in_features)
        return sizes[::-1] if self.conv1d and module.name != HEAD else sizes
