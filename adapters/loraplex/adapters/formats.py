"""An adapter folder -> what its author saved, module by module, as PEFT's `save_pretrained` writes it.

Reads safetensors only: nothing is unpickled, nothing is executed, no file outside the folder is opened. Everything that
is wrong with the tensors is collected before it is reported. Knows nothing about base models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from loraplex.adapters.config_file import parse_config
from loraplex.adapters.digest import canonical_form, digest_of
from loraplex.adapters.errors import AdapterFormatError, FieldViolation
from loraplex.adapters.files import AdapterFiles
from loraplex.adapters.folder import WEIGHTS_FILE, require_weights
from loraplex.adapters.spec import AdapterSpec
from loraplex.adapters.tensor_names import Part, parse_name
from loraplex.adapters.traits import AdapterTraits
from loraplex.adapters.weights_file import read_tensors


@dataclass(frozen=True)
class SourceTensor:
    """A tensor in the source's dtype on the CPU, and its name in the file."""

    key: str
    value: torch.Tensor


@dataclass(frozen=True)
class LoraPair:
    """A and B of one module, in the source's dtypes on the CPU, and their keys.

    Linear modules: `a` (r, in_features), `b` (out_features, r), `magnitude` (DoRA) and `bias` (of B) (out_features,).
    Embeddings: `a` (r, vocab), `b` (hidden, r).
    """

    a: torch.Tensor
    b: torch.Tensor
    a_key: str
    b_key: str
    magnitude: SourceTensor | None = None
    bias: SourceTensor | None = None

    @property
    def vectors(self) -> tuple[SourceTensor, ...]:
        """What there is beside A and B."""
        return tuple(vector for vector in (self.magnitude, self.bias) if vector is not None)


