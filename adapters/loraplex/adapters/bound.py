"""An adapter that is bound to a base model: what of the base each of its tensors changes, and how.

Nothing is folded or converted. Knows nothing about files, devices or batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from loraplex.adapters.traits import AdapterTraits


@dataclass(frozen=True)
class ModuleWeights:
    """The LoRA matrices of one module as stored: source dtype, CPU, nothing folded in.

    Semantics, with W and the bias of the base (or what takes their place, see `BoundAdapter`) and s the request's
    `adapter_scale`:
        y = W x + s * scaling * (B A x + lora_bias) + bias, or with a magnitude (DoRA, s = 1)
        y = magnitude / ||W + scaling * B A|| * (W x + scaling * B A x) + bias, the norm over the inputs of each output.

    Shapes: `a` (r, in_features), `b` (out_features, r), `magnitude` and `lora_bias` (out_features,).
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None
    lora_bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in (self.a, self.b, self.magnitude, self.lora_bias) if t is not None)


@dataclass(frozen=True)
class EmbeddingWeights:
    """LoRA on the input embedding: token t adds `s * scaling * B a[:, t]`; `a` (r, vocab), `b` (hidden, r).

    A model that multiplies its embeddings (Gemma) multiplies the sum.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    @property
    def nbytes(self) -> int:
        """Bytes of both matrices."""
        return self.a.nbytes + self.b.nbytes


@dataclass(frozen=True)
class TokenRows:
    """Rows that take the place of some of a matrix's: `tokens` (n,) int64, ascending, and `rows` (n, hidden)."""

    tokens: torch.Tensor
    rows: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the rows and their numbers."""
        return self.tokens.nbytes + self.rows.nbytes


@dataclass(frozen=True)
class BoundAdapter:
    """An adapter whose every tensor belongs to a module of one base model.

    What takes a weight's place is what LoRA on the same module is added to. A weight is named by `parameters` or by
    `token_rows`, never by both. Embedding and lm_head are named one by one, also where the base ties them: the one that
    is not named keeps the base's matrix.

    Attributes:
        modules: LoRA on linear modules, lm_head among them.
        embedding: LoRA on the input embedding.
        parameters: what takes the base's place whole, by Hugging Face parameter name: the embedding, linear weights,
            norms, biases, in the shape that the checkpoint has.
        token_rows: rows that take the base's place, by parameter name: of the embedding and of lm_head.weight.
        traits: how it is to be used.
        layout: the same object for adapters that differ in digest and numbers only, as far as that is known; not None
            for plain LoRA alone.
    """

    digest: str
    modules: Mapping[str, ModuleWeights]
    chat_template: str | None = None
    embedding: EmbeddingWeights | None = None
    parameters: Mapping[str, torch.Tensor] = field(default_factory=dict)
    token_rows: Mapping[str, TokenRows] = field(default_factory=dict)
    traits: AdapterTraits = field(default_factory=AdapterTraits)
    layout: object | None = field(default=None, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in their source dtypes; one that serves as two weights counts twice."""
        total = sum(weights.nbytes for weights in self.modules.values())
        total += sum(tensor.nbytes for tensor in self.parameters.values())
        total += sum(rows.nbytes for rows in self.token_rows.values())
        return total + (self.embedding.nbytes if self.embedding else 0)
