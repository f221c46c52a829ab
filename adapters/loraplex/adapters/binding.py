"""Does this adapter fit this base model? The binding and the report that says why not.

Knows the base model only as a list of named linear modules with their sizes; knows nothing about how the base is
quantized, packed or run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from loraplex.adapters.errors import FieldViolation, PreconditionError
from loraplex.adapters.formats import Adapter, LoraPair
from loraplex.adapters.traits import AdapterTraits


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


@dataclass(frozen=True)
class ModuleWeights:
    """The LoRA matrices of one module as stored: source dtype, CPU, nothing folded in.

    Semantics, with W and the bias of the base and s the request's `adapter_scale`:
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


@dataclass(frozen=True)
class EmbeddingWeights:
    """LoRA on the input embedding: token t adds `s * scaling * B a[:, t]`; `a` (r, vocab), `b` (hidden, r)."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


@dataclass(frozen=True)
class TokenRows:
    """Rows that take the place of some of a matrix's: `tokens` (n,) int64, ascending, and `rows` (n, hidden)."""

    tokens: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True)
class BoundAdapter:
    """An adapter whose every tensor belongs to a module of one base model.

    Attributes:
        modules: LoRA on linear modules, lm_head among them.
        embedding: LoRA on the input embedding.
        parameters: what takes the base's place whole, by Hugging Face parameter name: fully trained linear weights
            (lm_head.weight), the embedding, norms, biases. A tied partner that changes with one is named too.
        token_rows: rows that take the base's place, by parameter name: of the embedding, and of lm_head if it is tied.
        traits: how it is to be used.
    """

    digest: str
    modules: Mapping[str, ModuleWeights]
    chat_template: str | None = None
    embedding: EmbeddingWeights | None = None
    parameters: Mapping[str, torch.Tensor] = field(default_factory=dict)
    token_rows: Mapping[str, TokenRows] = field(default_factory=dict)
    traits: AdapterTraits = field(default_factory=AdapterTraits)

    @property
    def nbytes(self) -> int:
        """Bytes of all A and B in their source dtypes."""
        return sum(w.a.nbytes + w.b.nbytes for w in self.modules.values())


@dataclass(frozen=True)
class BindEntry:
    """One finding on one tensor or target; `problem` is empty when it is in order, else what is wrong and what to do.

    `module` is the base's module, or empty if it has none; `rank` and `scaling` are 0 where they have no meaning.
    """

    subject: str
    module: str = ""
    rank: int = 0
    scaling: float = 0.0
    problem: str = ""


@dataclass(frozen=True)
class BindReport:
    """Where each tensor of an adapter goes in one base model."""

    base_fingerprint: str
    entries: tuple[BindEntry, ...] = field(default=())
    report_id: str = ""

    @property
    def problems(self) -> tuple[BindEntry, ...]:
        """The entries that keep the adapter from being used."""
        return tuple(entry for entry in self.entries if entry.problem)


class BindError(PreconditionError):
    """An adapter that does not fit the base; `report` holds every finding, `violations` the problems among them."""

    def __init__(self, report: BindReport, base: str) -> None:
        """Name the `base` and the first three problems in the message."""
        self.report = report
        self._base = base
        problems = report.problems
        shown = [f"{entry.subject}: {entry.problem}" for entry in problems[:3]]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        super().__init__(
            f"the adapter does not fit the base model {base}: {'; '.join(shown)}",
            [FieldViolation(entry.subject, entry.problem) for entry in problems],
            report.report_id,
        )

    def __reduce__(self) -> tuple[type[BindError], tuple[BindReport, str]]:
        """Say how to make it again, so that it can come from another process."""
        return type(self), (self.report, self._base)


def bind(adapter: Adapter, base: BaseModel) -> BoundAdapter:
    """Give every tensor of `adapter` its module in `base`.

    What counts is that names and shapes fit; the base that the adapter was trained on may have another name.

    Raises:
        BindError: if any tensor or any declared target has no place.
    """
    report = bind_report(adapter, base)
    if report.problems:
        raise BindError(report, f"{base.name} ({base.architecture})")
    modules = {
        name: ModuleWeights(pair.a, pair.b, adapter.spec.scaling_of(name))
        for name, pair in sorted(adapter.pairs.items())
    }
    return BoundAdapter(adapter.digest, modules, adapter.chat_template)


def bind_report(adapter: Adapter, base: BaseModel) -> BindReport:
    """Say for each tensor and each unmatched target of `adapter` where it goes in `base`, or why it cannot."""
    entries: list[BindEntry] = []
    for name, pair in sorted(adapter.pairs.items()):
        entries += _entries(adapter, name, pair, base)
    for target in adapter.spec.unmatched_targets(adapter.pairs, base.modules):
        problem = "is named in target_modules, but no tensor belongs to it; train it or take it out of the list"
        entries.append(BindEntry(target, problem=problem))
    return BindReport(base.fingerprint, tuple(entries))


def _entries(adapter: Adapter, name: str, pair: LoraPair, base: BaseModel) -> list[BindEntry]:
    rank, scaling = adapter.spec.rank_of(name), adapter.spec.scaling_of(name)
    module = base.modules.get(name)
    if module is None:
        problem = _no_module(name, base, adapter.spec.base_model)
        return [BindEntry(key, "", rank, scaling, problem) for key in (pair.a_key, pair.b_key)]
    sides = (
        (pair.a_key, pair.a.shape[1], module.in_features, "inputs"),
        (pair.b_key, pair.b.shape[0], module.out_features, "outputs"),
    )
    trained_on = f" (it was trained on {adapter.spec.base_model})" if adapter.spec.base_model else ""
    return [
        BindEntry(
            key,
            name,
            rank,
            scaling,
            ""
            if found == wanted
            else f"has {found} {kind}, the base's module has {wanted}; use the base it was trained for{trained_on}",
        )
        for key, found, wanted, kind in sides
    ]


def _no_module(name: str, base: BaseModel, trained_on: str) -> str:
    kind = name.rpartition(".")[2]
    alike = next((module for module in base.modules if module.rpartition(".")[2] == kind), None)
    hint = f" (its {kind} modules have names like {alike})" if alike else ""
    trained = f"; the adapter was trained on {trained_on}" if trained_on else ""
    return f"the base has no linear module {name}{hint}{trained}"
