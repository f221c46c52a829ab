"""A base model's Hugging Face folder as files: which tensors it has, where they lie, and which are linear modules.

Reads headers at once and tensors one at a time; never builds the model. Tensor names are the full module paths of the
causal language model (`transformer.h.0...`, `model.layers.0...`), also where the checkpoint leaves the prefix out.
A weight that bitsandbytes quantized counts as one tensor, float32, with the values that it stands for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loraplex.adapters import stored_quantized
from loraplex.adapters.base_model import HEAD_WEIGHT
from loraplex.adapters.binding import BaseModel, BaseModule
from loraplex.adapters.errors import PreconditionError
from loraplex.adapters.tensor_file import DTYPES

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_TIED_BY_DEFAULT = ("gemma", "gemma2", "gpt2")
_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
_BLOCK_WEIGHT = re.compile(r"(?P<module>.+\.(?:layers|h)\.\d+\..+)\.weight")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what the file's header says of it.

    `parts` is empty for an ordinary tensor; for a quantized weight, whose dtype is float32 here, it holds what is
    stored of it, by name within the module.
    """

    file: str
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Mapping[str, StoredTensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelFolder:
    """The config and the tensors of the model in `path`, by full name; `files` are those that hold tensors.

    `quantization` is "nf4", "fp4" or "int8" if the checkpoint has quantized weights, else None.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    files: tuple[str, ...]
    quantization: str | None = None

    @classmethod
    def open(cls, path: Path) -> ModelFolder:
        """Read the config and the headers of the model in `path`.

        Raises:
            PreconditionError: it is not a folder with config and safetensors, it is quantized by something else than
                bitsandbytes, or a file is missing or damaged.
        """
        config = _read_json(path / "config.json")
        quantization = _quantization(path, config)
        files = _weight_files(path)
        found: dict[str, StoredTensor] = {}
        for file in files:
            found.update(_read_header(path / file))
        prefix = "transformer." if config.get("model_type") == "gpt2" else "model."
        if not any(name.startswith(prefix) for name in found):
            found = {name if name == HEAD_WEIGHT else prefix + name: tensor for name, tensor in found.items()}
        if quantization:
            found = _join_quantized(path, found, conv1d=config.get("model_type") == "gpt2")
        model = cls(path, config, found, files, quantization)
        if model._stores_one_matrix_twice():
            del found[HEAD_WEIGHT]
        return model

    @property
    def conv1d(self) -> bool:
        """Whether the blocks' weights are stored as (in, out)."""
        return self.config.get("model_type") == "gpt2"

    @property
    def embedding(self) -> str:
        """The name of the input embedding's weight."""
        return "transformer.wte.weight" if self.conv1d else "model.embed_tokens.weight"

    @property
    def head_source(self) -> str:
        """The name of the stored tensor that lm_head multiplies with: its own, or the embedding's if they are tied."""
        return HEAD_WEIGHT if HEAD_WEIGHT in self.tensors else self.embedding

    @property
    def tied(self) -> bool:
        """Whether lm_head and the embedding are one matrix."""
        return HEAD_WEIGHT not in self.tensors or self.embedding not in self.tensors

    def _stores_one_matrix_twice(self) -> bool:
        """Whether lm_head is there beside the embedding that it is; where the two differ, they are not tied."""
        tied = self.config.get("tie_word_embeddings", self.config.get("model_type") in _TIED_BY_DEFAULT)
        stored = {HEAD_WEIGHT, self.embedding} <= self.tensors.keys()
        return bool(tied) and stored and torch.equal(self.read(HEAD_WEIGHT), self.read(self.embedding))

    def block_modules(self) -> frozenset[str]:
        """Return the linear modules of the decoder's blocks, which are what a server quantizes."""
        matches = ((_BLOCK_WEIGHT.fullmatch(name), tensor) for name, tensor in self.tensors.items())
        return frozenset(match["module"] for match, tensor in matches if match and len(tensor.shape) == 2)

    def is_transposed(self, name: str) -> bool:
        """Whether the linear weight or embedding `name` is (in, out) here."""
        return self.conv1d and name.removesuffix(".weight") in self.block_modules()

    def base_model(self) -> BaseModel:
        """Return what an adapter needs to know of the model; the fingerprint is left empty."""
        modules = {}
        for name in sorted(self.block_modules()):
            rows, columns = self.tensors[f"{name}.weight"].shape
            modules[name] = BaseModule(name, rows, columns) if self.conv1d else BaseModule(name, columns, rows)
        if self.head_source in self.tensors:
            vocabulary, hidden = self.tensors[self.head_source].shape
            modules["lm_head"] = BaseModule("lm_head", hidden, vocabulary)
        architectures = self.config.get("architectures") or ["an unknown architecture"]
        return BaseModel(
            name=self.path.name,
            architecture=str(architectures[0]),
            fingerprint="",
            modules=modules,
            conv1d=self.conv1d,
            parameters=self._parameters(),
            embedding=self.embedding,
            tied=self.tied,
        )

    def _parameters(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what is no linear weight; not of the masks and frequencies in old checkpoints."""
        linear = {HEAD_WEIGHT, *(f"{name}.weight" for name in self.block_modules())}
        tensors = (
            {self.embedding: self.tensors[HEAD_WEIGHT], **self.tensors} if HEAD_WEIGHT in self.tensors else self.tensors
        )
        return {
            name: tensor.shape
            for name, tensor in tensors.items()
            if name not in linear and name.endswith((".weight", ".bias")) and len(tensor.shape) in (1, 2)
        }

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor `name`: a view of the mapped file, or a quantized weight's values.

        Raises:
            PreconditionError: if the file cannot be read (any more), or holds no quantized weight where it should.
        """
        stored = self.tensors[name]
        if not stored.parts:
            return _read(self.path, stored)
        parts = {part: _read(self.path, tensor) for part, tensor in stored.parts.items()}
        try:
            weight = stored_quantized.restore(parts)
        except PreconditionError as error:
            raise PreconditionError(f"{name} in {self.path}: {error}") from error
        return weight.t() if self.is_transposed(name) else weight


def _quantization(path: Path, config: Mapping[str, Any]) -> str | None:
    stored = config.get("quantization_config")
    if not stored:
        return None
    if isinstance(stored, dict) and stored.get("load_in_4bit"):
        return str(stored.get("bnb_4bit_quant_type") or "fp4")
    if isinstance(stored, dict) and stored.get("load_in_8bit"):
        return "int8"
    raise PreconditionError(f"{path} is not quantized by bitsandbytes; merge into the model that it was made from")


def _join_quantized(path: Path, found: Mapping[str, StoredTensor], *, conv1d: bool) -> dict[str, StoredTensor]:
    """Return the tensors with the parts of each quantized weight as one.

    Quantized, a Conv1D has become a Linear; its shape is turned back to (in, out).
    """
    joined = dict(found)
    for name in found:
        module, _, part = name.partition(f".{stored_quantized.STATE_PREFIX}")
        if name.endswith(f".{stored_quantized.INT8_SCALES}"):
            module, part = name.removesuffix(f".{stored_quantized.INT8_SCALES}"), "int8"
        if not part:
            continue
        prefix = f"{module}."
        names = [other for other in found if other.startswith(prefix) and other != f"{module}.bias"]
        parts = {other.removeprefix(prefix): joined.pop(other) for other in names}
        weight = parts.get("weight")
        if weight is None:
            raise PreconditionError(f"{path} holds the scales of {module}, but not its weight")
        shape = weight.shape
        if part != "int8":
            try:
                shape = stored_quantized.read_shape(_read(path, found[name]))
            except ValueError as error:
                raise PreconditionError(f"{name} in {path} is damaged: {error}") from error
        shape = shape[::-1] if conv1d else shape
        joined[f"{module}.weight"] = StoredTensor(weight.file, weight.key, torch.float32, shape, parts)
    return joined


def _read(path: Path, stored: StoredTensor) -> torch.Tensor:
    try:
        with safe_open(str(path / stored.file), framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(stored.key)
    except (SafetensorError, OSError) as error:
        raise PreconditionError(f"{path / stored.file} cannot be read: {error}") from error
    return tensor


def _weight_files(path: Path) -> tuple[str, ...]:
    if (path / INDEX_FILE).is_file():
        weight_map = _read_json(path / INDEX_FILE).get("weight_map")
        names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise PreconditionError(f"{path / INDEX_FILE} does not name the files of the model")
        return tuple(sorted(names))
    if not (path / SINGLE_FILE).is_file():
        raise PreconditionError(f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors can be merged")
    return (SINGLE_FILE,)


def _read_header(path: Path) -> dict[str, StoredTensor]:
    found = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                entry = file.get_slice(key)
                dtype = _DTYPES.get(entry.get_dtype())
                if dtype is None:
                    raise PreconditionError(f"{key} in {path} is {entry.get_dtype()}, which is not supported")
                found[key] = StoredTensor(path.name, key, dtype, tuple(entry.get_shape()))
    except (SafetensorError, OSError) as error:
        raise PreconditionError(f"{path} is missing, damaged or incomplete: {error}") from error
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PreconditionError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise PreconditionError(f"{path} is not a JSON object")
    return content
