"""Writes a safetensors file tensor by tensor.

The library's own writer takes all tensors at once; a shard of several GB would have to be in memory as a whole, beside
a server that needs the memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

# The names of the format; the dtypes that a model's weights and buffers have.
DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, plans: list[TensorPlan], make: Callable[[TensorPlan], torch.Tensor]) -> str:
    """Write the planned tensors to `path`, asking `make` for one at a time; return the SHA-256 of the file in hex.

    Raises:
        OSError: if the file cannot be written.
    """
    # Larger elements first, as the library does it, keeps every tensor aligned to its element size.
    ordered = sorted(plans, key=lambda plan: (-plan.dtype.itemsize, plan.name))
    hasher = hashlib.sha256()
    with path.open("wb") as file:

        def write(data: bytes | memoryview) -> None:
            hasher.update(data)
            file.write(data)

        write(_header(ordered))
        for plan in ordered:
            tensor = make(plan).to(plan.dtype).contiguous()
            assert tuple(tensor.shape) == plan.shape
            write(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _header(plans: list[TensorPlan]) -> bytes:
    """Return the length of the JSON and the JSON, padded so that the values begin at a multiple of eight."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for plan in plans:
        end = offset + plan.nbytes
        entries[plan.name] = {"dtype": DTYPES[plan.dtype], "shape": list(plan.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
