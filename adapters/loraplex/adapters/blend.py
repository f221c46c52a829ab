"""One adapter or several with weights, and what they change in which parameter of a base model.

Whatever a `BoundAdapter` can hold is either folded in exactly or refused by name. Knows the base model by names and
shapes; the weights come from elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from loraplex.adapters.binding import BaseModel, BoundAdapter, ModuleWeights, TokenRows
from loraplex.adapters.errors import FieldViolation, InvalidRequestError, PreconditionError
from loraplex.adapters.merge_methods import Mixing, mix


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter and what multiplies its own scaling."""

    adapter: BoundAdapter
    weight: float = 1.0


@dataclass(frozen=True)
class Update:
    """A low-rank update of one matrix: weight * (scaling * B A), transposed for an embedding.

    Shapes: `a` (r, in), `b` (out, r).
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    weight: float
    transposed: bool = False

    def matrix(self) -> torch.Tensor:
        """Return scaling * B A without the weight: (out, in) float32, or (in, out) if transposed."""
        product = (self.b.float() @ self.a.float()) * self.scaling
        return product.t() if self.transposed else product


@dataclass
class Change:
    """What becomes of one parameter, in this order.

    Attributes:
        replacement: takes its place, in the layout of the base's file.
        rows: take the place of some of its rows.
        updates: are mixed and added.
        magnitude: (out,); gives each row its length (DoRA).
        vectors: are added, each with its factor (biases).
    """

    replacement: torch.Tensor | None = None
    rows: TokenRows | None = None
    updates: list[Update] = field(default_factory=list)
    magnitude: torch.Tensor | None = None
    vectors: list[tuple[float, torch.Tensor]] = field(default_factory=list)

    def apply(self, name: str, weight: torch.Tensor, mixing: Mixing) -> torch.Tensor:
        """Return the parameter `name` as it is afterwards, from `weight`: (out, in) or a vector, float32.

        `weight` is the replacement already if there is one.
        """
        if self.rows is not None:
            weight = weight.index_copy(0, self.rows.tokens, self.rows.rows.float())
        if self.updates:
            matrices = (update.matrix() for update in self.updates)
            weight = weight + mix(mixing, name, matrices, [update.weight for update in self.updates])
        if self.magnitude is not None:
            # DoRA (Liu et al., 2024): the norm is of the updated weight, as in PEFT's merge.
            weight = weight * (self.magnitude.float() / torch.linalg.norm(weight, dim=1)).unsqueeze(1)
        for factor, vector in self.vectors:
            weight = weight + factor * vector.float()
        return weight

    def same_as(self, other: Change | None) -> bool:
        """Whether both do the same to equal weights, as far as that shows without computing it."""
        if other is None or self.updates or other.updates or self.vectors or other.vectors:
            return False
        mine, theirs = self.rows, other.rows
        rows = (mine is None) == (theirs is None) and (
            mine is None
            or theirs is None
            or (torch.equal(mine.tokens, theirs.tokens) and torch.equal(mine.rows, theirs.rows))
        )
        before, after = self.replacement, other.replacement
        return (
            rows
            and (before is None) == (after is None)
            and (before is None or after is None or torch.equal(before, after))
        )


@dataclass(frozen=True)
class Blend:
    """What is merged: at least one adapter, and how several become one."""

    parts: tuple[WeightedAdapter, ...]
    mixing: Mixing = field(default_factory=Mixing)

    @property
    def digests(self) -> tuple[str, ...]:
        """The versions that take part."""
        return tuple(part.adapter.digest for part in self.parts)

    def check(self, base: BaseModel, where: str) -> None:
        """Check that everything in the adapters can be folded into `base`, which lies at `where`.

        Raises:
            InvalidRequestError: a DoRA adapter has another weight than 1.
            PreconditionError: an adapter does not fit, or has what cannot be merged; every such thing is named.
        """
        violations = [
            FieldViolation("scale", "must be 1: a DoRA adapter holds for its own scaling only")
            for part in self.parts
            if part.weight != 1 and (part.adapter.traits.fixed_scale or _magnitudes(part.adapter))
        ]
        if violations:
            raise InvalidRequestError(violations)
        problems = [
            FieldViolation(subject, reason)
            for part in self.parts
            for subject, reason in (
                *_misfits(part.adapter, base, where),
                *_unmergeable(part.adapter, base, alone=len(self.parts) == 1),
            )
        ]
        if problems:
            shown = [f"{problem.field} {problem.description}" for problem in problems[:3]]
            more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise PreconditionError(f"the adapter cannot be merged: {'; '.join(shown)}{more}", problems)

    def changes(self, base: BaseModel) -> dict[str, Change]:
        """Return what becomes of which parameter, by Hugging Face parameter name."""
        changes: dict[str, Change] = {}
        for part in self.parts:
            adapter = part.adapter
            for name, tensor in adapter.parameters.items():
                changes.setdefault(name, Change()).replacement = tensor
            for module, weights in adapter.modules.items():
                change = changes.setdefault(f"{module}.weight", Change())
                change.updates.append(Update(weights.a, weights.b, weights.scaling, part.weight))
                change.magnitude = weights.magnitude
                if weights.lora_bias is not None:
                    bias = changes.setdefault(f"{module}.bias", Change())
                    bias.vectors.append((part.weight * weights.scaling, weights.lora_bias))
            if adapter.embedding is not None:
                low = adapter.embedding
                change = changes.setdefault(base.embedding, Change())
                change.updates.append(Update(low.a, low.b, low.scaling, part.weight, transposed=True))
            for name, rows in adapter.token_rows.items():
                changes.setdefault(name, Change()).rows = rows
        return changes


def _magnitudes(adapter: BoundAdapter) -> list[str]:
    return [name for name, weights in adapter.modules.items() if weights.magnitude is not None]


def _unmergeable(adapter: BoundAdapter, base: BaseModel, *, alone: bool) -> Iterator[tuple[str, str]]:
    """Yield what cannot be folded in, with the reason."""
    if adapter.traits.invocation_tokens or adapter.traits.kind == "alora":
        yield (
            adapter.digest,
            "is an aLoRA, which acts only after its invocation; merged weights act always",
        )
    for name, weights in adapter.modules.items():
        if weights.lora_bias is not None and f"{name}.bias" not in base.parameters:
            yield name, "has a lora_bias, and the base's module has no bias that could take it up"
    if alone:
        return
    for name in _magnitudes(adapter):
        yield name, "has a DoRA magnitude, which replaces the weight's own and cannot be added to another adapter's"
    for name in (*adapter.parameters, *adapter.token_rows):
        yield name, "is trained as a whole and takes the base's place, so it has no weight; merge that adapter alone"


def _misfits(adapter: BoundAdapter, base: BaseModel, where: str) -> Iterator[tuple[str, str]]:
    """Yield what has no place in `base`: the adapter may have been bound to another model."""
    for name, weights in adapter.modules.items():
        module = base.modules.get(name)
        if module is None:
            yield name, f"is no linear module of {where}; it is not the adapter's base model"
        elif (problem := _wrong_sizes(weights, module.in_features, module.out_features)) is not None:
            yield name, f"{problem} in {where}; it is not the adapter's base model"
    shapes = _shapes(base)
    for name, tensor in adapter.parameters.items():
        if shapes.get(name) != tuple(tensor.shape):
            yield name, f"has shape {tuple(tensor.shape)} in the adapter and {shapes.get(name, 'no place')} in {where}"
    for name, rows in adapter.token_rows.items():
        vocabulary, hidden = shapes.get(name, (0, 0))
        if rows.rows.shape[1:] != (hidden,) or (len(rows.tokens) and int(rows.tokens.max()) >= vocabulary):
            yield name, f"has token rows that do not fit its shape {(vocabulary, hidden)} in {where}"
    if adapter.embedding is not None:
        found = (adapter.embedding.a.shape[1], adapter.embedding.b.shape[0])
        if found != shapes.get(base.embedding):
            yield base.embedding, f"is {shapes.get(base.embedding)} in {where} and {found} in the adapter"


def _shapes(base: BaseModel) -> Mapping[str, tuple[int, ...]]:
    linear = {
        f"{name}.weight": (m.in_features, m.out_features)
        if base.conv1d and name != "lm_head"
        else (m.out_features, m.in_features)
        for name, m in base.modules.items()
    }
    return {**linear, **base.parameters}


def _wrong_sizes(weights: ModuleWeights, inputs: int, outputs: int) -> str | None:
    found = (weights.a.shape[1], weights.b.shape[0])
    if found == (inputs, outputs):
        return None
    return f"has {found[0]} inputs and {found[1]} outputs in the adapter, {inputs} inputs and {outputs} outputs"
