"""A base model's Hugging Face folder as files: which tensors it has, where they lie, and which are linear modules.

Reads headers at once and tensors one at a time; never builds the model. Tensor names are the full module paths of the
causal language model (`transformer.h.0...`, `model.layers.0...`), also where the checkpoint leaves the prefix out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loraplex.adapters.binding import BaseModel, BaseModule
from loraplex.adapters.errors import PreconditionError
from loraplex.adapters.tensor_file import DTYPES

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HEAD = "lm_head.weight"
_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
_BLOCK_WEIGHT = re.compile(r"(?P<module>.+\.(?:layers|h)\.\d+\..+)\.weight")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what the file's header says of it."""

    file: str
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelFolder:
    """The config and the tensors of the model in `path`, by full name; `files` are those that hold tensors."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    files: tuple[str, ...]

    @classmethod
    def open(cls, path: Path) -> ModelFolder:
        """Read the config and the headers of the model in `path`.

        Raises:
            PreconditionError: it is not a folder with config and safetensors, is already quantized, or a file is
                missing or damaged.
        """
        config = _read_json(path / "config.json")
        if config.get("quantization_config"):
            raise PreconditionError(f"{path} is already quantized; merge into the model that it was made from")
        files = _weight_files(path)
        found: dict[str, StoredTensor] = {}
        for file in files:
            found.update(_read_header(path / file))
        prefix = "transformer." if config.get("model_type") == "gpt2" else "model."
        if not any(name.startswith(prefix) for name in found):
            found = {name if name == HEAD else prefix + name: tensor for name, tensor in found.items()}
        return cls(path, config, found, files)

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
        return HEAD if HEAD in self.tensors else self.embedding

    def block_modules(self) -> frozenset[str]:
        """Return the linear modules of the decoder's blocks, which are what a server quantizes."""
        matches = ((_BLOCK_WEIGHT.fullmatch(name), tensor) for name, tensor in self.tensors.items())
        return frozenset(match["module"] for match, tensor in matches if match and len(tensor.shape) == 2)

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
            tied=self.head_source == self.embedding,
        )

    def _parameters(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what is no linear weight; not of the masks and frequencies in old checkpoints."""
        linear = {HEAD, *(f"{name}.weight" for name in self.block_modules())}
        return {
            name: tensor.shape
            for name, tensor in self.tensors.items()
            if name not in linear and name.endswith((".weight", ".bias")) and len(tensor.shape) in (1, 2)
        }

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor `name` as stored; a view of the mapped file.

        Raises:
            PreconditionError: if the file cannot be read (any more).
        """
        stored = self.tensors[name]
        try:
            with safe_open(str(self.path / stored.file), framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(stored.key)
        except (SafetensorError, OSError) as error:
            raise PreconditionError(f"{self.path / stored.file} cannot be read: {error}") from error
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
