"""Writes a safetensors file tensor by tensor.

The library's own writer takes all tensors at once; a shard of several GB would have to be in memory as a whole, beside
a server that needs the memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
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


def write_tensors(path: Path, plans: Sequence[TensorPlan], tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Write the planned tensors to `path` as they come, in any order; return the SHA-256 of the file in hex.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if the tensors that come are not those that were planned.
    """
    # Larger elements first, as the library does it, keeps every tensor aligned to its element size.
    ordered = sorted(plans, key=lambda plan: (-plan.dtype.itemsize, plan.name))
    header = _header(ordered)
    places, offset = {}, len(header)
    for plan in ordered:
        places[plan.name] = (plan, offset)
        offset += plan.nbytes
    with path.open("wb") as file:
        file.write(header)
        for name, tensor in tensors:
            if name not in places:
                raise ValueError(f"{name} was not planned, or comes twice")
            plan, offset = places.pop(name)
            if (tensor.dtype, tuple(tensor.shape)) != (plan.dtype, plan.shape):
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}, planned as {plan.dtype} {plan.shape}"
                )
            file.seek(offset)
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if places:
        raise ValueError(f"{len(places)} tensors were planned and did not come, {next(iter(places))} among them")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _header(plans: Sequence[TensorPlan]) -> bytes:
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
