"""Gives what an adapter has beside LoRA on linear modules its place in a base model: embeddings, whole weights, rows.

What PEFT computes on a base whose lm_head is the embedding's matrix, and so what is bound here: LoRA on either of the
two, or training either whole (`modules_to_save`), leaves the other as it is, unless `ensure_weight_tying` is set; token
rows of the embedding are lm_head's too, unless the config lists others for lm_head; a weight of the base that was saved
along is written over the one matrix that both have.
"""

from __future__ import annotations

import torch

from loraplex.adapters.base_model import HEAD, HEAD_WEIGHT, BaseModel
from loraplex.adapters.bind_report import BindEntry
from loraplex.adapters.bound import EmbeddingWeights, ModuleWeights, TokenRows
from loraplex.adapters.formats import Adapter, SourceTensor
from loraplex.adapters.naming import Naming

_WEIGHT = ".weight"


class MatrixBinding:
    """What was bound beside the linear `modules`, to which lm_head is added if it follows from the embedding's LoRA."""

    def __init__(self, adapter: Adapter, base: BaseModel, naming: Naming, modules: dict[str, ModuleWeights]) -> None:
        self.entries: list[BindEntry] = []
        self.embedding: EmbeddingWeights | None = None
        self.parameters: dict[str, torch.Tensor] = {}
        self.token_rows: dict[str, TokenRows] = {}
        self._adapter = adapter
        self._base = base
        self._naming = naming
        self._modules = modules
        self._bind_embedding()
        self._bind_parameters()
        self._bind_token_rows()

    def _bind_embedding(self) -> None:
        for path, pair in self._adapter.embeddings.items():
            parameter = self._naming.to_base(path) + _WEIGHT
            rank, scaling = self._adapter.spec.rank_of(path), self._adapter.spec.scaling_of(path)
            wanted = self._base.shape_of(parameter) if parameter == self._base.embedding else None
            found = (pair.a.shape[1], pair.b.shape[0])
            problem = "" if wanted == found else self._misfit(parameter, found, wanted, "LoRA for the embedding")
            keys = (pair.a_key, pair.b_key)
            self.entries += [BindEntry(key, parameter if wanted else "", rank, scaling, problem) for key in keys]
            if not problem:
                self.embedding = EmbeddingWeights(pair.a, pair.b, scaling)
        if self.embedding is not None and self._base.tied and self._adapter.spec.ensure_weight_tying:
            self._tie_lora(self.embedding)

    def _tie_lora(self, embedding: EmbeddingWeights) -> None:
        """Give lm_head the embedding's matrices; PEFT saves them twice and has them once."""
        scaling = self._adapter.spec.scaling_of(self._naming.head)
        shared = ModuleWeights(embedding.b.t().contiguous(), embedding.a.t().contiguous(), scaling)
        own = self._modules.setdefault(HEAD, shared)
        if not (torch.equal(own.a, shared.a) and torch.equal(own.b, shared.b)):
            self._refuse(HEAD, "has other matrices than the embedding, though ensure_weight_tying is set")

    def _bind_parameters(self) -> None:
        matrices = {self._base.embedding, HEAD_WEIGHT}
        copies = {self._naming.to_base(path): source for path, source in self._adapter.base_copies.items()}
        trained = {self._naming.to_base(path): source for path, source in self._adapter.parameters.items()}
        for name, source in copies.items():
            if self._adapter.spec.invocation_tokens:
                reason = "is a weight of the base, which would act before the invocation tokens"
                self._refuse(source.key, f"{reason}; save the adapter with save_embedding_layers=False")
            elif name in matrices:
                self._place(name, source)
            elif name in trained:  # the module that it belongs to is not used
                self.entries.append(BindEntry(source.key, name))
            else:
                reason = "is a weight of the base, and neither modules_to_save nor bias says that it was trained"
                self.entries.append(BindEntry(source.key, name, problem=f"{reason}; save the adapter without it"))
        if self._base.tied:
            self._tie("were saved along with different values")
        replaced, self.parameters = self.parameters, {}
        for name, source in trained.items():
            self._place(name, source)
        if self._base.tied and self._adapter.spec.ensure_weight_tying:
            self._tie("were trained to different values, though ensure_weight_tying is set")
        self.parameters = {**replaced, **self.parameters}
        for name in trained:
            lora = self.embedding if name == self._base.embedding else self._modules.get(name.removesuffix(_WEIGHT))
            if lora is not None:
                self._refuse(trained[name].key, "was trained whole, but it has LoRA too, of which PEFT would use one")

    def _place(self, name: str, source: SourceTensor) -> None:
        found, wanted = tuple(source.value.shape), self._base.shape_of(name)
        problem = "" if found == wanted else self._misfit(name, found, wanted, "a trained weight")
        self.entries.append(BindEntry(source.key, name if wanted else "", problem=problem))
        if not problem:
            self.parameters[name] = source.value

    def _tie(self, difference: str) -> None:
        """Let embedding and lm_head have the one value that there is for either."""
        values = [self.parameters[name] for name in (self._base.embedding, HEAD_WEIGHT) if name in self.parameters]
        if len(values) == 2 and not torch.equal(values[0], values[1]):
            self._refuse(HEAD_WEIGHT, f"and the embedding are one matrix in the base, but they {difference}")
        elif values:
            self.parameters.update({self._base.embedding: values[0], HEAD_WEIGHT: values[0]})

    def _bind_token_rows(self) -> None:
        listed: dict[str, tuple[int, ...]] = {}
        for path, source in self._adapter.token_rows.items():
            name = self._naming.to_base(path) + _WEIGHT
            tokens = self._tokens_of(path)
            problem = self._rows_problem(name, source, tokens)
            self.entries.append(BindEntry(source.key, name, problem=problem))
            if not problem and tokens is not None:
                listed[name] = tokens
                order = sorted(range(len(tokens)), key=tokens.__getitem__)
                self.token_rows[name] = TokenRows(torch.tensor(sorted(tokens)), source.value[order])
        self._check_listed()
        if self._base.tied:
            self._tie_rows(listed)
        self._put_rows_in()

    def _put_rows_in(self) -> None:
        """Put token rows into weights of the base that were saved along, as PEFT does; one matrix stays one."""
        made: dict[tuple[int, int], torch.Tensor] = {}
        for name in self.parameters.keys() & self.token_rows.keys():
            rows, before = self.token_rows.pop(name), self.parameters[name]
            key = (id(before), id(rows))
            if key not in made:
                whole = before.to(torch.promote_types(before.dtype, rows.rows.dtype))
                made[key] = whole.index_copy(0, rows.tokens, rows.rows.to(whole.dtype))
            self.parameters[name] = made[key]

    def _tokens_of(self, path: str) -> tuple[int, ...] | None:
        """Return the tokens that the config lists for the module at `path`, or None if it lists none or several."""
        is_embedding = self._naming.to_base(path) + _WEIGHT == self._base.embedding
        indices = self._adapter.spec.token_indices
        lists = {tokens for key, tokens in indices.items() if (path.endswith(key) if key else is_embedding)}
        return next(iter(lists)) if len(lists) == 1 else None

    def _rows_problem(self, name: str, source: SourceTensor, tokens: tuple[int, ...] | None) -> str:
        shape = self._base.shape_of(name)
        if name not in (self._base.embedding, HEAD_WEIGHT) or shape is None:
            return "has token rows for a module that is neither the base's embedding nor its lm_head"
        if tokens is None:
            return "has token rows, but trainable_token_indices does not say for which tokens"
        wanted = (len(tokens), shape[1])
        if tuple(source.value.shape) != wanted:
            return self._misfit(name, tuple(source.value.shape), wanted, "the token rows")
        if max(tokens) >= shape[0]:
            return f"is for token {max(tokens)}, but the base has {shape[0]} tokens; use the base it was trained for"
        if name in {self._naming.to_base(path) for path in self._adapter.parameters}:
            return "has token rows for a module that was also trained whole, of which PEFT allows one"
        if name == self._base.embedding and self.embedding is not None:
            return "has token rows for the embedding beside LoRA, of which PEFT allows one"
        return ""

    def _check_listed(self) -> None:
        """Report lists of tokens in the config that have no rows; on a tied base lm_head's may be the embedding's."""
        rows = self._adapter.token_rows
        for key, tokens in self._adapter.spec.token_indices.items():
            tied = self._base.tied and HEAD.endswith(key) and tokens == self._tokens_of_embedding()
            found = any(path.endswith(key) for path in rows) if key else bool(rows)
            if not found and not tied:
                subject = f"trainable_token_indices {key}".strip()
                self._refuse(subject, "names trained tokens, but their rows are not in the file")

    def _tokens_of_embedding(self) -> tuple[int, ...] | None:
        return self._tokens_of(self._naming.to_source(self._base.embedding.removesuffix(_WEIGHT)))

    def _tie_rows(self, listed: dict[str, tuple[int, ...]]) -> None:
        """Let lm_head have the embedding's rows, unless it has rows for other tokens."""
        rows = self.token_rows.get(self._base.embedding)
        own = self.token_rows.get(HEAD_WEIGHT)
        if rows is None:
            return
        if own is None:
            if HEAD_WEIGHT in {self._naming.to_base(path) for path in self._adapter.parameters}:
                self._refuse(HEAD_WEIGHT, "was trained whole, but on a tied base the token rows go into it; PEFT fails")
            self.token_rows[HEAD_WEIGHT] = rows
        elif listed[HEAD_WEIGHT] == listed[self._base.embedding]:
            if not torch.equal(rows.rows, own.rows):
                self._refuse(
                    HEAD_WEIGHT, "has other rows than the embedding for the same tokens; in the base both are one"
                )
            self.token_rows[HEAD_WEIGHT] = rows
        elif self._adapter.spec.ensure_weight_tying:
            self._refuse(HEAD_WEIGHT, "has rows for other tokens than the embedding, though ensure_weight_tying is set")

    def _misfit(self, name: str, found: tuple[int, ...], wanted: tuple[int, ...] | None, what: str) -> str:
        if wanted is not None:
            return f"{what} has shape {found}, the base's {name} needs {wanted}; use the base it was trained for"
        return f"the base has no {name} whose place {what} could take"

    def _refuse(self, subject: str, problem: str) -> None:
        self.entries.append(BindEntry(subject, problem=problem))
