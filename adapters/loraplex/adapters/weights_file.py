"""The tensors of an adapter's safetensors file, read with care: the file comes from anybody.

Knows nothing about what the tensors mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loraplex.adapters.digest import DTYPE_NAMES
from loraplex.adapters.errors import AdapterFormatError, FieldViolation
from loraplex.adapters.folder import WEIGHTS_FILE

# The header of an adapter is some kilobytes of JSON; safetensors itself would parse up to 100 MB of it.
MAX_HEADER_BYTES = 16 << 20
# The largest adapters have some 5,000; each is looked at by name several times.
MAX_TENSORS = 20_000
LENGTH_BYTES = 8
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def read_weights_file(path: Path) -> bytearray:
    """Return the content of the file at `path`, which may be anything.

    Raises:
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        file.seek(0, 2)
        content = bytearray(file.tell())
        file.seek(0)
        read = file.readinto(content)
    return content if read == len(content) else content[:read]


def header_of(content: bytearray) -> bytes:
    """Return the text of the header: names, types, shapes and places of the tensors; what there is of it."""
    return bytes(content[LENGTH_BYTES : LENGTH_BYTES + _header_bytes(content)])


def require_sane_header(start: bytes | bytearray, file_bytes: int) -> None:
    """Check the length of the header, which the first `LENGTH_BYTES` bytes of a file of `file_bytes` bytes give.

    Raises:
        AdapterFormatError: if it is too long for an adapter, or for the file.
    """
    header_bytes = _header_bytes(start)
    if header_bytes > MAX_HEADER_BYTES:
        raise AdapterFormatError.of(WEIGHTS_FILE, f"claims a header of {header_bytes} bytes, so it is no adapter")
    if LENGTH_BYTES + header_bytes > file_bytes:
        raise AdapterFormatError.of(WEIGHTS_FILE, "is damaged or incomplete: its header ends beyond its end")


def read_tensors(content: bytearray, path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors in `content`, which was read from `path`, as views of it.

    Raises:
        AdapterFormatError: the file is damaged, claims too large a header, or holds a tensor without values or with a
            type or value that is no number.
        OSError: if it cannot be read.
    """
    require_sane_header(content, len(content))
    header_bytes = _header_bytes(content)
    try:
        # The library checks that tensors lie side by side and fill the file; it reads the header only.
        with safe_open(str(path), framework="pt"):
            header = json.loads(header_of(content))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        if len(entries) > MAX_TENSORS:
            raise AdapterFormatError.of(WEIGHTS_FILE, f"has {len(entries)} tensors, so it is no adapter")
        _check_entries(entries)
        start = LENGTH_BYTES + header_bytes
        tensors = {
            name: view(content, _DTYPES[entry["dtype"]], entry["shape"], start + entry["data_offsets"][0])
            for name, entry in entries.items()
        }
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise AdapterFormatError.of(
            WEIGHTS_FILE, f"is damaged or incomplete ({error}); save or copy the adapter again"
        ) from error
    violations = [
        FieldViolation(name, "holds NaN or infinite values; the training has diverged")
        for name, tensor in tensors.items()
        if not bool(torch.isfinite(tensor).all())
    ]
    if violations:
        raise AdapterFormatError(f"{WEIGHTS_FILE} cannot be used", violations)
    return tensors


def view(content: bytearray, dtype: torch.dtype, shape: Sequence[int], offset: int) -> torch.Tensor:
    """Return a tensor with values over the bytes of `content` from `offset` on.

    Raises:
        ValueError: if it would reach beyond the end, or has no values.
    """
    return torch.frombuffer(content, dtype=dtype, count=math.prod(shape), offset=offset).view(*shape)


def _header_bytes(content: bytes | bytearray) -> int:
    return int.from_bytes(content[:LENGTH_BYTES], "little")


def _check_entries(entries: dict[str, dict[str, Any]]) -> None:
    violations = [
        FieldViolation(name, f"is {entry['dtype']}; only float32, float16 and bfloat16 are supported")
        for name, entry in entries.items()
        if entry["dtype"] not in _DTYPES
    ]
    # Beside a dimension of 0 the others may be anything, which safetensors takes and torch does not.
    violations += [
        FieldViolation(name, "has no values: one of its dimensions is 0")
        for name, entry in entries.items()
        if 0 in entry["shape"]
    ]
    if violations:
        raise AdapterFormatError(f"{WEIGHTS_FILE} cannot be used", violations)
