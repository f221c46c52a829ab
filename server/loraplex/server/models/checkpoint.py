"""The safetensors files of a Hugging Face folder: which tensors there are, and reading them file by file.

Only safetensors: nothing is unpickled. Knows nothing about what the tensors mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loraplex.server.errors import ModelLoadError
from loraplex.server.models.config_reader import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of one tensor; `dtype` as safetensors names it, e.g. "BF16"."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a model by name, from headers alone."""

    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the headers of the folder's weights.

        Raises:
            ModelLoadError: if there are none, a file of the index is missing, or a file is damaged.
        """
        index = folder / INDEX
        listed = _read_index(index) if index.is_file() else None
        files = tuple(sorted(set(listed.values()))) if listed is not None else (folder / SINGLE,)
        missing = [path.name for path in files if not path.is_file()]
        if missing and listed is not None:
            raise ModelLoadError(f"{index} names files that are missing: {', '.join(missing[:5])}")
        if missing:
            raise ModelLoadError(_why_no_weights(folder))
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            tensors.update(_read_header(file))
        absent = sorted(set(listed or ()) - set(tensors))
        if absent:
            raise ModelLoadError(f"{index} names tensors that no file holds: {', '.join(absent[:5])}")
        return cls(tensors, files)

    def read(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor with its name, file by file.

        The tensors are views of the mapped file: they cost memory while they are used, and keep the whole mapping alive
        as long as one of them lives.

        Raises:
            ModelLoadError: if a file changed and can no longer be read.
        """
        for file in self.files:
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping: it cannot be iterated)
                    yield name, tensors.get_tensor(name)


def _read_index(path: Path) -> dict[str, Path]:
    """Return the file of every tensor that a sharded checkpoint's index names."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ModelLoadError(f"{path} has no weight_map from tensor names to file names")
    if any(Path(file).name != file for file in weight_map.values()):
        raise ModelLoadError(f"{path} names files outside its folder")
    return {name: path.parent / file for name, file in weight_map.items()}


def _read_header(file: Path) -> dict[str, TensorInfo]:
    found = {}
    with _opened(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118
            entry = tensors.get_slice(name)
            found[name] = TensorInfo(file, entry.get_dtype(), tuple(entry.get_shape()))
    return found


class _opened:
    """Opens a safetensors file, its errors as ours."""

    def __init__(self, file: Path) -> None:
        try:
            self._handle: Any = safe_open(str(file), framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{file} is damaged or incomplete: {error}") from error

    def __enter__(self) -> Any:
        return self._handle.__enter__()

    def __exit__(self, *error: object) -> None:
        self._handle.__exit__(*error)


def _why_no_weights(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return f"{folder} holds an adapter, not a base model: serve its base and register it as an adapter"
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} holds only pickled weights ({', '.join(pickles[:3])}), which are never read: load the model "
            "once with transformers where you trust it; its save_pretrained() writes safetensors"
        )
    return f"{folder} holds no weights: neither {SINGLE} nor {INDEX}"