@dataclass(frozen=True)
class Adapter:
    """An adapter as its author saved it; not yet bound to a base model.

    Attributes:
        pairs: LoRA on linear modules, by module path.
        embeddings: LoRA on embeddings, by module path.
        parameters: trained whole, by parameter path: `modules_to_save` and biases.
        base_copies: weights of the base that were saved along (`save_embedding_layers`), by parameter path.
        token_rows: trained rows (n, hidden), in the order of the spec's `token_indices`, by module path.
        repeated: tensors that are in the file a second time: their keys, and the parameter's path.
        canonical_form: what the digest is computed over, in pieces.
    """

    digest: str
    spec: AdapterSpec
    pairs: Mapping[str, LoraPair]
    chat_template: str | None = None
    embeddings: Mapping[str, LoraPair] = field(default_factory=dict)
    parameters: Mapping[str, SourceTensor] = field(default_factory=dict)
    base_copies: Mapping[str, SourceTensor] = field(default_factory=dict)
    token_rows: Mapping[str, SourceTensor] = field(default_factory=dict)
    repeated: Mapping[str, str] = field(default_factory=dict)
    canonical_form: tuple[bytes | torch.Tensor, ...] = field(default=(), repr=False, compare=False)

    @property
    def traits(self) -> AdapterTraits:
        """How the adapter is to be used."""
        return self.spec.traits

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(pair.a.shape[0] for pair in (*self.pairs.values(), *self.embeddings.values()))

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The last names of the modules with LoRA, sorted."""
        return tuple(sorted({path.rpartition(".")[2] for path in (*self.pairs, *self.embeddings)}))


def read_adapter(folder: Path) -> Adapter:
    """Read and check the adapter in `folder`.

    The tensors are copies: what happens to the files afterwards does not reach them.

    Raises:
        AdapterFormatError: with every problem found in the file that is wrong.
        OSError: if a file cannot be read.
    """
    return parse_adapter(AdapterFiles.read(folder), folder)


def parse_adapter(files: AdapterFiles, folder: Path) -> Adapter:
    """Check what was read from `folder`; the tensors are views of the files' content.

    Raises:
        AdapterFormatError: with every problem found in the file that is wrong.
        OSError: if a file cannot be read.
    """
    spec, config = parse_config(files.config)
    tensors = read_tensors(files.weights, require_weights(folder))
    parts = _Parts(spec)
    for key in sorted(tensors):
        parts.add(key, tensors[key])
    form = tuple(canonical_form(config, tensors, files.chat_template))
    adapter = replace(parts.adapter(digest_of(form), files.chat_template), canonical_form=form)
    if parts.violations:
        raise AdapterFormatError(f"{WEIGHTS_FILE} cannot be used", parts.violations)
    return adapter


class _Parts:
    """Collects what each tensor is to its module, and what is wrong."""

    def __init__(self, spec: AdapterSpec) -> None:
        self.violations: list[FieldViolation] = []
        self._spec = spec
        self._repeated: dict[str, str] = {}
        self._found: dict[Part, dict[str, SourceTensor]] = {part: {} for part in Part}

    def add(self, key: str, tensor: torch.Tensor) -> None:
        """Take in one tensor."""
        name = parse_name(key)
        if name is None:
            self._refuse(key, "is not a tensor that LoRA has, as far as is known here")
            return
        part = self._undeclared(name.path) if name.part is Part.PARAMETER else name.part
        known = self._found[part].setdefault(name.path, SourceTensor(key, tensor))
        if known.key == key:
            return
        # PEFT can write a module trained whole twice; that does no harm as long as both are the same.
        if part is Part.PARAMETER and torch.equal(known.value, tensor):
            self._repeated[key] = name.path
        else:
            self._refuse(key, f"is the same tensor as {known.key}")

    def adapter(self, digest: str, template: str | None) -> Adapter:
        """Return the adapter that the tensors make up."""
        pairs = self._pairs(Part.A, Part.B)
        embeddings = self._pairs(Part.EMBEDDING_A, Part.EMBEDDING_B)
        if not pairs and not embeddings and not self.violations:
            self._refuse(WEIGHTS_FILE, "holds no LoRA matrices")
        self._check_vectors(pairs)
        for path, parameter in self._found[Part.PARAMETER].items():
            self._check_declared(path, parameter)
        return Adapter(
            digest,
            self._spec,
            pairs,
            template,
            embeddings,
            self._found[Part.PARAMETER],
            self._found[Part.BASE_COPY],
            self._found[Part.TOKEN_ROWS],
            self._repeated,
        )

    def _undeclared(self, path: str) -> Part:
        """Tell a weight that was trained from one that save_embedding_layers added: it has the same name."""
        declared = path.endswith(".bias") or self._spec.saves(path)
        return Part.PARAMETER if declared else Part.BASE_COPY

    def _pairs(self, side_a: Part, side_b: Part) -> dict[str, LoraPair]:
        """Match A and B of each module; one that lacks its other half is a violation."""
        a_sides, b_sides = self._found[side_a], self._found[side_b]
        for sides, others, missing in ((a_sides, b_sides, side_b), (b_sides, a_sides, side_a)):
            for path in sides.keys() - others.keys():
                self._refuse(sides[path].key, f"has no matching {missing.value}")
        linear = side_a is Part.A
        pairs = {
            path: LoraPair(
                a_sides[path].value,
                b_sides[path].value,
                a_sides[path].key,
                b_sides[path].key,
                self._found[Part.MAGNITUDE].get(path),
                self._found[Part.LORA_BIAS].get(path) if linear else None,
            )
            for path in sorted(a_sides.keys() & b_sides.keys())
        }
        for path, pair in pairs.items():
            self._check_rank(path, pair)
            if not linear and pair.magnitude is not None:
                reason = "is a DoRA magnitude on an embedding, which is not supported; train DoRA on linear modules"
                self._refuse(pair.magnitude.key, reason)
        return pairs

    def _check_rank(self, path: str, pair: LoraPair) -> None:
        rank = self._spec.rank_of(path)
        for key, tensor, axis in ((pair.a_key, pair.a, 0), (pair.b_key, pair.b, 1)):
            if tensor.dim() != 2:
                self._refuse(key, f"has shape {tuple(tensor.shape)}, not two dimensions")
            elif tensor.shape[axis] != rank:
                described = f"has rank {tensor.shape[axis]} (shape {tuple(tensor.shape)})"
                self._refuse(key, f"{described}, but adapter_config.json gives the module rank {rank}")

    def _check_vectors(self, pairs: Mapping[str, LoraPair]) -> None:
        """Check that every module has the vectors that the config declares, and no module others."""
        declared = (
            (Part.MAGNITUDE, "use_dora", self._spec.use_dora),
            (Part.LORA_BIAS, "lora_bias", self._spec.lora_bias),
        )
        for part, flag, wanted in declared:
            vectors = self._found[part]
            for path, pair in pairs.items():
                if wanted and path not in vectors:
                    self._refuse(pair.b_key, f"has no {part.value} beside it, though {flag} is set")
            for path, vector in vectors.items():
                if path in self._found[Part.EMBEDDING_A]:
                    continue
                if path not in pairs:
                    self._refuse(vector.key, "has no LoRA matrices beside it")
                elif not wanted:
                    self._refuse(vector.key, f"is there though {flag} is not set, so that PEFT would leave it out")
                elif tuple(vector.value.shape) != pairs[path].b.shape[:1]:
                    rows = pairs[path].b.shape[0]
                    self._refuse(vector.key, f"has shape {tuple(vector.value.shape)}, but B has {rows} rows")

    def _check_declared(self, path: str, parameter: SourceTensor) -> None:
        spec = self._spec
        if spec.bias == "none" and not spec.saves(path):
            self._refuse(parameter.key, "is a bias, but neither bias nor modules_to_save says that it was trained")
        module = path.rpartition(".")[0]
        if spec.bias == "lora_only" and not spec.saves(path) and module not in self._found[Part.A]:
            self._refuse(parameter.key, "is the bias of a module without LoRA, though bias is 'lora_only'")

    def _refuse(self, key: str, reason: str) -> None:
        self.violations.append(FieldViolation(key, reason))
